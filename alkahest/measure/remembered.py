"""Measured tables, remembered by the content of the files that they were measured from."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from alkahest.algebra.expression import Expression
from alkahest.engine.events import Event
from alkahest.engine.readable import Readable
from alkahest.engine.terms import name_leaves
from alkahest.files import cache
from alkahest.files.hashes import identity
from alkahest.mini.shipped import WEIGHTS

if TYPE_CHECKING:
    import pandas


def remembered(what: str, expressions: Sequence[Expression | None], settings: Sequence[Any], measure: Callable[[], Iterator[Event]]) -> Iterator[Event]:  # fmt: skip
    """The events of ``measure``, or one event with the table that it gave before for the same files and settings.

    Files are the same if their BLAKE3 is, where that is known or quickly found (below 256 MB), else if
    path, size and time are. Expressions that read anything but files are measured every time. The table's
    ``attrs["of"]`` says what was measured, for titles.
    """
    of = title_of(*expressions[:1])
    key = content_key(what, expressions, settings)
    table = None if key is None else _decoded(cache.load("tables", key))
    if table is not None:
        table.attrs["of"] = of
        yield Event(1, 1, "remembered", table)
        return
    for event in measure():
        if event.result is not None:
            event.result.attrs["of"] = of
            for reader in {reader for leaf in _leaves(expressions) for reader in leaf.files}:
                reader.check_unchanged()
            if key is not None and key == content_key(what, expressions, settings):
                cache.store("tables", key, _encoded(what, event.result))
        yield event


def title_of(*expressions: Expression | None) -> str:
    """What a table is about, in words: the expressions, and whether they are of the miniature family."""
    given = [one for one in expressions if one is not None]
    names = name_leaves(*given)
    small = any(reader.path.resolve().is_relative_to(WEIGHTS.resolve()) for leaf in names for reader in leaf.files)
    return ", ".join(one.text(names) for one in given) + (" (miniatures)" if small else "")


def content_key(what: str, expressions: Sequence[Expression | None], settings: Sequence[Any]) -> str | None:
    """A name for what is computed from the contents of files and from settings; None if anything else is read."""
    leaves = _leaves(expressions)
    if not all(leaf.files for leaf in leaves):
        return None
    names = {leaf: f"w{number}" for number, leaf in enumerate(leaves)}  # files may be renamed
    files = [[getattr(leaf, "prefix", ""), *map(identity, leaf.files)] for leaf in leaves]
    if any(None in found for found in files):
        return None
    text = json.dumps([what, [one and one.text(names) for one in expressions], files, list(settings)], default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _leaves(expressions: Sequence[Expression | None]) -> list[Readable]:
    return list(name_leaves(*(one for one in expressions if one is not None)))


def _encoded(what: str, table: pandas.DataFrame) -> dict[str, Any]:
    return {"what": what, "columns": {name: [_packed(value) for value in table[name].tolist()] for name in table}}


def _packed(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "data": base64.b64encode(value.tobytes()).decode()}
    return list(value) if isinstance(value, tuple) else value


def _decoded(found: Any) -> pandas.DataFrame | None:
    import pandas as pd

    try:
        return pd.DataFrame({name: [_unpacked(value) for value in column] for name, column in found["columns"].items()})
    except (TypeError, KeyError, ValueError, AttributeError):  # none, or not one of ours: measure again
        return None


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict):
        return np.frombuffer(base64.b64decode(value["data"]), np.dtype(value["dtype"])).copy()
    return tuple(value) if isinstance(value, list) else value

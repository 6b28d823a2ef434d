"""Measured tables: made of what tasks find side by side, and remembered by the content of what they were measured
from.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from alkahest.algebra.expression import Expression
from alkahest.engine.events import Event
from alkahest.engine.readable import Readable, Workspace
from alkahest.engine.terms import name_leaves
from alkahest.engine.workers import Job, Run
from alkahest.files import cache
from alkahest.files.hashes import identity
from alkahest.mini.shipped import WEIGHTS

if TYPE_CHECKING:
    import pandas

NAMES = ("tensor", "part", "block", "module", "shape")  # columns that say which tensor a row is about
_SHOWN = 8  # rows, of a table that fills
_TEXT = ("tensor", "part", "module", "shape")


class Task(Protocol):
    """One tensor's share of a measurement."""

    @property
    def key(self) -> str: ...

    @property
    def nbytes(self) -> int: ...  # of work, for progress

    @property
    def place(self) -> tuple[int, int]: ...  # where it is read from, as `Job.place`

    def rows(self, run: Run, workspace: Workspace) -> list[dict[str, Any]]:
        """What the table says of it; nothing if it is to be left out."""
        ...


@dataclass(frozen=True)
class Kind:
    """A kind of table: what its columns are, and which arithmetic made it."""

    operation: str
    number: int  # raised whenever a column comes out otherwise: what was remembered before is measured again
    columns: Mapping[str, str]  # all but NAMES -> what it is; rewording it forgets nothing
    objects: tuple[str, ...] = ()  # columns of arrays; all others but NAMES are float64
    whole: tuple[str, ...] = ()  # columns of whole numbers
    words: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()  # whose version decides the last digits

    def table(self, rows: Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
        """A DataFrame whose columns have the same dtypes whatever is in it, and however it came."""
        import pandas as pd

        from alkahest.measure.measured_table import MeasuredTable

        names = [*NAMES, *(name for name in self.columns if name not in NAMES)]
        found = pd.DataFrame([dict(row) for row in rows], columns=names, dtype=object)
        numbers = {name: "float64" for name in names if name not in (*_TEXT, *self.objects, *self.words)}
        whole = dict.fromkeys(("block", *self.whole), "int64")
        text = dict.fromkeys(("tensor", "part", "module", *self.words), "str")
        return MeasuredTable(found.astype({**numbers, **whole, **text}))

    @property
    def settings(self) -> list[Any]:
        """What of it belongs into the key of what is remembered."""
        return [cache.KINDS["tables"].format(), cache.Kind(self.operation, self.number, self.packages).format()]


def stream_table(
    kind: Kind,
    expressions: Sequence[Expression | None],
    settings: Sequence[Any],
    run: Run,
    tasks: Callable[[], Sequence[Task]],
    about: int | None = 1,
) -> Iterator[Event]:
    """The table that tasks make, as a generator of events; or one event with what they gave before for the same files.

    Files are the same if their BLAKE3 is, where that is known or quickly found (below 256 MB), else if path, size and
    time are. Expressions that read anything but files are measured every time. ``attrs["of"]`` says what was measured,
    for titles: the first ``about`` expressions.
    """
    of = title_of(*expressions[:about])
    key = content_key(kind.operation, expressions, [*settings, *kind.settings])
    known = None if key is None else _decode(cache.load("tables", key))
    if known is not None:
        table = kind.table(known)
        table.attrs["of"] = of
        yield Event(1, 1, "remembered", table)
        return
    for event in _measure(kind, run, tasks()):
        if event.result is not None:
            event.result.attrs["of"] = of
            for reader in {reader for leaf in _leaves(expressions) for reader in leaf.files}:
                reader.check_unchanged()
            if key is not None and key == content_key(kind.operation, expressions, [*settings, *kind.settings]):
                cache.store("tables", key, _encode(kind, event.result))
        yield event


def _measure(kind: Kind, run: Run, tasks: Sequence[Task]) -> Iterator[Event]:
    rows: dict[str, list[dict[str, Any]]] = {task.key: [] for task in tasks}

    def work(task: Task) -> Callable[[Workspace], None]:
        return lambda workspace: rows[task.key].extend(task.rows(run, workspace))

    jobs = [Job(task.key, task.nbytes, work(task), task.place) for task in tasks]

    def so_far() -> pandas.DataFrame:
        return kind.table([row for some in list(rows.values()) for row in some][-_SHOWN:])

    for event in run.progress(jobs, lambda: kind.table([row for some in rows.values() for row in some])):
        yield event if event.result is not None else replace(event, so_far=so_far)


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
    said = [one and [one.text(names), *one.definitions()] for one in expressions]
    text = json.dumps([what, said, files, list(settings)], default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _leaves(expressions: Sequence[Expression | None]) -> list[Readable]:
    return list(name_leaves(*(one for one in expressions if one is not None)))


def _encode(kind: Kind, table: pandas.DataFrame) -> dict[str, Any]:
    return {
        "what": kind.operation,
        "rows": [{name: _pack(value) for name, value in row.items()} for row in table.to_dict("records")],
    }


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "data": base64.b64encode(value.tobytes()).decode()}
    return list(value) if isinstance(value, tuple) else value


def _decode(found: Any) -> list[dict[str, Any]] | None:
    try:
        return [{name: _unpack(value) for name, value in row.items()} for row in found["rows"]]
    except (TypeError, KeyError, ValueError, AttributeError):  # none, or not one of ours: measure again
        return None


def _unpack(value: Any) -> Any:
    if isinstance(value, dict):
        return np.frombuffer(base64.b64decode(value["data"]), np.dtype(value["dtype"])).copy()
    return tuple(value) if isinstance(value, list) else value

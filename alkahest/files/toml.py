"""TOML files into frozen dataclasses: unknown keys are named with the nearest, values have the types of their
fields.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec

from alkahest.errors import FileFormatError, UnknownNameError, UnsupportedError, nearest
from alkahest.files.reader import Reader

T = TypeVar("T")
_MAX_BYTES = 1 << 20


def read_toml(path: Path, operation: str) -> dict[str, Any]:
    """What a TOML file holds. FileFormatError if it is none, or too long for one that a person wrote."""
    reader = Reader(path)
    if reader.size > _MAX_BYTES:
        raise FileFormatError(
            operation, "this is too long for a configuration", file=path, found=f"{reader.size:,} bytes"
        )
    try:
        return tomllib.loads(reader.read(0, reader.size).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FileFormatError(operation, "this is not TOML", file=path, found=error) from None


def dataclass_of(
    kind: type[T], given: object, operation: str, file: object, where: str, ready: Mapping[str, Any] | None = None
) -> T:
    """A dataclass from what a file says, each value of the type of its field; ``ready`` are fields from elsewhere.

    >>> dataclass_of(Stage, {"steps": 300, "lr": 1e-3}, "finetune", "tb1.toml", "stage 1")

    Raises UnknownNameError for a key it has no field for, with the nearest, FileFormatError for a value of a wrong
    type, for a number that is none, and for what is lacking: each with its place in the file.
    """
    if not isinstance(given, Mapping):
        raise FileFormatError(operation, f"{where} must be a table", file=file, found=repr(given)[:80])
    known = {item.name: item for item in fields(kind) if item.name not in (ready or {})}  # type: ignore[arg-type]
    require_keys(given, known, operation, file, where)
    types = get_type_hints(kind)
    values = {name: value_of(types[name], value, operation, file, f"{where}: {name}") for name, value in given.items()}
    needed = [name for name, item in known.items() if item.default is MISSING and item.default_factory is MISSING]
    if lacking := [name for name in needed if name not in values]:
        raise FileFormatError(
            operation, f"{where} lacks {', '.join(lacking)}", file=file, fix=f"see help({kind.__module__})"
        )
    return kind(**values, **(ready or {}))


def value_of(kind: Any, value: Any, operation: str, file: object, where: str) -> Any:
    """A value from a file as a type that a dataclass names; FileFormatError if it is none, or holds NaN or infinity."""
    _require_finite(value, operation, file, where)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$")
        key = where.rpartition(": ")[2] + place.rstrip("`")
        raise FileFormatError(
            operation,
            f"{where.rpartition(': ')[0]}: this value is of the wrong kind",
            file=file,
            key=key,
            expected=_in_words(problem),
            found=repr(value)[:200],
        ) from None


_KINDS = {
    "object": "a table",
    "array": "a list",
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
}


def _in_words(problem: str) -> str:
    """What was expected, in the words of TOML."""

    def said(found: re.Match[str]) -> str:
        kinds = [kind.strip() for kind in found[1].split("|") if kind.strip() != "null"]  # which TOML cannot say
        return " or ".join(_KINDS.get(kind, kind) for kind in kinds)

    return re.sub(r"`([^`]*)`", said, problem.removeprefix("Expected ").partition(", got")[0])


def require_keys(given: Iterable[str], known: Collection[str], operation: str, file: object, where: str) -> None:
    """Raise UnknownNameError, with the nearest, for a key that means nothing here."""
    for name in given:
        if name not in known:
            raise UnknownNameError(
                operation, f"{where} has an unknown key", file=file, key=str(name), fix=nearest(str(name), known)
            )


@dataclass(frozen=True)
class Bounds:
    """From where to where a number may go: both ends included, but for ``below``."""

    least: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def require(self, value: float, operation: str, file: object, where: str, name: str) -> None:
        """Raise UnsupportedError for a number outside."""
        if not (self.least <= value <= self.most and (value < self.below or self.below == math.inf)):
            size = "small" if value < self.least else "large"
            ends = [(self.least, "at least"), (self.most, "at most"), (self.below, "below")]
            expected = ", ".join(f"{word} {end:g}" for end, word in ends if math.isfinite(end))
            raise UnsupportedError(
                operation, f"{where}: {name} is too {size}", file=file, expected=expected, found=value
            )


def _require_finite(value: Any, operation: str, file: object, where: str) -> None:
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    for one in inside:
        _require_finite(one, operation, file, where)
    if isinstance(value, float) and not math.isfinite(value):
        raise FileFormatError(operation, f"{where} is no finite number", file=file, found=value)

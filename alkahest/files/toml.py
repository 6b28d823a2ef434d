"""TOML files into frozen dataclasses, checked: unknown keys are named with the nearest, values have their kinds."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from alkahest.errors import FileFormatError, UnknownNameError, nearest
from alkahest.files.reader import Reader

_MAX_BYTES = 1 << 20


def read_toml(path: Path, operation: str) -> dict[str, Any]:
    """What a TOML file holds. FileFormatError if it is none, or too long for one that a person wrote."""
    reader = Reader(path)
    if reader.size > _MAX_BYTES:
        raise FileFormatError(operation, "this is too long for a configuration", file=path, found=f"{reader.size:,} bytes")  # fmt: skip
    try:
        return tomllib.loads(reader.read(0, reader.size).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FileFormatError(operation, "this is not TOML", file=path, found=error) from None


def made(kind: type[Any], given: Mapping[str, Any], operation: str, file: object, where: str) -> Any:
    """A dataclass from a mapping: UnknownNameError for a key it has no field for, FileFormatError for a wrong kind."""
    known = {item.name: item for item in fields(kind)}
    for name in given:
        if name not in known:
            raise UnknownNameError(operation, f"{where} has an unknown key", file=file, key=str(name), fix=nearest(str(name), known))  # fmt: skip
    values = {}
    for name, value in given.items():
        wanted = str(known[name].type)
        value = tuple(value) if wanted.startswith("tuple") and isinstance(value, (list, tuple)) else value
        value = float(value) if wanted.startswith("float") and type(value) is int else value
        if not _fits(value, wanted):
            raise FileFormatError(operation, f"{where}: this value is of the wrong kind", file=file, key=name, expected=wanted, found=repr(value))  # fmt: skip
        values[name] = value
    try:
        return kind(**values)
    except TypeError:
        needed = [name for name, item in known.items() if item.default is MISSING and item.default_factory is MISSING]
        lacking = [name for name in needed if name not in values]
        raise FileFormatError(operation, f"{where} lacks {', '.join(lacking)}", file=file, fix=f"see help({kind.__module__})") from None  # fmt: skip


def _fits(value: Any, wanted: str) -> bool:
    kinds: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": bool, "Path": Path, "str | None": (str, type(None)), "float | None": (float, type(None))}  # fmt: skip
    if wanted in kinds:
        return isinstance(value, kinds[wanted]) and (wanted == "bool" or not isinstance(value, bool))
    return isinstance(value, tuple) if wanted.startswith("tuple") else isinstance(value, Mapping)

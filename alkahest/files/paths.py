"""Paths as people type and paste them."""

from __future__ import annotations

import os
from pathlib import Path

from alkahest.errors import FileFormatError, OutputError, nearest

_QUOTES = "\"'"
MINI = "mini:"  # before a name of the family of miniatures, wherever a path is taken
_SHIPPED = Path(__file__).parent.parent / "mini" / "weights"


def expanded(source: str | os.PathLike[str], operation: str) -> Path:
    """A path with ``~`` resolved, and quotes and spaces of copying taken off where nothing has that very name.

    >>> expanded('"~/models/a.safetensors"', "open")
    PosixPath('/home/ada/models/a.safetensors')

    ``mini:tb1`` is that member of the miniature family, and ``mini:`` the folder that they lie in. Raises
    FileFormatError (OutputError for an output) for what can be no path: a NUL, a user that does not exist, a name that
    is too long, a miniature that there is none of.
    """
    text = os.fspath(source)
    if not isinstance(text, str):  # bytes
        text = os.fsdecode(text)
    try:
        if "\0" in text:
            raise ValueError("it holds a NUL")
        path = Path(text)
        if not os.path.lexists(path):
            bare = _bare(text)
            path = _shipped(bare, operation) if bare.startswith(MINI) else Path(bare).expanduser()
        os.path.lexists(path)
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        kind = OutputError if operation == "save" else FileFormatError
        raise kind(
            operation,
            "this cannot be a file's name",
            file=repr(text[:300]),
            found=str(error)[:60],
            fix="check the path; ~name is the home of a user of this machine",
        ) from None
    return path


def _shipped(text: str, operation: str) -> Path:
    """The file or folder of the package that ``mini:NAME`` means; a file's suffix may be left out."""
    name = text.removeprefix(MINI)
    if operation == "save":
        fix = f"a path of your own, such as {name or 'merged'}.safetensors"
        raise OutputError(operation, "the miniature family is read, not written", file=text, fix=fix)
    files = [path for path in sorted(_SHIPPED.glob("*.safetensors")) if path.stem != "judge"]  # which is no model here
    known = {path.stem: path for path in files} | {"components": _SHIPPED / "components"}
    if not name:
        return _SHIPPED
    found = known.get(name.removesuffix(".safetensors"))
    if found is None or not found.exists():
        raise FileFormatError(operation, "there is no such miniature", file=text, fix=nearest(name, known))
    return found


def recorded_name(path: Path) -> str:
    r"""A file's name as text that any file can hold: bytes that are no UTF-8 are spelled out.

    >>> recorded_name(Path(os.fsdecode(b"caf\\xe9.safetensors")))
    'caf\\\\xe9.safetensors'
    """
    return os.fsencode(path.name).decode("utf-8", "backslashreplace")


def named(folder: Path, name: str) -> list[Path]:
    """The files in a folder that a recorded name may mean."""
    try:
        found = [folder / name] if (folder / name).is_file() else []
        if "\\x" in name and not found:
            found = [path for path in folder.iterdir() if recorded_name(path) == name and path.is_file()]
    except OSError:  # a name too long for any file, a folder that cannot be read
        return []
    return found


def _bare(text: str) -> str:
    """Text without spaces and a pair of quotes around it, as a file manager copies paths."""
    inner = text.strip()
    if len(inner) > 1 and inner[0] == inner[-1] and inner[0] in _QUOTES:
        return inner[1:-1]
    return inner or text

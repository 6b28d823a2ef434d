"""Captions as people keep them: beside each picture, or in a table; decoded strictly, so that nothing is made up."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from alkahest.errors import FileFormatError

TABLES = tuple(f"{stem}.{end}" for stem in ("metadata", "captions") for end in ("jsonl", "csv", "tsv", "json"))
BESIDE = (".txt", ".caption", ".json")  # in the order in which they are asked
_FILES = ("file_name", "filename", "file", "image", "image_path", "image_file", "path", "name")
_CAPTIONS = ("text", "caption", "prompt", "description", "captions", "tags", "tag_string", "label")
_MAX_CAPTION = 1 << 16  # bytes
_MAX_TABLE = 1 << 28
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass
class Table:
    """Captions of a table by the picture's path, relative to the folder, and the table that each is from."""

    captions: dict[str, str] = field(default_factory=dict)
    of: dict[str, str] = field(default_factory=dict)


def read_tables(root: Path) -> Table:
    """Captions from every metadata table in a folder and those in it; FileFormatError for one that cannot be read."""
    found = Table()
    for path in sorted(one for one in root.rglob("*") if one.name.lower() in TABLES and one.is_file()):
        for name, caption in _rows(path):
            place = (path.parent / name.replace("\\", "/")).relative_to(root) if _is_inside(name) else None
            if place is None:
                raise _bad(path, "a row names a file outside of its folder", "a path within it", repr(name)[:80])
            key = Path(*[part for part in place.parts if part != "."]).as_posix()
            if found.captions.get(key, caption) != caption:
                raise _bad(
                    path, "a picture has two captions", "one row for each picture", f"{key} in {found.of[key]} too"
                )
            found.captions[key], found.of[key] = caption, path.relative_to(root).as_posix()
    return found


class Beside(NamedTuple):
    """The caption in a file beside a picture, empty for none; why there is none; and what else is said there."""

    caption: str = ""
    problem: str | None = None
    note: str | None = None


def beside(picture: Path) -> Beside:
    """What files beside a picture say: the first that has a caption is taken, and a later one that differs is told."""
    found, taken = Beside(), ""
    for path in (one for end in BESIDE for one in _candidates(picture, end)):
        try:
            text = _read(path, _MAX_CAPTION)
            caption = (_from_json(path, text) if path.suffix.lower() == ".json" else text).strip()
        except FileFormatError as error:
            if not found.caption:
                return Beside(problem=f"{path.name}: {error.problem}")
            found = found._replace(note=f"{taken} is taken; {path.name}: {error.problem}")
            continue
        if caption and not found.caption:
            found, taken = Beside(caption), path.name
        elif caption and caption != found.caption:
            found = found._replace(note=f"{taken} is taken; {path.name} says otherwise")
    return found


def decoded(raw: bytes, path: Path) -> str:
    """Text by its byte order mark, else strictly as UTF-8; FileFormatError for any other encoding."""
    encoding = next((name for mark, name in _MARKS if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(encoding)
    except (UnicodeDecodeError, UnicodeError):
        raise _bad(path, "the text is not UTF-8", "UTF-8, or UTF-16 with its mark", repr(raw[:24])) from None
    if "\0" in text or "\ufffd" in text:
        raise _bad(path, "the text is not UTF-8", "UTF-8, or UTF-16 with its mark", repr(text[:24]))
    return text


def _candidates(picture: Path, end: str) -> Iterator[Path]:
    for name in (picture.stem + end, picture.stem + end.upper(), picture.name + end, picture.name + end.upper()):
        if (path := picture.with_name(name)).is_file():
            yield path


def _read(path: Path, most: int) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(most + 1)
    except OSError as error:
        raise _bad(path, "it cannot be read", "a text file", str(error)[:60]) from None
    if len(raw) > most:
        raise _bad(path, f"it is longer than {most:,} bytes", "a caption", f"more than {most:,} bytes")
    return decoded(raw, path)


def _parsed(text: str) -> Any:
    """What JSON says; ValueError also for escapes that stand for no character."""
    found = json.loads(text)
    again = json.dumps(found, ensure_ascii=False)
    if "\\u0000" in again or "\ufffd" in again or any("\ud800" <= letter <= "\udfff" for letter in again):
        raise ValueError("an escape stands for no character")
    return found


def _from_json(path: Path, text: str) -> str:
    try:
        found = _parsed(text)
    except (ValueError, RecursionError):
        raise _bad(path, "it is not JSON", "an object with a caption", text[:40]) from None
    return _caption_of(found) if isinstance(found, dict) else ""


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    """File name and caption of each row that has one."""
    text = _read(path, _MAX_TABLE)
    try:
        rows: list[Any]
        if path.suffix.lower() == ".jsonl":
            rows = [_parsed(line) for line in text.splitlines() if line.strip()]
        elif path.suffix.lower() == ".json":
            rows = _json_rows(_parsed(text))
        else:
            rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=_delimiter(text, path)))
    except (ValueError, csv.Error, RecursionError) as error:
        raise _bad(path, "the metadata table cannot be read", "JSON lines, or a table", str(error)[:80]) from None
    for row in rows:
        named = next((row[column] for column in _FILES if row.get(column)), None) if isinstance(row, dict) else None
        if not isinstance(named, str):
            expected = f"{_FILES[0]} and one of {', '.join(_CAPTIONS)}"
            raise _bad(path, "the metadata table cannot be read", expected, repr(row)[:80])
        if caption := _caption_of(row).strip():
            yield named, caption


def _json_rows(found: Any) -> list[Any]:
    """Rows of a JSON table: a list of them, or an object of file name to caption or row, as kohya's."""
    if isinstance(found, dict):
        return [{"file_name": name, **(row if isinstance(row, dict) else {"text": row})} for name, row in found.items()]
    return found if isinstance(found, list) else [found]


def _caption_of(row: Mapping[str, Any]) -> str:
    for column in _CAPTIONS:
        value = row.get(column)
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            return str(value[0]) if column == "captions" else ", ".join(value)
        if isinstance(value, str) and value.strip():
            return value
    return ""


def _delimiter(text: str, path: Path) -> str:
    """What separates columns: of the first line's candidates the one that is there most often."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    first = text.partition("\n")[0]
    return max((",", ";", "\t"), key=first.count)


def _is_inside(name: str) -> bool:
    path = Path(name.replace("\\", "/"))
    return not path.is_absolute() and ".." not in path.parts and ":" not in path.parts[0][:2]


def _bad(path: Path, problem: str, expected: str, found: str) -> FileFormatError:
    return FileFormatError("dataset", problem, file=path, expected=expected, found=found)

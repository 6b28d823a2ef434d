"""Captions in the encodings and tables that people have; none is made up."""

from __future__ import annotations

import codecs
import json
import random
from pathlib import Path

import pytest
from PIL import Image

from alkahest.errors import FileFormatError
from alkahest.pictures.dataset import from_folder

TEXT = "Füchse, zwei 狐"


def pictures(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 20, 30)).save(folder / name)


@pytest.mark.parametrize(
    "raw",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        TEXT.encode("utf-16"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
    ],
)
def test_texts_with_a_mark_and_without(raw: bytes, tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(raw)
    assert from_folder(tmp_path).examples[0].caption == TEXT


@pytest.mark.parametrize(
    "raw", ["Füchse".encode("latin-1"), "狐".encode("shift_jis"), TEXT.encode("utf-16-le"), b"a\xff"]
)
def test_other_encodings_are_refused_by_file(raw: bytes, tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "b.txt").write_text("a fox")
    found = from_folder(tmp_path)
    assert found.skipped == {"a.png": "a.txt: the text is not UTF-8"}
    with pytest.raises(FileFormatError, match=r"(?s)strict refuses.*a\.png.*not UTF-8"):
        from_folder(tmp_path, strict=True)


@pytest.mark.parametrize("seed", range(20))
def test_no_byte_becomes_another(seed: int, tmp_path: Path) -> None:
    """Whatever the bytes: the caption is what they say strictly, or none."""
    rng = random.Random(seed)
    raw = bytes(rng.choices([*range(32, 127), 0, 128, 195, 188, 255, 254, 239], k=rng.randint(1, 40)))
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "b.txt").write_text("a fox")
    found = {example.name: example.caption for example in from_folder(tmp_path).examples}
    if "a.png" in found:
        assert "\ufffd" not in found["a.png"]
        assert any(
            found["a.png"] == raw.decode(name, errors="ignore").strip() for name in ("utf-8-sig", "utf-16", "utf-32")
        )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "a fox"),
        ("a.TXT", "a fox"),
        ("a.caption", "a fox"),
        ("a.png.txt", "a fox"),
        ("a.json", '{"caption": "a fox"}'),
        ("a.json", '{"tags": ["a fox"]}'),
        ("a.json", '{"prompt": "a fox", "seed": 3}'),
    ],
)
def test_captions_beside(name: str, text: str, tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / name).write_text(text)
    assert from_folder(tmp_path).examples[0].caption == "a fox"


def test_a_long_caption_is_not_cut(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text("x" * 70_000)
    (tmp_path / "b.txt").write_text("a fox")
    assert from_folder(tmp_path).skipped == {"a.png": "a.txt: it is longer than 65,536 bytes"}


TABLES = {
    "metadata.csv": "file_name,text\na.png,one\ndeep/b.png,two\n",
    "metadata.tsv": "image\tcaption\n./a.png\tone\ndeep\\b.png\ttwo\n",
    "captions.csv": "\ufefffilename;prompt\n./a.png;one\ndeep\\b.png;two\n",
    "metadata.jsonl": '\ufeff{"file": "a.png", "text": "one"}\n{"image_path": "./deep/b.png", "description": "two"}\n',
    "captions.json": '{"a.png": "one", "deep/b.png": {"caption": "two", "tags": "x"}}',
    "metadata.json": '[{"file_name": "a.png", "tags": ["one"]}, {"file_name": "deep/b.png", "captions": ["two", "2"]}]',
}


@pytest.mark.parametrize("table", TABLES)
def test_tables_of_many_trainers(table: str, tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "deep/b.png")
    (tmp_path / table).write_text(TABLES[table], encoding="utf-8")
    assert {e.name: e.caption for e in from_folder(tmp_path).examples} == {"a.png": "one", "deep/b.png": "two"}


def test_tables_in_folders_below(tmp_path: Path) -> None:
    pictures(tmp_path, "x/a.png", "y/a.png")
    for folder, text in (("x", "one"), ("y", "two")):
        (tmp_path / folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": text}) + "\n")
    assert {e.name: e.caption for e in from_folder(tmp_path).examples} == {"x/a.png": "one", "y/a.png": "two"}


def test_rows_that_match_nothing_are_told(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,one\ngone.png,two\n")
    found = from_folder(tmp_path)
    assert found.skipped == {"gone.png": "a row of metadata.csv names no picture"}
    assert "1 skipped: a row of metadata.csv names no picture (gone.png)" in repr(found)


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "C:\\a.png", "x/../../a.png"])
def test_rows_stay_in_their_folder(name: str, tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "one"}) + "\n")
    with pytest.raises(FileFormatError, match="outside of its folder"):
        from_folder(tmp_path)


def test_two_tables_that_disagree(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,one\n")
    (tmp_path / "captions.csv").write_text("file_name,text\na.png,two\n")
    with pytest.raises(FileFormatError, match="a picture has two captions"):
        from_folder(tmp_path)


def test_everything_that_is_left_out_has_a_reason(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text("a fox")
    (tmp_path / "c.psd").write_bytes(b"8BPS")
    (tmp_path / "d.png").write_bytes(b"")
    (tmp_path / "e.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "notes.md").write_text("x")
    found = from_folder(tmp_path)
    assert found.skipped == {
        "b.png": "no caption",
        "c.psd": "unknown ending .psd",
        "d.png": "empty file",
        "e.png": "a link that leads nowhere",
    }
    with pytest.raises(FileFormatError, match="background is a colour"):
        from_folder(tmp_path, background="no colour")


def test_two_captions_of_one_picture_are_told(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png", "c.png")
    for name, text in (("a.txt", "one"), ("a.json", '{"caption": "two"}'), ("b.txt", "one"), ("b.caption", "one")):
        (tmp_path / name).write_text(text)
    (tmp_path / "c.txt").write_text("one")
    (tmp_path / "metadata.csv").write_text("file_name,text\nc.png,two\nb.png,one\n")
    found = from_folder(tmp_path)
    assert {e.name: e.caption for e in found.examples} == {"a.png": "one", "b.png": "one", "c.png": "two"}
    assert found.notes == {
        "a.png": "two captions: a.txt is taken; a.json says otherwise",
        "c.png": "two captions: that of metadata.csv is taken; one beside it says otherwise",
    }
    assert "1 noted: two captions: a.txt is taken" in repr(found)


@pytest.mark.parametrize("escape", [r"\ud800", r"\u0000", r"\ufffd"])
def test_an_escape_that_stands_for_no_character_is_refused_by_file(escape: str, tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "a.json").write_text(f'{{"caption": "a {escape} b"}}')
    (tmp_path / "b.txt").write_text("one")
    assert from_folder(tmp_path).skipped == {"a.png": "a.json: it is not JSON"}
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "text": "{escape}"}}')
    with pytest.raises(FileFormatError, match=r"(?s)cannot be read.*no character"):
        from_folder(tmp_path)


def test_a_caption_without_its_picture_is_told(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    for name in ("a.txt", "b.png.txt", "gone.txt", "gone.caption", "README.txt", "cut.txt", "notes.md"):
        (tmp_path / name).write_text("one")
    (tmp_path / "cut.png").write_bytes(b"")
    assert from_folder(tmp_path).skipped == {
        "cut.png": "empty file",
        "gone.caption": "a caption without its picture",
        "gone.txt": "a caption without its picture",
    }

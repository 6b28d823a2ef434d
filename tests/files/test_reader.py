from __future__ import annotations

import os
from pathlib import Path

import pytest

from alkahest.errors import FileFormatError
from alkahest.files import reader as module
from alkahest.files.reader import Reader, same_file


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(FileFormatError, match="not a regular file"):
            Reader(path)


def test_links_are_seen_through(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "soft").symlink_to(tmp_path / "a")
    os.link(tmp_path / "a", tmp_path / "hard")
    assert same_file(tmp_path / "a", tmp_path / "soft")
    assert same_file(tmp_path / "a", tmp_path / "hard")
    assert not same_file(tmp_path / "a", tmp_path / "missing")


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="nothing to ask")
def test_a_thread_that_reads_forward_has_the_system_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONG", 10)
    monkeypatch.setattr(module, "_AHEAD", 100)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        module.os, "posix_fadvise", lambda descriptor, start, count, advice: asked.append((start, count))
    )
    content = bytes(range(250)) * 40
    (tmp_path / "a.bin").write_bytes(content)
    reader = Reader(tmp_path / "a.bin")
    for start in (0, 9000, 40, 5):  # here and there, or little by little
        assert reader.read(start, 10 if start != 5 else 4) == content[start : start + (10 if start != 5 else 4)]
    assert asked == []
    for start in range(2000, 3000, 20):  # every other piece, as one of two threads
        assert reader.read(start, 10) == content[start : start + 10]
    assert asked[0] == (2010, 120)  # what follows the first piece, as far as 100 beyond the second
    ends = [start + count for start, count in asked]
    assert [start for start, _ in asked[1:]] == ends[:-1], "no byte is asked for twice"
    assert 2990 + 50 <= ends[-1] <= 2990 + 100
    assert len(asked) < 25

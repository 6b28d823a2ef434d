from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from blake3 import blake3

from alkahest.errors import FileFormatError
from alkahest.files.hashes import _HASH_CHUNK, blake3_of, known_paths
from alkahest.files.reader import Reader


def test_hashes_are_blake3_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [os.urandom(_HASH_CHUNK + 17), b"", b"short"]
    old = time.time() - 100
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
        os.utime(tmp_path / str(number), (old, old))
    readers = [Reader(tmp_path / str(number)) for number in range(3)]
    expected = [blake3(content).hexdigest() for content in contents]
    assert blake3_of(readers) == expected
    assert known_paths(expected[0]) == [tmp_path / "0"]
    monkeypatch.setattr(Reader, "read_into", lambda *arguments: pytest.fail("read again"))
    assert blake3_of([Reader(tmp_path / "0")]) == expected[:1]


def test_a_changed_file_is_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for content in (b"one", b"two"):  # the same size, in the same second
        path.write_bytes(content)
        assert blake3_of([Reader(path)]) == [blake3(content).hexdigest()]
    reader = Reader(path)
    reader.read(0, 1)
    path.write_bytes(b"six")
    os.utime(path, (1, 1))
    with pytest.raises(FileFormatError, match="changed after it was opened"):
        reader.check_unchanged()

from __future__ import annotations

import os
from pathlib import Path

import pytest
from blake3 import blake3

from alkahest.errors import FileFormatError
from alkahest.files import cache, hashes
from alkahest.files.hashes import _HASH_CHUNK, blake3_of, known_paths
from alkahest.files.reader import Reader


def test_hashes_are_blake3_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [os.urandom(_HASH_CHUNK + 17), b"", b"short"]
    monkeypatch.setattr(hashes, "_RACY_SECONDS", -1)  # nobody can make a file look older than it is
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
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


def test_times_that_were_put_back_do_not_hide_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "_RACY_SECONDS", -1)
    path = tmp_path / "a"
    path.write_bytes(b"one")
    reader = Reader(path)
    assert blake3_of([reader]) == [blake3(b"one").hexdigest()]
    before = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert blake3_of([Reader(path)]) == [blake3(b"two").hexdigest()]
    with pytest.raises(FileFormatError, match="changed after it was opened"):
        reader.check_unchanged()


@pytest.mark.parametrize("known", ["ab", "0" * 65, "g" * 64, 3, None, ["0" * 64]])
def test_a_hash_that_is_none_is_not_believed(known: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "_RACY_SECONDS", -1)
    path = tmp_path / "a"
    path.write_bytes(b"one")
    right = blake3_of([Reader(path)])
    (entry,) = (cache.cache_folder() / "blake3").glob("*.json")
    value = {**cache.load("blake3", entry.stem), "blake3": known}
    cache.store("blake3", entry.stem, value)  # with a good checksum
    assert blake3_of([Reader(path)]) == right


def test_a_hash_with_a_flipped_digit_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "_RACY_SECONDS", -1)
    path = tmp_path / "a"
    path.write_bytes(b"one")
    right = blake3_of([Reader(path)])
    (entry,) = (cache.cache_folder() / "blake3").glob("*.json")
    flipped = "0" if right[0][7] != "0" else "1"
    entry.write_text(entry.read_text().replace(right[0], right[0][:7] + flipped + right[0][8:]))
    assert blake3_of([Reader(path)]) == right
    path.write_bytes(b"six")  # and what is remembered is of other bytes
    assert blake3_of([Reader(path)], anew=True) == [blake3(b"six").hexdigest()]

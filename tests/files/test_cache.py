from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import alkahest as ak
from alkahest.errors import UnknownNameError
from alkahest.files import cache


def test_entries_are_listed_sized_and_cleared_by_kind() -> None:
    assert list(ak.cached().columns) == ["kind", "file", "bytes", "time"]
    assert len(ak.cached()) == 0
    cache.store("tables", "a", {"some": "thing"})
    cache.store("blake3", "b", [1, 2])
    other = cache.cache_folder() / "not ours.txt"
    other.write_text("stays")
    found = ak.cached()
    assert sorted(found.kind) == ["blake3", "tables"]
    assert found.bytes.sum() == sum(os.path.getsize(path) for path in found.file)
    assert cache.load("tables", "a") == {"some": "thing"}
    assert ak.clear_cache("tables") == found[found.kind == "tables"].bytes.sum()
    assert ak.cached().kind.tolist() == ["blake3"]
    assert ak.clear_cache() > 0
    assert len(ak.cached()) == 0
    assert other.read_text() == "stays"


def test_what_cannot_be_read_or_written_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache.store("tables", "a", 1)
    (cache.cache_folder() / "tables" / "a.json").write_text("{broken")
    assert cache.load("tables", "a") is None
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("ALKAHEST_CACHE", str(blocked))
    cache.store("tables", "a", 1)
    assert cache.load("tables", "a") is None
    with pytest.raises(UnknownNameError, match="did you mean 'tables'"):
        ak.clear_cache("table")


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ALKAHEST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if os.name != "nt":
        assert cache.cache_folder() == tmp_path / "alkahest"


VALUE = {"rows": [{"tensor": "a", "norm": 1.5, "shape": [3, 4]}, {"tensor": "b", "norm": 2.5, "shape": [5]}]}


@pytest.mark.parametrize("seed", range(40))
def test_an_entry_that_is_not_what_was_stored_is_none(seed: int) -> None:
    """Cut, flipped, exchanged, nested without end: it is made anew."""
    cache.store("tables", "one", VALUE)
    assert cache.load("tables", "one") == VALUE
    entry = cache.cache_folder() / "tables" / "one.json"
    rng, raw = random.Random(seed), bytearray(entry.read_bytes())
    match seed % 4:
        case 0:
            raw = raw[: rng.randrange(len(raw))]
        case 1:
            place = rng.randrange(len(raw))
            raw[place] ^= 1 << rng.randrange(7)
        case 2:
            changed = json.loads(raw)
            changed["value"]["rows"] = changed["value"]["rows"][: rng.randrange(2)]
            raw = bytearray(json.dumps(changed).encode())
        case 3:
            raw = bytearray(rng.choice([b"[" * 10**6, b"null", b"[]", b'{"value": 3}', b"\xff\xfe", b""]))
    entry.write_bytes(raw)
    found = cache.load("tables", "one")
    assert found in (None, VALUE)
    assert found is None or json.loads(raw)["value"] == VALUE


def test_an_entry_under_another_name_is_none() -> None:
    cache.store("tables", "one", VALUE)
    folder = cache.cache_folder()
    (folder / "curves").mkdir()
    for copy in (folder / "tables" / "two.json", folder / "curves" / "one.json"):
        copy.write_bytes((folder / "tables" / "one.json").read_bytes())
        assert cache.load(copy.parent.name, copy.stem) is None


@pytest.mark.parametrize("seed", range(20))
def test_tensors_that_were_kept(seed: int, tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", {"up": torch.randn(4, 3), "down": torch.ones(3, dtype=torch.bfloat16)}
    cache.store_tensors(path, tensors, {"scale": 1.5})
    found = cache.load_tensors(path)
    assert found is not None
    assert found[1] == {"scale": 1.5}
    assert all(torch.equal(found[0][name], value) for name, value in tensors.items())
    rng, raw = random.Random(seed), bytearray(path.read_bytes())
    if seed % 2:
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    else:
        raw = raw[: rng.randrange(len(raw))]
    path.write_bytes(raw)
    damaged = cache.load_tensors(path)
    assert damaged is None or (damaged[1] == {"scale": 1.5} and torch.equal(damaged[0]["up"], tensors["up"]))


def test_nothing_stays_of_an_entry_that_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    cache.store("tables", "one", VALUE)  # costs time, nothing else
    with pytest.raises(OSError, match="No space left"):
        cache.store_tensors(tmp_path / "a.safetensors", {"a": torch.ones(3)})
    assert list(tmp_path.glob("*")) == []
    assert [path for path in cache.cache_folder().rglob("*") if path.is_file()] == []

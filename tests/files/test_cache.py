from __future__ import annotations

import os
from pathlib import Path

import pytest

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

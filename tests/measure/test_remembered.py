from __future__ import annotations

import dataclasses
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny

import alkahest as ak
from alkahest.errors import AlkahestError
from alkahest.files import cache, hashes
from alkahest.measure import table as module
from alkahest.measure.table import stream_delta_table


def measured(monkeypatch: pytest.MonkeyPatch, call: Any) -> tuple[pd.DataFrame, bool]:
    """A table, and whether any tensor was read for it."""
    reads = []
    read = ak.Checkpoint.read
    with monkeypatch.context() as patched:
        patched.setattr(ak.Checkpoint, "read", lambda *given: (reads.append(given[1]), read(*given))[1])
        return call(), bool(reads)


@pytest.fixture
def pair(trio: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    return {name: Path(shutil.copy(trio[name], tmp_path / f"{name}.safetensors")) for name in ("variant", "base")}


def test_a_table_is_measured_once_whatever_the_files_are_called(
    pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def table() -> pd.DataFrame:
        return ak.delta_table(ak.open(pair["variant"]) - ak.open(pair["base"]))

    first, was_read = measured(monkeypatch, table)
    assert was_read
    again, was_read = measured(monkeypatch, table)
    assert not was_read
    pd.testing.assert_frame_equal(again, first)
    assert again.ulps[3].dtype == first.ulps[3].dtype
    pair["variant"] = pair["variant"].rename(pair["variant"].with_name("renamed.safetensors"))
    assert not measured(monkeypatch, table)[1]
    for other in (
        lambda: ak.delta_table(ak.open(pair["variant"]) - ak.open(pair["base"]), k=2),
        lambda: ak.delta_table(ak.open(pair["variant"]) - ak.open(pair["base"]), dtype="fp16"),
        lambda: ak.delta_table(ak.open(pair["base"]) - ak.open(pair["variant"])),
        lambda: ak.delta_table((ak.open(pair["variant"]) - ak.open(pair["base"])).only("layers")),
        lambda: ak.delta_spectra(ak.open(pair["variant"]) - ak.open(pair["base"])),
    ):
        assert measured(monkeypatch, other)[1]
        assert not measured(monkeypatch, other)[1]


def test_a_file_with_other_content_is_measured_again(pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def table() -> pd.DataFrame:
        return ak.delta_table(ak.open(pair["variant"]) - ak.open(pair["base"]))

    before = table()
    status = pair["variant"].stat()
    tiny.write(pair["variant"], tiny.native(tiny.near(tiny.state(seed=1), 0.02, seed=9)))
    os.utime(pair["variant"], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert pair["variant"].stat().st_size == status.st_size
    after, was_read = measured(monkeypatch, table)
    assert was_read
    assert after.delta_norm.sum() != before.delta_norm.sum()


def test_large_files_go_by_path_size_and_time(pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "_QUICKLY_HASHED", 0)

    def table() -> pd.DataFrame:
        return ak.delta_table(ak.open(pair["variant"]) - ak.open(pair["base"]))

    assert measured(monkeypatch, table)[1]
    assert measured(monkeypatch, table)[1]  # files this young could still change within the same tick
    monkeypatch.setattr(hashes, "_RACY_SECONDS", -1)
    assert measured(monkeypatch, table)[1]
    assert not measured(monkeypatch, table)[1]
    os.utime(pair["base"], (time.time() - 50,) * 2)
    assert measured(monkeypatch, table)[1]


def test_made_up_weights_and_a_spoilt_entry_are_measured(
    pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ak.made_up(layers=1, width=96)
    table = ak.delta_table(ak.made_up(layers=1, width=96, delta=0.1) - made)
    assert (table.delta_norm > 0).any()
    assert len(ak.cached().query("kind == 'tables'")) == 0
    delta = ak.open(pair["variant"]) - ak.open(pair["base"])
    ak.delta_table(delta)
    (entry,) = ak.cached().query("kind == 'tables'").file
    for spoilt in ("{", "[]", '{"columns": {"tensor": [{"dtype": "object", "data": ""}]}}', '{"columns": 3}'):
        Path(entry).write_text(spoilt)
        found, was_read = measured(monkeypatch, lambda: ak.delta_table(delta))
        assert was_read
        assert len(found) == len(delta.shapes)


def test_a_measurement_that_is_stopped_leaves_nothing(pair: dict[str, Path]) -> None:
    events = stream_delta_table(ak.open(pair["variant"]) - ak.open(pair["base"]))
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert len(ak.cached().query("kind == 'tables'")) == 0


def test_what_other_code_measured_is_not_given(pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def table() -> pd.DataFrame:
        return ak.delta_table(ak.open(pair["variant"]) - ak.open(pair["base"]))

    table()
    monkeypatch.setattr(module, "KIND", dataclasses.replace(module.KIND, number=module.KIND.number + 1))
    assert measured(monkeypatch, table)[1], "the arithmetic was changed"
    words = {**module.KIND.columns, "rms": "said otherwise"}
    monkeypatch.setattr(module, "KIND", dataclasses.replace(module.KIND, columns=words))
    assert not measured(monkeypatch, table)[1], "only words were changed"
    monkeypatch.setitem(cache.KINDS, "tables", dataclasses.replace(cache.KINDS["tables"], number=99))
    assert measured(monkeypatch, table)[1], "tables are written otherwise"


def test_hashes_of_other_code_are_taken_again(pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "_RACY_SECONDS", -1)
    (reader,) = ak.open(pair["base"]).files
    (digest,) = hashes.blake3_of([reader])
    (entry,) = (cache.cache_folder() / "blake3").glob("*.json")
    cache.store("blake3", entry.stem, {**cache.load("blake3", entry.stem), "blake3": "0" * 64})
    assert hashes.blake3_of([reader]) == ["0" * 64], "it is remembered"
    assert hashes.known_paths("0" * 64) == [pair["base"]]
    monkeypatch.setitem(cache.KINDS, "blake3", dataclasses.replace(cache.KINDS["blake3"], number=99))
    assert hashes.known_paths("0" * 64) == []
    assert hashes.blake3_of([reader]) == [digest]


@pytest.mark.parametrize("kind", cache.KINDS)
def test_every_kind_is_named_by_its_number_and_what_computed_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache.KINDS[kind].format()
    assert before.startswith(str(cache.KINDS[kind].number))
    monkeypatch.setattr(cache, "version", lambda package: f"{package}'s next")
    assert (cache.KINDS[kind].format() != before) == bool(cache.KINDS[kind].packages)


@pytest.mark.parametrize(
    "measure",
    [ak.delta_table, ak.delta_spectra, lambda d: ak.compare({"a": d, "b": d})],
    ids=["table", "spectra", "compare"],
)
@pytest.mark.parametrize("nothing", [True, False])
def test_fresh_and_remembered_tables_have_the_same_dtypes(
    measure: Any, nothing: bool, pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def table() -> pd.DataFrame:
        base = ak.open(pair["base"])
        return measure((base if nothing else ak.open(pair["variant"])) - base)

    fresh, was_read = measured(monkeypatch, table)
    again, was_read_again = measured(monkeypatch, table)
    assert (was_read, was_read_again) == (True, False) or nothing
    pd.testing.assert_frame_equal(fresh, again)
    assert fresh["delta_norm" if "delta_norm" in fresh else "first_norm"].dtype == "float64"
    assert fresh.block.dtype == "int64"
    for name in fresh.columns:
        kinds = {type(value) for value in fresh[name]} | {type(value) for value in again[name]}
        assert fresh[name].dtype != object or kinds <= {tuple, np.ndarray}, name


def test_a_spectrum_of_nothing_is_told_not_plotted(pair: dict[str, Path]) -> None:
    from alkahest.lab import plots

    base = ak.open(pair["base"])
    with pytest.raises(AlkahestError, match="nothing"):
        plots.spectrum(ak.delta_spectra(base - base))

from __future__ import annotations

import json
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
from PIL import Image

import alkahest as ak
from alkahest.errors import AlkahestError, MismatchError, OutputError, UnknownNameError
from alkahest.pictures.sweeps import stream_sweep

Trio = dict[str, Path]
FAST = {"steps": 2, "width": 24, "height": 40}
OVER = {"k": [0, 1, 9.5], "cfg": [1, 2]}


@pytest.fixture(scope="module")
def folder(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("components") / "whole"
    tiny.reference(tiny.model(0), parts).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def live(trio: Trio, folder: Path) -> Any:
    bridge, variant, base = (ak.open(trio[name]) for name in ("bridge", "variant", "base"))
    return ak.LiveModel(bridge.protect("refiner") + ak.param("k", 1.0) * (variant - base), folder)


def test_the_table_and_its_pictures(live: Any, tmp_path: Path) -> None:
    table = ak.sweep(live, ["a tree", "a box"], over=OVER, seeds=[3, 4], folder=tmp_path, **FAST)
    assert isinstance(table, pd.DataFrame)
    assert len(table) == 3 * 2 * 2 * 2
    assert list(table.k.unique()) == [0, 1, 9.5]
    assert {"k", "cfg", "prompt", "seed", "lag1", "high_freq", "grid", "error", "path"} <= set(table.columns)
    assert table.error.isna().all()
    row = table[(table.k == 9.5) & (table.cfg == 2) & (table.prompt == "a box") & (table.seed == 4)].iloc[0]
    live.set(k=9.5)
    image = ak.sample(live, "a box", cfg=2, seed=4, **FAST).images[0]
    difference = np.asarray(image).astype(int) - np.asarray(Image.open(row.path))
    assert np.abs(difference).max() <= 1  # float noise of the batch, rounded to bytes
    assert row.lag1 == pytest.approx(ak.picture_measures(image).lag1[0], abs=1e-2)


def test_cells_are_drawn_once(live: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = stream_sweep(live, "a tree", OVER, folder=tmp_path, **FAST)
    for _ in range(4):
        next(events)
    events.close()  # stopped midway
    drawn: list[int] = []
    module = sys.modules["alkahest.pictures.sweeps"]
    draw = module.draw
    monkeypatch.setattr(module, "draw", lambda live, cells: (drawn.append(len(cells)), draw(live, cells))[1])
    table = ak.sweep(live, "a tree", OVER, folder=tmp_path, **FAST)
    assert sum(drawn) == 2
    again = ak.sweep(live, "a tree", {"cfg": [2, 1], "k": [1]}, folder=tmp_path, **FAST)
    assert sum(drawn) == 2, "the same cells in another order"
    assert set(again.path) <= set(table.path)
    ak.sweep(live, "a tree", OVER, folder=tmp_path, **{**FAST, "steps": 3})
    assert sum(drawn) == 8, "another setting is another cell"


def test_other_inputs_are_other_cells(live: Any, trio: Trio, folder: Path, tmp_path: Path) -> None:
    other = ak.LiveModel(
        ak.open(trio["variant"]).protect("refiner")
        + ak.param("k", 1.0) * (ak.open(trio["bridge"]) - ak.open(trio["base"])),
        folder,
    )
    paths = [ak.sweep(one, "a tree", {"k": [1]}, folder=tmp_path, **FAST).path[0] for one in (live, other)]
    assert paths[0] != paths[1]


def test_executors_give_the_same_pictures(live: Any, tmp_path: Path) -> None:
    tables = [ak.sweep(live, ["a tree", "a box"], OVER, folder=tmp_path / "serial", **FAST)]
    with ThreadPoolExecutor(3) as threads:
        tables.append(ak.sweep(live, ["a tree", "a box"], OVER, executor=threads, folder=tmp_path / "threads", **FAST))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        tables.append(ak.sweep(live, ["a tree", "a box"], OVER, executor=processes, folder=tmp_path / "p", **FAST))
    for table in tables[1:]:
        assert list(table.prompt) == list(tables[0].prompt)
        for one, two in zip(tables[0].path, table.path, strict=True):
            assert np.abs(np.asarray(Image.open(one)).astype(int) - np.asarray(Image.open(two))).max() <= 1


def test_a_failing_cell_is_recorded_and_the_rest_goes_on(live: Any, tmp_path: Path) -> None:
    table = ak.sweep(
        live, ["a tree", "a box"], {"k": [1, 1e42], "width": [24, 26]}, folder=tmp_path, steps=1, height=40
    )
    assert list(table.error.isna()) == [True, True, False, False, False, False, False, False]
    assert "not a multiple of 4" in table.error[2]
    assert "overflows" in table.error[4]
    assert table.path.isna().sum() == 6
    sheet = table.contact_sheet(rows="prompt", columns=["k", "width"])
    assert sheet.width > 4 * 128
    live.set(k=1)


def test_what_is_refused_before_drawing(live: Any, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"'shfit'[^$]*did you mean 'shift'"):
        ak.sweep(live, "a tree", {"shfit": [1]}, folder=tmp_path)
    with pytest.raises(UnknownNameError, match="'stepss'"):
        ak.sweep(live, "a tree", {"k": [1]}, folder=tmp_path, stepss=4)
    with pytest.raises(AlkahestError, match="no values"):
        ak.sweep(live, "a tree", {"k": []}, folder=tmp_path)
    with pytest.raises(MismatchError, match="a LiveModel is needed"):
        ak.sweep(live.pipe, "a tree", {"k": [1]}, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_room_for_the_cache(live: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    with pytest.raises(OutputError, match="too small"):
        ak.sweep(live, "a tree", {"k": [1]}, folder=tmp_path, **FAST)
    assert not list(tmp_path.glob("*.json"))


def test_a_damaged_record_is_drawn_again(live: Any, tmp_path: Path) -> None:
    first = ak.sweep(live, "a tree", {"k": [1]}, folder=tmp_path, **FAST)
    record = Path(first.path[0]).with_suffix(".json")
    whole = json.loads(record.read_text())
    assert whole["record"]["error"] is None
    for spoilt in ("{", '{"k": 99}', json.dumps({**whole, "record": {**whole["record"], "lag1": 99.0}}), "[" * 10**5):
        record.write_text(spoilt)
        second = ak.sweep(live, "a tree", {"k": [1]}, folder=tmp_path, **FAST)
        assert second.lag1[0] == first.lag1[0]
    picture = Path(first.path[0])
    before = picture.read_bytes()
    picture.write_bytes(before[:100])
    ak.sweep(live, "a tree", {"k": [1]}, folder=tmp_path, **FAST)
    assert picture.read_bytes() == before


def test_contact_sheet_places_pictures(tmp_path: Path) -> None:
    rows = []
    for n, (prompt, k) in enumerate([("a", 0.0), ("a", 1.0), ("b", 0.0)]):
        path = tmp_path / f"{n}.png"
        Image.new("RGB", (20, 30), (80 * n, 10, 10)).save(path)
        rows.append({"k": k, "prompt": prompt, "seed": 0, "path": str(path), "error": None})
    from alkahest.pictures.sweeps import Cells

    sheet = Cells(rows).contact_sheet(rows="prompt", columns="k", size=40)
    colours = {sheet.getpixel((x, y)) for x in range(sheet.width) for y in range(sheet.height)}
    assert {(0, 10, 10), (80, 10, 10), (160, 10, 10), (211, 211, 211)} <= colours

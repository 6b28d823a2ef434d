"""A sweep on dask.distributed: worker processes of their own, one of which is killed midway."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

import alkahest as ak
from alkahest.sweep import stream_sweep

FAST = {"steps": 2, "width": 24, "height": 40}
OVER = {"k": [0, 1, 2, 4, 9.5], "cfg": [1, 2]}


@pytest.mark.filterwarnings("ignore")  # of a worker's loss, which is what is tested
def test_a_sweep_survives_the_death_of_a_worker(trio: dict[str, Path], parts: dict[str, Any], tmp_path: Path) -> None:
    from distributed import Client, LocalCluster

    tiny.reference(tiny.model(0), parts).save_pretrained(tmp_path / "components")
    bridge, variant, base = (ak.open(trio[name]) for name in ("bridge", "variant", "base"))
    live = ak.LiveModel(bridge.protect("refiner") + ak.param("k", 1.0) * (variant - base), tmp_path / "components")
    serial = ak.sweep(live, ["a tree", "a box"], OVER, folder=tmp_path / "serial", **FAST)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1", local_directory=str(tmp_path / "dask"), silence_logs="ERROR") as cluster,
        Client(cluster) as client,
    ):  # fmt: skip
        seen: Counter[str] = Counter()
        table = None
        for event in stream_sweep(live, ["a tree", "a box"], OVER, folder=tmp_path / "cluster", executor=client.get_executor(), batch=2, **FAST):  # fmt: skip
            if event.result is not None:
                table = event.result
                break
            seen[event.key] += 1
            if sum(seen.values()) == 2:
                os.kill(next(iter(cluster.workers.values())).process.pid, signal.SIGKILL)
    assert table is not None
    assert len(seen) == 20
    assert set(seen.values()) == {1}, "a cell was lost or doubled"
    assert list(table.k) == list(serial.k)
    assert table.error.isna().all()
    assert len(set(table.path)) == 20 == len(list((tmp_path / "cluster").glob("*.png")))
    for one, two in zip(serial.path, table.path, strict=True):
        assert np.abs(np.asarray(Image.open(one)).astype(int) - np.asarray(Image.open(two))).max() <= 1

"""The same work over and over: memory stays flat, and no file stays open (Linux counts both in /proc)."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import alkahest as ak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="not run: open files and memory are counted in /proc")


def state() -> tuple[float, int]:
    """Anonymous memory in MB, and open files."""
    gc.collect()
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1000, len(os.listdir("/proc/self/fd"))


@pytest.fixture
def work(trio: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    def opened() -> list[Any]:
        return [ak.open(trio[name]) for name in ("bridge", "variant", "base")]

    def merge(number: int) -> None:
        bridge, variant, base = opened()
        (bridge.protect("refiner") + number * (variant - base)).save(tmp_path / "merged.safetensors", threads=2)

    def extract(number: int) -> None:
        _, variant, base = opened()
        ak.extract_lora((variant - base).only("layers.0.attention.to_q"), rank=2 + number % 3).save(
            tmp_path / "lora.safetensors"
        )

    live = ak.LiveModel(ak.mini.load("base") + ak.param("k", 1.0) * (ak.mini.load("base-weak") - ak.mini.load("base")))

    def move(number: int) -> None:
        live.set(k=float(number))

    return {"merge": merge, "extract": extract, "set": move}


@pytest.mark.parametrize("name", ["merge", "extract", "set"])
def test_two_hundred_times(name: str, work: dict[str, Any]) -> None:
    for number in range(20):
        work[name](number)
    memory, files = state()
    for number in range(200):
        work[name](number)
    later, still = state()
    assert still <= files, "files stay open"
    assert later - memory < 20, f"{later - memory:.1f} MB more after 200 times"

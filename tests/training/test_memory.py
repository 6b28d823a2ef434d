"""The plan against the table that was worked out by hand for the real model."""

from __future__ import annotations

import pytest

import alkahest as ak
from alkahest.errors import AlkahestError, UnknownNameError

# GiB at 512 x 512 and 1024 x 1024, batch 1, with the input side frozen.
BY_HAND = {
    "adafactor, bf16, fused": (14.0, 15.9),
    "adafactor, bf16": (24.0, 25.8),
    "adamw8bit, bf16, fused": (23.9, 25.7),
    "adafactor, fp32 master, fused": (24.7, 26.5),
    "adamw8bit, bf16": (33.4, 35.3),
    "adamw8bit, fp32 master, fused": (34.3, 36.2),
    "adamw8bit, fp32 master": (53.6, 55.5),
    "adamw, bf16": (63.6, 65.5),
    "adamw, fp32 master": (83.8, 85.7),
}


@pytest.mark.parametrize(("resolution", "column"), [(512, 0), (1024, 1)])
def test_the_real_model(resolution: int, column: int) -> None:
    table = ak.memory_plan(ak.made_up(layers=30), 24, frozen="input, final", resolution=resolution).set_index("mode")
    for mode, totals in BY_HAND.items():
        assert table.total[mode] == pytest.approx(totals[column], abs=1.3), mode
    assert table.fits["adafactor, bf16, fused"]
    assert not table.fits["adamw, fp32 master"]
    assert table.total.is_monotonic_increasing
    parts = table[["weights", "gradients", "optimiser", "activations"]].sum(axis=1)
    assert (table.total - parts).tolist() == pytest.approx([0.7] * len(table))


def test_what_changes_it() -> None:
    weights = ak.made_up(layers=30)
    one = ak.memory_plan(weights).set_index("mode").loc["adamw, fp32 master"]
    many = ak.memory_plan(weights, processes=8).set_index("mode").loc["adamw, fp32 master"]
    assert many.weights == pytest.approx(one.weights / 8)
    assert many.activations == one.activations
    kept = ak.memory_plan(weights, resolution=512, checkpointing=False, batch=2).iloc[0]
    assert kept.activations == pytest.approx(2 * 378 * 30 / 1024, rel=0.02)
    everything = ak.memory_plan(weights, frozen="").set_index("mode").loc["adamw, fp32 master"]
    assert everything.weights == pytest.approx(4 * 6_154_908_736 / 2**30, rel=0.001)


def test_bad_input() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'refiner'"):
        ak.memory_plan(ak.made_up(layers=1), frozen="refinr")
    with pytest.raises(AlkahestError, match="must be positive"):
        ak.memory_plan(ak.made_up(layers=1), batch=0)
    for vram in (0, -24, float("nan")):
        with pytest.raises(AlkahestError, match="memory in GiB"):
            ak.memory_plan(ak.made_up(layers=1), vram=vram)

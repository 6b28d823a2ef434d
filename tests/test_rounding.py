from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import alkahest as ak
from alkahest.dtypes import FORMATS, Format
from alkahest.rounding import ULPS, share_below, ulp_counts


def ulp(weights: torch.Tensor, form: Format) -> torch.Tensor:
    """The distance between neighbouring numbers, by its definition, in float64."""
    _, exponent = torch.frexp(weights.double())  # w = m 2^e with m from 1/2 to 1
    exponent = torch.where(weights == 0, form.min_exponent, exponent - 1).clamp(min=form.min_exponent)
    return torch.ldexp(torch.ones(weights.shape, dtype=torch.float64), exponent - form.mantissa)


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp8_e4m3fn", "fp8_e5m2", "fp32"])
def test_counts_by_hand(name: str) -> None:
    torch.manual_seed(1)
    form = FORMATS[name]
    weights = (0.05 * torch.randn(5000)).to(form.torch).float()
    weights[:9] = torch.tensor([0.0, -0.0, 1.0, -2.0, 2.0**-14, 1e-8, 0.015625, 440.0, 3.0])
    delta = 0.001 * torch.randn(5000) * torch.exp(3 * torch.randn(5000))
    delta[10:20] = 0
    counts, energy = ulp_counts(delta, weights, form)
    sizes = (delta.double().abs() / ulp(weights, form)).numpy()
    bins = np.clip(np.searchsorted(ULPS, sizes, side="right") - 1, 0, len(ULPS) - 1)
    kept = sizes > 0
    assert counts.tolist() == np.bincount(bins[kept], minlength=len(ULPS)).tolist()
    expected = np.bincount(bins[kept], weights=delta.double().square().numpy()[kept], minlength=len(ULPS))
    assert energy == pytest.approx(expected, rel=1e-6)


def test_scaled_numbers_have_scaled_places() -> None:
    torch.manual_seed(2)
    stored, delta = torch.randn(700).to(torch.float8_e4m3fn).float(), torch.randn(700)
    plain = ulp_counts(delta, stored, FORMATS["fp8_e4m3fn"])
    scaled = ulp_counts(delta * 0.25, stored * 0.25, FORMATS["fp8_e4m3fn"], scale=0.25)
    assert plain[0].tolist() == scaled[0].tolist()
    assert scaled[1] == pytest.approx(plain[1] / 16)


def test_share_below() -> None:
    histogram = np.zeros(len(ULPS))
    assert np.isnan(share_below(histogram, 1.0))
    histogram[64] = histogram[68] = 10  # 1 to 1.25, and 2 to 2.5
    assert share_below(histogram, 1.0) == 0
    assert share_below(histogram, 1.125) == pytest.approx(0.25)
    assert share_below(histogram, 1.7) == pytest.approx(0.5)
    assert share_below(histogram, float("inf")) == 1


def test_predicted_absorption_is_the_exact_count(tmp_path: Path) -> None:
    base = tiny.state(seed=1)
    bridge = ak.open(tiny.write(tmp_path / "bridge.safetensors", tiny.native(tiny.state(seed=2))))
    v, b = (ak.open(tiny.write(tmp_path / f"{name}.safetensors", tiny.native(state), torch.float32)) for name, state in (("v", tiny.near(base, 0.002, seed=3)), ("b", base)))  # fmt: skip
    table = ak.delta_table(v - b, on=bridge)
    for k in (0.3, 1.0, 4.0, 20.0):
        found = ak.absorbed(table, k).set_index("tensor")
        lost, changed, gone, energy = 0, 0, 0.0, 0.0
        for row in table.itertuples():
            d, w = k * (v[row.tensor].double() - b[row.tensor].double()), bridge[row.tensor]
            same = ((w.double() + d).to(torch.bfloat16) == w) & (d != 0)
            lost, changed = lost + int(same.sum()), changed + int((d != 0).sum())
            gone, energy = gone + float(d[same].square().sum()), energy + float(d.square().sum())
            if row.elements > 5000:
                assert found.loc[row.tensor, "count"] == pytest.approx(float(same.sum() / (d != 0).sum()), abs=0.02)
        parts = ak.rolled_up(table.assign(module="all"), "module")
        whole = ak.absorbed(parts, k).iloc[0]
        assert whole["count"] == pytest.approx(lost / changed, abs=0.02)
        assert whole["energy"] == pytest.approx(gone / energy, abs=0.02)
    nothing = ak.delta_table((v - b).only("layers"), on=bridge)
    assert ak.absorbed(nothing).set_index("tensor").loc["x_pad_token", ["count", "energy"]].isna().all()

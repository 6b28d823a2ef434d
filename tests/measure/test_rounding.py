from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

import alkahest as ak
from alkahest.errors import AlgebraError
from alkahest.measure.rounding import ULPS, nearest_error, share_below, stochastic_error, ulp_counts
from alkahest.measure.rounding import ulp as ulp_of
from alkahest.model.dtypes import FORMATS, Format, encode, rounding_noise


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
    v, b = (
        ak.open(tiny.write(tmp_path / f"{name}.safetensors", tiny.native(state), torch.float32))
        for name, state in (("v", tiny.near(base, 0.002, seed=3)), ("b", base))
    )
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


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp8_e4m3fn"])
def test_the_unit_in_the_last_place(name: str) -> None:
    torch.manual_seed(3)
    form = FORMATS[name]
    weights = (0.05 * torch.randn(3000)).to(form.torch).float()
    weights[:4] = torch.tensor([0.0, 1.0, -2.0, 0.015625])
    assert torch.equal(ulp_of(weights, form).double(), ulp(weights, form))
    assert torch.equal(ulp_of(weights * 0.25, form, 0.25).double(), 0.25 * ulp(weights, form))


def test_the_noise_of_storing_weights() -> None:
    """bf16(W) - W has a root mean square of sqrt(mean(ulp^2 / 12))."""
    torch.manual_seed(4)
    weights = 0.02 * torch.randn(400_000)
    stored = weights.to(torch.bfloat16).float()
    found = (stored.double() - weights.double()).square().mean().sqrt()
    predicted = ulp_of(stored, FORMATS["bf16"]).double().square().div(12).mean().sqrt()
    assert float(found) == pytest.approx(float(predicted), rel=0.05)
    assert float(found / weights.double().square().mean().sqrt()) == pytest.approx(0.0017, rel=0.05)  # of the norm


@pytest.mark.parametrize("moves", [0.05, 0.2, 0.5, 0.8, 1.0, 1.3, 2.5, 4.0, 6.7, 8.0])
def test_the_closed_forms_are_what_rounding_does(moves: float) -> None:
    torch.manual_seed(5)
    fine = 0.02 * (1 + 0.3 * torch.rand(300_000))  # far from a power of two, so that ulp is one number
    unit = float(ulp_of(fine[:1], FORMATS["bf16"]))
    assert float(fine.max()) + 9 * unit < 0.03125

    def error(result: torch.Tensor, start: torch.Tensor) -> tuple[float, float]:
        off = (result.double() - start.double()) / unit - moves
        return float(off.square().mean()), float(off.mean())

    # Two roundings of finer weights: the mean is right, and the error is that of stochastic rounding.
    square, mean = error((fine + moves * unit).to(torch.bfloat16).float(), fine.to(torch.bfloat16).float())
    assert square == pytest.approx(float(stochastic_error(np.array(moves))), abs=0.005)
    assert mean == pytest.approx(0, abs=0.005)
    # Adding to stored weights: on the grid, every element makes the same error.
    stored = fine.to(torch.bfloat16).float()
    square, _ = error((stored + moves * unit).to(torch.bfloat16).float(), stored)
    assert square == pytest.approx(float(nearest_error(np.array(moves))), abs=1e-4)
    noise = rounding_noise(0, "a", 0, len(stored), torch.device("cpu"))
    square, mean = error(encode(stored + moves * unit, FORMATS["bf16"], noise).float(), stored)
    assert square == pytest.approx(float(stochastic_error(np.array(moves))), abs=0.005)
    assert mean == pytest.approx(0, abs=0.005)


def test_the_curve_is_what_merging_does(tmp_path: Path) -> None:
    base = tiny.state(seed=1)
    bridge = ak.open(tiny.write(tmp_path / "bridge.safetensors", tiny.native(tiny.state(seed=2))))
    v, b = (
        ak.open(tiny.write(tmp_path / f"{name}.safetensors", tiny.native(state), torch.float32))
        for name, state in (("v", tiny.near(base, 0.002, seed=3)), ("b", base))
    )
    curve = ak.rounding_curve(ak.delta_table(v - b, on=bridge), [0, 0.3, 1, 4, 20]).set_index("k")
    assert curve.loc[0, "size"] == 0
    assert curve.loc[0, "absorbed_energy"] == 1
    assert curve.noise_most.max() < 1e-4  # both ends are float32
    for k in (0.3, 1, 4, 20):
        for rounding, seed in (("nearest", 0), ("stochastic", 1)):
            merged = bridge + k * (v - b)
            merged.save(tmp_path / "out.safetensors", rounding=rounding, seed=seed)
            out = ak.open(tmp_path / "out.safetensors")
            wanted = torch.cat([k * (v[key].double() - b[key].double()).flatten() for key in b])
            got = torch.cat([out[key].double().flatten() - bridge[key].double().flatten() for key in b])
            kept, error = float(got @ wanted / wanted.square().sum()), float((got - wanted).norm() / wanted.norm())
            row = curve.loc[k]
            assert row["size"] == pytest.approx(
                float(wanted.norm() / torch.cat([bridge[key].double().flatten() for key in b]).norm()), rel=1e-5
            )
            assert kept == pytest.approx(row.nearest_kept if rounding == "nearest" else 1, abs=0.03)
            assert error == pytest.approx(row[f"{rounding}_error"], rel=0.05)
    assert len(ak.rounding_curve(ak.delta_table(v - b))) == 81


def test_file_noise_of_dense_and_of_rare_changes(tmp_path: Path) -> None:
    """Between its bounds lies what a bf16 file lost, of a delta that is known from float32 files."""
    fine = tiny.state(seed=1)
    stored = {key: value.to(torch.bfloat16).float() for key, value in fine.items()}
    for case, base, share in (
        ("on the grid", stored, 0.004),
        ("on the grid", stored, 0.02),
        ("off it", fine, 0.0005),
        ("off it", fine, 0.02),
    ):
        variant = tiny.near(base, share, seed=3)
        v, b = (
            ak.open(tiny.write(tmp_path / f"{name}.safetensors", tiny.native(state)))
            for name, state in (("v", variant), ("b", base))
        )
        table = ak.delta_table(v - b)
        bounds = ak.file_noise(table).set_index("tensor")
        for row in table.itertuples():
            if row.elements < 5000:
                continue
            true = variant[row.tensor].double() - base[row.tensor].double()
            found = v[row.tensor].double() - b[row.tensor].double()
            changed = found != 0
            # On the grid what stayed is a lost part of the delta, and no noise in it.
            off = (found - true)[changed] if case == "on the grid" else found - true
            share_of_noise = float(off.square().sum() / found.square().sum())
            least, most = bounds.loc[row.tensor, ["least", "most"]]
            assert least * 0.8 <= share_of_noise <= most * 1.1, (case, share, row.tensor)
            if case == "on the grid":
                assert share_of_noise == pytest.approx(least, rel=0.35)
            elif share < 0.001:
                assert share_of_noise == pytest.approx(most, rel=0.1)
    scaled = ak.file_noise(ak.delta_table(7 * (v - b), k=3))
    assert scaled["least"].to_numpy() == pytest.approx(ak.file_noise(ak.delta_table(v - b))["least"].to_numpy())


def test_file_noise_of_ends_in_different_dtypes(tmp_path: Path) -> None:
    fine = tiny.state(seed=1)
    small = tiny.near(fine, 0.0005, seed=3)

    def bounds(v: tuple[tiny.State, torch.dtype], b: tuple[tiny.State, torch.dtype]) -> pd.Series:
        made = [
            ak.open(tiny.write(tmp_path / f"{name}.safetensors", tiny.native(state), dtype))
            for name, (state, dtype) in (("v", v), ("b", b))
        ]
        whole = ak.delta_table(made[0] - made[1])
        whole = whole[whole.elements > 5000].assign(part="all")
        return ak.file_noise(ak.rolled_up(whole)).iloc[0]

    # A base that was only rounded makes a delta of nothing but noise, in either direction.
    only = bounds((fine, torch.float32), (fine, torch.bfloat16))
    assert only.least < 1e-6
    assert only.most == pytest.approx(1, abs=0.02)
    quantised = bounds((fine, torch.float8_e4m3fn), (fine, torch.bfloat16))
    assert quantised.least == pytest.approx(1, abs=0.06)
    # A small change in float32 files has none, though the base lies on a coarse grid.
    stored = {key: value.to(torch.bfloat16).float() for key, value in fine.items()}
    clean = bounds(
        ({key: stored[key] + small[key] - fine[key] for key in fine}, torch.float32), (stored, torch.bfloat16)
    )
    assert clean.most < 1e-5


@pytest.mark.parametrize(
    "ask",
    [
        lambda table: ak.absorbed(table, k=float("nan")),
        lambda table: ak.absorbed(table, k="20"),
        lambda table: ak.absorbed(table[["tensor"]]),
        lambda table: ak.absorbed({"ulps": []}),
        lambda table: ak.rounding_curve(table, ks=[]),
        lambda table: ak.rounding_curve(table, ks=[1, float("inf")]),
        lambda table: ak.rounding_curve(table[["ulps", "ulp_energy"]]),
        lambda table: ak.file_noise(table[["tensor"]]),
        lambda table: ak.rolled_up(table, by=[]),
        lambda table: ak.rolled_up(table[["part"]]),
    ],
)
def test_other_tables_and_numbers_are_refused(ask: Callable[[Any], Any], trio: dict[str, Path]) -> None:
    table = ak.delta_table(ak.open(trio["variant"]) - ak.open(trio["base"]))
    with pytest.raises(AlgebraError, match=r"table of ak.delta_table|number|multipliers|nothing to add up"):
        ask(table)

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import alkahest as ak
from alkahest.engine.loops import RUN
from alkahest.errors import AlgebraError, MismatchError, NonFiniteError, UnknownNameError, UnsupportedError
from alkahest.measure.rounding import ULPS
from alkahest.measure.table import COLUMNS, stream_delta_table
from alkahest.measure.tally import sum_of_squares

module = sys.modules["alkahest.measure.table"]  # the package's attribute of that name is the function
LAYER = "layers.1.feed_forward.w2.weight"
VECTORS = ("ulps", "ulp_energy")


@pytest.fixture(autouse=True, params=["torch", "compiled"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with and without the compiled loops, which models of real size get."""
    monkeypatch.setattr(module, "_COMPILED", 0 if request.param == "compiled" else math.inf)
    return str(request.param)


def numbers(checkpoint: ak.Checkpoint) -> tiny.State:
    return {key: checkpoint[key].double() for key in checkpoint}


def check_against_float64(table: pd.DataFrame, variant: tiny.State, base: tiny.State, k: float = 1.0) -> None:
    assert list(table.columns) == list(COLUMNS)
    assert list(table.tensor) == list(base)
    for row in table.itertuples():
        v, b = variant[row.tensor], base[row.tensor]
        d = k * (v - b)
        expected = {
            "variant_norm": v.norm(),
            "base_norm": b.norm(),
            "on_norm": b.norm(),
            "delta_norm": d.norm(),
            "rms": d.square().mean().sqrt(),
            "relative": d.norm() / b.norm(),
            "largest": d.abs().max(),
            "cosine": (v * b).sum() / (v.norm() * b.norm()),
            "changed": (d != 0).double().mean(),
        }
        for name, value in expected.items():
            assert getattr(row, name) == pytest.approx(float(value), rel=1e-6, abs=1e-12), (row.tensor, name)
        assert row.shape == tuple(v.shape)
        assert row.elements == v.numel()


@pytest.mark.parametrize("form", ["bf16", "fp16", "fp32", "fp8", "comfy_quant", "scaled_fp8", "header", "diffusers"])
def test_the_table_is_the_float64_reference(form: str, tmp_path: Path) -> None:
    base, path = tiny.state(seed=1), tmp_path / "base.safetensors"
    plain = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}
    if form in plain:
        tiny.write(path, tiny.native(base), plain[form])
    elif form == "diffusers":
        tiny.write(path, base)
    else:
        tiny.write_scaled(path, tiny.native(base), form)
    variant = tiny.write(tmp_path / "variant.safetensors", tiny.native(tiny.near(base, 0.02, seed=3)))
    v, b = ak.open(variant), ak.open(path)
    check_against_float64(ak.delta_table(v - b), numbers(v), numbers(b))
    check_against_float64(ak.delta_table(v - b, k=-7.5, threads=3), numbers(v), numbers(b), -7.5)


def test_parts_blocks_and_modules(trio: dict[str, Path]) -> None:
    table = ak.delta_table(ak.open(trio["variant"]) - ak.open(trio["base"])).set_index("tensor")
    assert tuple(table.loc[LAYER, ["part", "block", "module"]]) == ("layers", 1, "feed_forward.w2")
    assert tuple(table.loc["noise_refiner.0.attention.norm_q.weight", ["part", "block", "module"]]) == (
        "noise_refiner",
        0,
        "attention.norm_q",
    )
    assert tuple(table.loc["x_pad_token", ["part", "block", "module"]]) == ("embedders", -1, "x_pad_token")
    assert set(table.part) == {"embedders", "noise_refiner", "context_refiner", "layers", "final"}
    assert set(table.variant_storage) == set(table.base_storage) == {"bf16"}


def test_a_planted_change_shows_in_one_row(trio: dict[str, Path], tmp_path: Path) -> None:
    state = load_file(trio["base"])
    name = "layers.1.feed_forward.w2.weight"
    state[name][3, 5] = 2.0
    save_file(state, tmp_path / "planted.safetensors")
    base = ak.open(trio["base"])
    table = ak.delta_table(ak.open(tmp_path / "planted.safetensors") - base)
    touched = table[table.delta_norm > 0]
    assert list(touched.tensor) == [LAYER]
    row = touched.iloc[0]
    change = float(2.0 - base[LAYER][3, 5].double())
    assert row.largest == pytest.approx(change, rel=1e-7)
    assert row.delta_norm == pytest.approx(change, rel=1e-6)
    assert row.changed == 1 / row.elements
    assert sum(row.ulps) == 1
    assert sum(row.ulp_energy) == pytest.approx(change**2, rel=1e-6)
    assert (table[table.tensor != LAYER].cosine - 1).abs().max() < 1e-9


def test_identical_models_differ_by_nothing(trio: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(trio["base"].read_bytes())
    base = ak.open(trio["base"])
    for table in (ak.delta_table(ak.open(copy) - base), ak.delta_table(base - ak.open(trio["base"]))):
        assert (table.delta_norm == 0).all()
        assert (table.relative == 0).all()
        assert (table.changed == 0).all()
        assert table.cosine.to_numpy() == pytest.approx(1.0)
        assert not np.stack(table.ulps).any()


def test_masks_factors_and_other_weights(trio: dict[str, Path]) -> None:
    bridge, variant, base = (ak.open(trio[name]) for name in ("bridge", "variant", "base"))
    table = ak.delta_table(3 * (variant - base).only("layers"), on=bridge).set_index("tensor")
    assert (table[table.part != "layers"].delta_norm == 0).all()
    row = table.loc[LAYER]
    v, b, w = (model[LAYER].double() for model in (variant, base, bridge))
    assert row.relative == pytest.approx(float(3 * (v - b).norm() / w.norm()), rel=1e-6)
    assert row.cosine == pytest.approx(float((v * b).sum() / (v.norm() * b.norm())), rel=1e-6)
    assert row.base_norm == pytest.approx(float(b.norm()), rel=1e-6)
    both = ak.delta_table((variant - base) + (bridge - base)).set_index("tensor").loc[LAYER]
    assert both.delta_norm == pytest.approx(float((v - b + w - b).norm()), rel=1e-6)
    assert all(math.isnan(both[name]) for name in ("variant_norm", "base_norm", "on_norm", "relative", "cosine"))
    assert sum(both.ulps) == 0


def test_sums_are_exact_at_any_size() -> None:
    torch.manual_seed(0)
    for size, scale in ((7, 1.0), (4096 * 3 + 5, 1e-3), (50_000, 1e25), (50_000, 1e-25), (300, 0.0)):
        values = scale * torch.randn(size)
        assert sum_of_squares(values) == pytest.approx(float(values.double().square().sum()), rel=1e-6)


def test_samples_stand_for_all(trio: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, variant, base = (ak.open(trio[name]) for name in ("bridge", "variant", "base"))
    monkeypatch.setattr(module, "_SAMPLED", 4000)
    tables = []
    for limit in (0, math.inf):
        monkeypatch.setattr(module, "_COMPILED", limit)
        tables.append(ak.delta_table(variant - base, on=bridge, k=1 + 1e-9 * (limit > 0)).set_index("tensor"))
    compiled, torched = tables
    every = ak.delta_table(variant - base, on=bridge, exact=True).set_index("tensor")
    for key in every.index:
        assert (compiled.loc[key, "ulps"] == torched.loc[key, "ulps"]).all()
        assert compiled.loc[key, "ulp_energy"] == pytest.approx(torched.loc[key, "ulp_energy"], rel=1e-6)
        for name in (
            "variant_norm",
            "base_norm",
            "on_norm",
            "distance",
            "delta_norm",
            "cosine",
            "step",
            "base_step",
            "hidden",
        ):
            assert compiled.loc[key, name] == pytest.approx(torched.loc[key, name], rel=1e-6, nan_ok=True), (key, name)
        for name in ("largest", "changed"):
            assert compiled.loc[key, name] == pytest.approx(every.loc[key, name], rel=1e-7)
    large = compiled.loc[LAYER]
    assert sum(large.ulps) == pytest.approx(large.changed * large.elements, rel=0.1)
    assert (large.ulps != every.loc[LAYER, "ulps"]).any()
    # The runs that are taken start at every sixteenth column in turn.
    taken = np.arange(large.elements).reshape(-1, RUN)[:: module._stride(large["shape"])].ravel()
    assert len(np.unique(taken % large["shape"][1])) == large["shape"][1]


def test_numbers_too_large_or_small_for_float32_squares(trio: dict[str, Path], tmp_path: Path) -> None:
    for scale in (1e25, 1e-25, 0.0):
        base = {key: scale * value for key, value in tiny.state(seed=1).items()}
        variant = {key: scale * value for key, value in tiny.near(tiny.state(seed=1), 0.02, seed=3).items()}
        v, b = (
            ak.open(tiny.write(tmp_path / f"{name}.safetensors", tiny.native(state)))
            for name, state in (("v", variant), ("b", base))
        )
        table = ak.delta_table(v - b).set_index("tensor")
        for key in b:
            assert table.loc[key, "delta_norm"] == pytest.approx(
                float((v[key].double() - b[key].double()).norm()), rel=1e-6
            )


def test_rolled_up(trio: dict[str, Path]) -> None:
    variant, base = ak.open(trio["variant"]), ak.open(trio["base"])
    table = ak.delta_table(variant - base)
    for by in ("part", ["part", "block"], "module"):
        rolled = ak.rolled_up(table, by)
        names = [by] if isinstance(by, str) else by
        for group, rows in table.groupby(names, sort=False):
            found = rolled[(rolled[names] == list(group)).all(axis=1)].iloc[0]
            v, b = (torch.cat([model[key].double().flatten() for key in rows.tensor]) for model in (variant, base))
            assert found.delta_norm == pytest.approx(float((v - b).norm()), rel=1e-6)
            assert found.relative == pytest.approx(float((v - b).norm() / b.norm()), rel=1e-6)
            assert found.cosine == pytest.approx(float((v * b).sum() / (v.norm() * b.norm())), rel=1e-6)
            assert found.changed == pytest.approx(float((v != b).double().mean()), rel=1e-6)
            assert (found.tensors, found.elements) == (len(rows), v.numel())
            assert sum(found.ulps) == int((v != b).sum())
    with pytest.raises(UnknownNameError, match="no such grouping"):
        ak.rolled_up(table, "layer")


def test_it_is_a_generator_of_events(trio: dict[str, Path]) -> None:
    events = list(stream_delta_table(ak.open(trio["variant"]) - ak.open(trio["base"])))
    assert events[-1].done == events[-1].total == 2 * (sum(t.nbytes for t in load_file(trio["base"]).values()))
    assert [event.result is None for event in events] == [True] * (len(events) - 1) + [False]


def test_bad_input(trio: dict[str, Path], tmp_path: Path) -> None:
    variant, base = ak.open(trio["variant"]), ak.open(trio["base"])
    with pytest.raises(AlgebraError, match="a delta is needed"):
        ak.delta_table(base)  # type: ignore[arg-type]
    deeper = ak.open(tiny.write(tmp_path / "deeper.safetensors", tiny.native(tiny.state(layers=3))))
    with pytest.raises(MismatchError, match="different depths"):
        ak.delta_table(variant - base, on=deeper)
    with pytest.raises(UnsupportedError, match="no last place"):
        ak.delta_table(variant - base, dtype="comfy_quant")
    state = load_file(trio["variant"])
    state[LAYER][0, 0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(NonFiniteError, match=r"(?s)delta_table: an input holds NaN.*nan\.safetensors"):
        ak.delta_table(ak.open(tmp_path / "nan.safetensors") - base)


def test_bins_are_quarter_octaves() -> None:
    assert len(ULPS) == 128
    assert (np.diff(ULPS) > 0).all()
    assert ULPS[64:69].tolist() == [1, 1.25, 1.5, 1.75, 2]


def test_distances_steps_and_what_rounding_may_hide(tmp_path: Path) -> None:
    base = {key: value.to(torch.bfloat16).float() for key, value in tiny.state(seed=1).items()}
    variant = dict(base)
    variant[LAYER] = base[LAYER].clone()
    variant[LAYER][5:9] *= 1.5
    bridge = tiny.state(seed=2)
    v, b, w = (
        ak.open(tiny.write(tmp_path / f"{name}.safetensors", tiny.native(state)))
        for name, state in (("v", variant), ("b", base), ("w", bridge))
    )
    assert ak.delta_table(v - b).distance.isna().all()  # the base itself
    table = ak.delta_table(-3 * (v - b), on=w.protect("refiner"), k=2).set_index("tensor")
    for key in b:
        assert table.loc[key, "distance"] == pytest.approx(float((w[key].double() - b[key].double()).norm()), rel=1e-6)
        if key != LAYER:
            assert table.loc[key, "hidden"] == 0
            assert np.isnan(table.loc[key, "step"])
    units = [
        torch.ldexp(torch.ones_like(x), torch.frexp(x)[1] - 8).square() for x in (v[LAYER].double(), b[LAYER].double())
    ]
    changed = v[LAYER] != b[LAYER]
    for column, unit in zip(("step", "base_step"), units, strict=True):
        assert table.loc[LAYER, column] == pytest.approx(6 * float(unit[changed].mean().sqrt()), rel=1e-6)
    assert table.loc[LAYER, "hidden"] == pytest.approx(6 * float(units[0][~changed].sum().div(12).sqrt()), rel=1e-6)
    parts = ak.rolled_up(table.reset_index()).set_index("part")
    assert parts.loc["layers", "hidden"] == pytest.approx(table.loc[LAYER, "hidden"])
    assert parts.loc["layers", "step"] == pytest.approx(table.loc[LAYER, "step"])


def test_a_group_s_rms_is_that_of_all_its_elements(trio: dict[str, Path]) -> None:
    variant, base = ak.open(trio["variant"]), ak.open(trio["base"])
    rows = ak.rolled_up(ak.delta_table(variant - base)).set_index("part")
    for part in ("layers", "final"):
        keys = [key for key in base if base.family.part_of(key).split(".")[0] == part]
        every = torch.cat([(variant[key].double() - base[key].double()).flatten() for key in keys])
        assert rows.rms[part] == pytest.approx(float(every.square().mean().sqrt()), rel=1e-5)
        assert rows.elements[part] == len(every)

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import alkahest as ak
from alkahest.errors import AlgebraError, MismatchError, UnknownNameError
from alkahest.measure.multiplier import auto_multiplied, factors


def opened(folder: Path, name: str, values: tiny.State, dtype: torch.dtype = torch.float32) -> ak.Checkpoint:
    return ak.open(tiny.write(folder / f"{name}.safetensors", tiny.native(values), dtype))


def on_grid(values: tiny.State) -> tiny.State:
    return {key: value.to(torch.bfloat16).float() for key, value in values.items()}


@pytest.fixture
def planted(tmp_path: Path) -> dict[str, Any]:
    """A delta that is 1/171.1 of a reference, exactly, and as it survives in a bf16 file."""
    base = on_grid(tiny.state(seed=1))
    reference = tiny.near(base, 0.02, seed=3)
    weak = {key: base[key] + (reference[key] - base[key]) / 171.1 for key in base}
    return {
        "base": opened(tmp_path, "base", base),
        "reference": opened(tmp_path, "reference", reference),
        "weak": opened(tmp_path, "weak", weak),
        "weak_bf16": opened(tmp_path, "weak_bf16", weak, torch.bfloat16),
        "bridge": opened(tmp_path, "bridge", tiny.state(seed=2), torch.bfloat16).protect("refiner"),
    }


def test_a_delta_planted_at_a_171st_is_found(planted: dict[str, Any]) -> None:
    weak, reference = planted["weak"] - planted["base"], planted["reference"] - planted["base"]
    k = ak.needed_multiplier(weak, on=planted["bridge"], basis="reference", reference=reference)
    assert k == pytest.approx(171.1, rel=1e-3)
    assert k.range == pytest.approx((k, k), rel=1e-3)  # float32 files hide nothing
    assert k.factors == pytest.approx((10.0, 17.11), rel=1e-3)
    assert repr(k).startswith("Multiplier 171.1 = subtract 10 x add 17.11\n  basis reference: 1 |reference| / |d| = ")
    assert "past 10.0, where ComfyUI's ModelMergeSubtract stops: subtract at 10, add at 17.11" in k.warnings
    assert not any("practical limit" in warning for warning in k.warnings)


def test_what_storing_the_planted_variant_in_bf16_does_is_said(planted: dict[str, Any]) -> None:
    weak, reference = planted["weak_bf16"] - planted["base"], planted["reference"] - planted["base"]
    k = ak.needed_multiplier(weak, on=planted["bridge"], basis="reference", reference=reference)
    assert abs(k / 171.1 - 1) > 0.1  # spoilt
    low, high = k.range
    assert low < 171.1 < high
    assert f"k may be anything from {low:.4g} to {high:.4g}" in "\n".join(k.warnings)
    assert any("the file's own rounding becomes noise of" in warning for warning in k.warnings)


def test_every_basis_by_hand(planted: dict[str, Any]) -> None:
    v, b, w = (planted[name] for name in ("weak", "base", "bridge"))
    k = ak.needed_multiplier(v - b, on=w)
    keys = [key for key in b if len(b.shapes[key]) == 2 and "refiner" not in key and min(b.shapes[key]) > 1]
    d, on, start = (
        torch.cat([source(key).double().flatten() for key in keys])
        for source in (lambda key: v[key].double() - b[key].double(), lambda key: w.leading[key], lambda key: b[key])
    )
    assert k == pytest.approx(float(0.02 * on.norm() / d.norm()), rel=1e-6)
    assert k.bases["bridge"] == pytest.approx(float((on - start).norm() / d.norm()), rel=1e-6)
    assert math.isnan(k.bases["reference"])
    survival = ak.needed_multiplier(v - b, on=w, basis="survival", target=0.7)
    moved = (on + survival.value * d).to(torch.bfloat16).double() != on
    assert float(d[moved].square().sum() / d.square().sum()) == pytest.approx(0.7, abs=0.02)
    assert k.bases["survival"] == pytest.approx(ak.needed_multiplier(v - b, on=w, basis="survival", target=0.9).value)
    # In fp8 much more is rounded away.
    assert ak.needed_multiplier(v - b, on=w, basis="survival", dtype="fp8").value > 5 * survival
    layers = k.per_part.set_index("part").loc["layers"]
    mine = [key for key in keys if key.startswith("layers.")]
    assert layers.matrices == len(mine)
    size = torch.cat([(v[key].double() - b[key].double()).flatten() for key in mine]).norm()
    assert layers.delta_norm == pytest.approx(float(size), rel=1e-6)
    assert layers.relative_at_k == pytest.approx(
        float(k.value * size / torch.cat([w.leading[key].double().flatten() for key in mine]).norm()), rel=1e-5
    )
    assert set(k.per_part.part) == {"embedders", "layers", "final"}  # the refiners are protected


@pytest.mark.parametrize("c", [0.01, 3, -2.5])
def test_scaling_a_delta_by_c_scales_the_multiplier_by_one_over_c(c: float, planted: dict[str, Any]) -> None:
    delta, w = planted["reference"] - planted["base"], planted["bridge"]
    for basis in ("relative", "survival", "bridge"):
        once, scaled = (ak.needed_multiplier(one, on=w, basis=basis) for one in (delta, c * delta))
        assert scaled == pytest.approx(once / abs(c), rel=0.03 if basis == "survival" else 1e-6)


def test_protection_counts_and_everywhere_lifts_it(planted: dict[str, Any]) -> None:
    v, b, w = planted["reference"], planted["base"], planted["bridge"]
    everywhere = ak.needed_multiplier((v - b).everywhere(), on=w)
    assert "noise_refiner" in set(everywhere.per_part.part)
    with pytest.raises(MismatchError, match="every matrix is protected"):
        ak.needed_multiplier(v - b, on=w.leading.protect("all"))
    # Without a bridge the delta goes back to its base.
    assert "noise_refiner" in set(ak.needed_multiplier(v - b).per_part.part)
    only = ak.needed_multiplier((v - b).only("layers.0"), on=w)
    assert any("matrices are untouched" in warning for warning in only.warnings)


def test_it_is_a_number(planted: dict[str, Any]) -> None:
    v, b, w = planted["weak"], planted["base"], planted["bridge"]
    k = ak.needed_multiplier(v - b, on=w)
    assert isinstance(k, float)
    assert (w + k * (v - b)).text() == (w + k.value * (v - b)).text()
    assert ak.param("k", k).value == k.value
    assert (w + ak.param("k", 1) * (v - b)).bind(k=k).params == {"k": k.value}
    assert f"{k:.3f}" == f"{k.value:.3f}"
    assert k.value is not k
    for again in (copy.copy(k), pickle.loads(pickle.dumps(k))):
        assert (again.value, again.basis, again.warnings) == (k.value, k.basis, k.warnings)
    assert "<table" in k._repr_html_()
    assert "subtract 10 x add" in k._repr_html_()


def test_factors() -> None:
    assert factors(171.1) == (10.0, pytest.approx(17.11))
    assert factors(4.5) == (4.5, 1.0)
    assert factors(10) == (10.0, 1.0)
    assert factors(-30) == (-10.0, 3.0)
    assert factors(0.0) == (0.0, 1.0)


def test_warnings_for_large_multipliers_and_a_changed_refiner(planted: dict[str, Any]) -> None:
    b = planted["base"]
    tiny_delta = (planted["weak"] - b) / 100
    words = "\n".join(ak.needed_multiplier(tiny_delta, on=planted["bridge"]).warnings)
    assert "is past 20 on the adding side, the article's practical limit" in words
    far = 8 * (planted["reference"] - b)
    assert "not importable: the variant's refiner moved by" not in words
    model = {name: ak.mini.load(name) for name in ("base", "base-refiner-trained")}
    words = "\n".join(ak.needed_multiplier(model["base-refiner-trained"] - model["base"]).warnings)
    assert "not importable: the variant's refiner moved by 27.7 %" in words
    assert ak.needed_multiplier(far, on=planted["bridge"]) < 1


def test_the_place_of_k_in_an_expression(planted: dict[str, Any]) -> None:
    v, b, w, r = (planted[name] for name in ("weak", "base", "bridge", "reference"))
    k = ak.param("k", 1.0)
    for expression, expected in (
        (w + k * (v - b), v - b),
        (ak.lerp(w + k * (v - b).only("layers"), w + 3 * (r - b), 0.5), (v - b).only("layers")),
        (w + ((r - b) - k * (2 * (v - b))), -2 * (v - b)),
    ):
        delta, on = auto_multiplied(expression)
        assert on is w
        found = ak.needed_multiplier(delta, on=on)
        assert found == pytest.approx(ak.needed_multiplier(expected, on=w).value)
    for expression in (w + (v - b), ak.lerp(w, v, k), (w + k * (v - b)) + k * (r - b)):
        with pytest.raises(AlgebraError, match="must multiply one delta that is added to a model"):
            auto_multiplied(expression)


def test_bad_input(planted: dict[str, Any], tmp_path: Path) -> None:
    v, b, w = planted["weak"], planted["base"], planted["bridge"]
    with pytest.raises(AlgebraError, match="the delta is exactly zero"):
        ak.needed_multiplier(b - b, on=w)
    with pytest.raises(AlgebraError, match="zero in every matrix that is not protected"):
        ak.needed_multiplier(
            (v - b).only("refiner").everywhere() - (v - b).only("refiner").everywhere() + (v - b).only("pad_tokens"),
            on=w,
        )
    with pytest.raises(UnknownNameError, match="did you mean 'relative'"):
        ak.needed_multiplier(v - b, basis="relativ")
    with pytest.raises(AlgebraError, match="compares with a delta that is known to work"):
        ak.needed_multiplier(v - b, basis="reference")
    for basis, target in (("relative", 0), ("relative", math.nan), ("survival", 1.0)):
        with pytest.raises(AlgebraError, match="the target is out of range"):
            ak.needed_multiplier(v - b, basis=basis, target=target)
    with pytest.raises(AlgebraError, match="a checkpoint is no difference"):
        ak.needed_multiplier(v)
    with pytest.raises(AlgebraError, match="on= is the model"):
        ak.needed_multiplier(v - b, on=v - b)
    with pytest.raises(AlgebraError, match="'bridge' says nothing here"):
        ak.needed_multiplier(v - b, basis="bridge")
    zero = opened(tmp_path, "zero", {key: torch.zeros_like(value) for key, value in tiny.state(seed=1).items()})
    with pytest.raises(AlgebraError, match="norm zero"):
        ak.needed_multiplier(v - b, on=zero)
    with pytest.raises(AlgebraError, match="norm zero"):
        ak.needed_multiplier(v - zero)

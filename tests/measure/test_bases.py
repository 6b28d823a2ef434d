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
    assert "not if it means the adding side, 17.11 here" in "\n".join(k.warnings)


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
        assert scaled.bases[basis] == pytest.approx(
            once.bases[basis] / abs(c), rel=0.03 if basis == "survival" else 1e-6
        )


def test_protection_counts_and_everywhere_lifts_it(planted: dict[str, Any]) -> None:
    v, b, w = planted["reference"], planted["base"], planted["bridge"]
    everywhere = ak.needed_multiplier((v - b).everywhere(), on=w)
    assert "noise_refiner" in set(everywhere.per_part.part)
    with pytest.raises(MismatchError, match="every matrix is protected"):
        ak.needed_multiplier(v - b, on=w.leading.protect("all"))
    # Without a bridge the delta goes back to its base.
    assert "noise_refiner" in set(ak.needed_multiplier(v - b).per_part.part)
    only = ak.needed_multiplier((v - b).only("layers.0"), on=w)
    assert "unprotected matrices that the delta changes (and not " in only.formula


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


def test_warnings_for_large_multipliers_and_a_changed_refiner(planted: dict[str, Any]) -> None:
    b = planted["base"]
    tiny_delta = (planted["weak"] - b) / 100
    words = "\n".join(ak.needed_multiplier(tiny_delta, on=planted["bridge"]).warnings)
    assert "past the article's 'practically 20x' in both readings" in words
    far = 8 * (planted["reference"] - b)
    assert "not importable: the variant's refiner moved by" not in words
    model = {name: ak.mini.load(name) for name in ("base", "base-refiner-trained")}
    words = "\n".join(ak.needed_multiplier(model["base-refiner-trained"] - model["base"]).warnings)
    assert "not importable: the variant's refiner moved by 27.7 %" in words
    assert ak.needed_multiplier(far, on=planted["bridge"]).bases["relative"] < 1


def test_bad_input(planted: dict[str, Any], tmp_path: Path) -> None:
    v, b, w = planted["weak"], planted["base"], planted["bridge"]
    with pytest.raises(AlgebraError, match="the delta is exactly zero"):
        ak.needed_multiplier(b - b, on=w)
    same = opened(tmp_path, "same", {**tiny.state(seed=1)})
    moved = opened(tmp_path, "moved", {**tiny.state(seed=1), "layers.0.ffn_norm1.weight": torch.full((96,), 2.0)})
    with pytest.raises(AlgebraError, match="what it is limited to is the same in variant and base") as told:
        ak.needed_multiplier((moved - same).only("layers.1"), on=w)
    assert "they differ in layers" in str(told.value)
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


def test_a_delta_longer_than_the_basis_asks_for_is_told_to_start_at_one() -> None:
    names = ("turbo-variant", "deturbo", "base-variant", "base", "tb1")
    model = {name: ak.mini.load(name) for name in names}
    bridge = model["tb1"].protect("refiner")
    for variant, base, by_norm in (("turbo-variant", "deturbo", 0.301), ("base-variant", "base", 0.353)):
        k = ak.needed_multiplier(model[variant] - model[base], on=bridge)
        assert k == 1
        assert k.bases["relative"] == pytest.approx(by_norm, abs=0.001)
        first, _, rest = repr(k).partition("\n")
        assert first == "Multiplier 1 = subtract 1 x add 1"
        assert "the delta is longer than the basis asks for" in rest
        assert "so the basis says nothing: start at 1, or let pictures say: basis='pictures'" in rest
        # Asked for in so many words it is given, and the same is said.
        small = ak.needed_multiplier(model[variant] - model[base], on=bridge, target=0.02)
        assert small == pytest.approx(by_norm, abs=0.001)
        assert "longer than the basis asks for" in small.warnings[0]
        assert (k.per_part.k >= 1).all()


def test_survival_below_one_says_nothing_either(planted: dict[str, Any]) -> None:
    far = 8 * (planted["reference"] - planted["base"])
    k = ak.needed_multiplier(far, on=planted["bridge"], basis="survival")
    assert k == 1
    assert k.bases["survival"] < 1
    assert "at k = 1 more than 90 % outlives rounding already" in k.warnings[0]


def test_the_norm_is_over_what_the_delta_changes(tmp_path: Path) -> None:
    """A 2 % delta of the layers is told about 1, whatever else the model holds."""
    base = tiny.state(seed=1)
    moved = tiny.near(base, 0.02, seed=3)
    variant = {key: moved[key] if key.startswith("layers.") else value for key, value in base.items()}
    v, b = opened(tmp_path, "v", variant), opened(tmp_path, "b", base)
    keys = [key for key in b if key.startswith("layers.") and len(b.shapes[key]) == 2]
    k = ak.needed_multiplier(v - b)
    weights = torch.cat([b[key].double().flatten() for key in keys]).norm()
    size = torch.cat([(v[key].double() - b[key].double()).flatten() for key in keys]).norm()
    assert k.bases["relative"] == pytest.approx(float(0.02 * weights / size), rel=1e-5)
    assert k.bases["relative"] == pytest.approx(1, abs=0.03)
    assert f"over the {len(keys)} unprotected matrices that the delta changes (and not " in k.formula
    assert "untouched" in k.formula


def test_one_matrix_alone_is_not_moved_by_what_others_hold(tmp_path: Path) -> None:
    key = "layers.1.attention.to_k.weight"
    base = tiny.state(seed=1)
    variant = {**base, key: tiny.near(base, 0.05, seed=3)[key]}
    k = ak.needed_multiplier(opened(tmp_path, "v", variant) - opened(tmp_path, "b", base))
    assert k == 1  # 3.3 where the untouched counted, which moved this matrix by 16 %
    assert k.bases["relative"] == pytest.approx(0.4, abs=0.02)
    layers = k.per_part.set_index("part").loc["layers"]
    assert (layers.top_block, layers.top_block_energy, layers.changed) == (1, 1.0, 1)
    assert layers.largest_at_k == pytest.approx(0.05, abs=0.003)
    words = "\n".join(k.warnings)
    assert "100 % of the delta's energy is in layers.1" in words
    larger = 20 * (opened(tmp_path, "v", variant) - opened(tmp_path, "b", base))
    assert f"at this k {key} moves by 10" in "\n".join(ak.needed_multiplier(larger).warnings)


def test_a_delta_of_low_rank_is_not_told_the_same_as_noise_of_its_norm(tmp_path: Path) -> None:
    base = tiny.state(seed=1)
    torch.manual_seed(5)
    noise, low = dict(base), dict(base)
    for key, value in base.items():
        if key.startswith("layers.") and value.dim() == 2 and min(value.shape) > 8:
            rows, columns = value.shape
            dense, few = torch.randn(rows, columns), torch.randn(rows, 4) @ torch.randn(4, columns)
            noise[key], low[key] = (value + 0.003 * value.norm() * one / one.norm() for one in (dense, few))
    b = opened(tmp_path, "b", base)
    dense_k, low_k = (ak.needed_multiplier(opened(tmp_path, name, v) - b) for name, v in (("n", noise), ("l", low)))
    assert float(dense_k) == pytest.approx(float(low_k), rel=1e-3)  # the norms are the same
    assert dense_k.spectra is not None
    assert low_k.spectra is not None
    assert (low_k.spectra.stable_rank <= 4).all()
    assert (dense_k.spectra.stable_rank > 8).all()
    assert any("goes along few directions (stable rank" in line for line in low_k.warnings)
    assert not any("few directions" in line for line in dense_k.warnings)
    assert any("as dense as noise" in line for line in dense_k.warnings)


@pytest.mark.parametrize(
    ("dtype", "base_dtype"),
    [
        (torch.float8_e4m3fn, torch.float32),
        (torch.float8_e5m2, torch.bfloat16),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_nothing_but_rounding_is_said(dtype: torch.dtype, base_dtype: torch.dtype, tmp_path: Path) -> None:
    base = {key: value.to(base_dtype).float() for key, value in tiny.state(seed=1).items()}
    b = opened(tmp_path, "b", base, base_dtype)
    k = ak.needed_multiplier(opened(tmp_path, "v", base, dtype) - b, on=b.protect("refiner"))
    assert k == 1
    assert k.range[1] == math.inf
    assert k.warnings[0].startswith("nothing but rounding: where variant and base differ the variant is the base")
    assert (k.per_part.k == 1).all()
    assert set(k.per_part.why) <= {"nothing but rounding", "untouched"}
    # One weight moved by more than that is a change.
    key = "layers.0.feed_forward.w1.weight"
    moved = base[key].clone()
    moved[0, 0] += 8 * moved.abs().max()
    changed = ak.needed_multiplier(opened(tmp_path, "w", {**base, key: moved}, dtype) - b)
    assert not any("nothing but rounding:" in line for line in changed.warnings)
    assert changed.table.set_index("tensor").rounded[key] == 0


@pytest.mark.parametrize("form", ["comfy_quant", "scaled_fp8"])
def test_nothing_but_rounding_in_scaled_forms(form: str, tmp_path: Path) -> None:
    b = opened(tmp_path, "b", on_grid(tiny.state(seed=1)), torch.bfloat16)
    v = ak.open(b.save(tmp_path / "v.safetensors", dtype=form).path)
    k = ak.needed_multiplier(v - b)
    assert (float(k), k.range[1]) == (1, math.inf)
    assert k.warnings[0].startswith("nothing but rounding")


def test_parts_without_a_signal_get_one_and_say_why(tmp_path: Path) -> None:
    """An fp16 variant of a bf16 base: outside of the layers only what fp16 cannot hold differs."""
    base = on_grid(tiny.state(seed=1))
    first = next(key for key in base if "x_embedder" in key and key.endswith("weight"))
    base[first] = base[first].clone()
    base[first].view(-1)[0] = 2.0**-30  # below what fp16 can hold
    moved = tiny.near(base, 0.004, seed=3)
    variant = {key: moved[key] if key.startswith("layers.") else value for key, value in base.items()}
    v, b = opened(tmp_path, "v", variant, torch.float16), opened(tmp_path, "b", base, torch.bfloat16)
    k = ak.needed_multiplier(v - b)
    parts = k.per_part.set_index("part")
    assert parts.k["embedders"] == 1
    assert parts.why["embedders"] == "nothing but rounding"
    assert parts.k["final"] == 1
    assert parts.why["final"] in ("nothing but rounding", "untouched")
    assert parts.k["layers"] == pytest.approx(float(k), rel=1e-6)
    assert 4 < k < 6
    assert parts.k.notna().all()
    (b + (v - b).scaled(parts.k.to_dict())).save(tmp_path / "merged.safetensors")


def test_where_the_change_lies_decides_what_is_advised(planted: dict[str, Any], tmp_path: Path) -> None:
    start = on_grid(tiny.state(seed=1))
    b, w, moved = planted["base"], planted["bridge"], tiny.near(start, 0.02, seed=3)

    def variant(name: str, chosen: Any) -> ak.Checkpoint:
        return opened(tmp_path, name, {key: moved[key] if chosen(key) else start[key] for key in start})

    refiner = variant("r", lambda key: "refiner" in key)
    vectors = variant("n", lambda key: start[key].dim() == 1 and "refiner" not in key)
    both = variant("rn", lambda key: "refiner" in key or start[key].dim() == 1)
    for one, words in (
        (refiner, ("all that the delta changes is protected", "all in noise_refiner, context_refiner", "everywhere()")),
        (vectors, ("it changes norms and biases only", "changed vectors", "start at k = 1")),
        (both, ("it changes norms and biases only", "protected tensors in noise_refiner")),
    ):
        with pytest.raises(AlgebraError) as told:
            ak.needed_multiplier(one - b, on=w)
        assert "same file" not in str(told.value)
        assert [word for word in words if word not in str(told.value)] == []
    assert ak.needed_multiplier((refiner - b).everywhere(), on=w) >= 1


def test_the_wrong_base_is_asked_about() -> None:
    bridge = ak.mini.load("tb1").protect("refiner")
    words = "\n".join(ak.needed_multiplier(ak.mini.load("base-variant") - ak.mini.load("turbo"), on=bridge).warnings)
    assert "not importable" in words
    assert "is it the right base? See nearest_base" in words


def test_a_reference_that_does_nothing_here_is_refused(planted: dict[str, Any]) -> None:
    v, b, r = (planted[name] for name in ("weak", "base", "reference"))
    with pytest.raises(MismatchError, match="the reference changes none of the matrices"):
        ak.needed_multiplier((v - b).only("layers.0"), basis="reference", reference=(r - b).only("layers.1"))
    with pytest.raises(AlgebraError, match="a reference is for its basis"):
        ak.needed_multiplier(v - b, reference=r - b)


def test_what_is_recommended_is_one_number_and_the_others_a_table(planted: dict[str, Any]) -> None:
    lines = repr(ak.needed_multiplier(planted["weak"] - planted["base"], on=planted["bridge"])).splitlines()
    assert lines[0].startswith("Multiplier ")
    assert lines[1].startswith("  basis relative: 0.02 |w| / |d| = ")
    table = lines[lines.index("  other bases, by themselves:") + 1 :]
    assert [line.split()[0] for line in table] == ["reference", "survival", "bridge"]
    assert table[0].split()[1] == "-"

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import torch

import alkahest as ak
from alkahest.errors import AlgebraError, MismatchError
from alkahest.measure.lineage import check_of, parts_moved
from alkahest.model.families.zimage import FAMILY
from alkahest.model.keys import Pattern


def norm(values: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in values))


def test_how_far_the_parts_moved_by_hand(trio: dict[str, Path]) -> None:
    v, b, w = (ak.open(trio[name]) for name in ("variant", "base", "bridge"))
    check = ak.refiner_check(v, b, w)
    refiners = [key for key in b if Pattern("refiner", FAMILY).matches(key)]
    raw = norm([v[k].double() - b[k].double() for k in refiners]) / norm([b[k] for k in refiners])
    # What the two bf16 files' own rounding explains is taken off: 2 % against 0.17 %.
    assert raw * 0.98 < check.refiner < raw
    assert check.parts.loc["refiner", "relative"] != check.parts.loc["refiner", "moved"]
    assert check.verdict == "importable" if check.refiner <= 0.02 else "doubtful"
    apart = norm([w[k].double() - b[k].double() for k in refiners]) / norm([b[k] for k in refiners])
    assert f"the bridge's refiner is {apart * 100:.2f} % of its norm from this base's" in str(check)


@pytest.mark.parametrize(
    ("share", "verdict"), [(0.0, "importable"), (0.005, "importable"), (0.06, "doubtful"), (0.3, "not importable")]
)
def test_verdicts(share: float, verdict: str, tmp_path: Path) -> None:
    base = tiny.state(seed=1)
    moved = tiny.near(base, share, seed=3)
    variant = {key: moved[key] if Pattern("refiner", FAMILY).matches(key) else value for key, value in base.items()}
    v, b = (
        ak.open(tiny.write(tmp_path / f"{name}.safetensors", tiny.native(state)))
        for name, state in (("v", variant), ("b", base))
    )
    found = ak.refiner_check(v, b)
    assert found.verdict == verdict
    assert found.layers == 0
    assert verdict in found._repr_html_()


def test_an_fp8_file_of_the_same_model_did_not_move(tmp_path: Path) -> None:
    base = tiny.state(seed=1)
    b = ak.open(tiny.write(tmp_path / "b.safetensors", tiny.native(base)))
    v = ak.open(tiny.write(tmp_path / "v.safetensors", tiny.native(base), torch.float8_e4m3fn))
    found = ak.refiner_check(v, b)
    assert found.parts.loc["refiner", "relative"] > 0.02
    assert found.refiner < 0.01
    assert found.verdict == "importable"


def test_the_miniature_family_is_told_apart() -> None:
    model = {name: ak.mini.load(name) for name in ak.mini.family()}
    bases = {name: model[name] for name in ("base", "turbo", "deturbo")}
    for name in ("base-variant", "base-weak", "base-weak-bf16", "base-refiner-trained"):
        assert ak.nearest_base(model[name], bases).name == "base"
    nearest = ak.nearest_base(model["turbo-variant"], list(bases.values()))
    assert nearest.name == "deturbo"
    assert nearest.base is model["deturbo"]
    assert nearest.table.candidate.tolist() == ["deturbo", "turbo", "base"]
    assert nearest.table.distance[0] < nearest.table.distance[1] / 1.5
    assert ak.refiner_check(model["base-variant"], model["base"]).verdict == "importable"
    assert ak.refiner_check(model["base-refiner-trained"], model["base"]).verdict == "not importable"
    wrong = ak.refiner_check(model["base-variant"], model["turbo"])
    assert wrong.verdict == "not importable"
    assert "is it the right base? See nearest_base" in str(wrong)


def test_the_same_weights_and_a_tie(trio: dict[str, Path], tmp_path: Path) -> None:
    v, b = ak.open(trio["variant"]), ak.open(trio["base"])
    assert "it holds the same weights" in str(ak.nearest_base(b, [b]))
    assert "nothing differs" in str(ak.refiner_check(b, b))
    copy = tmp_path / "base.safetensors"  # another file, of the same name and content
    copy.write_bytes(trio["base"].read_bytes())
    tie = ak.nearest_base(v, [b, ak.open(copy)])
    assert tie.table.candidate.tolist() == ["base", "base_2"]
    assert "nearly as near" in tie._repr_html_()
    far = ak.nearest_base(ak.open(trio["bridge"]), {"base": b})
    assert "its base may be none of these" in str(far)


def test_bad_input(trio: dict[str, Path], tmp_path: Path) -> None:
    v, b = ak.open(trio["variant"]), ak.open(trio["base"])
    with pytest.raises(AlgebraError, match="complete models are needed, not their difference"):
        ak.refiner_check(v - b, b)
    with pytest.raises(AlgebraError, match="complete models are needed"):
        ak.nearest_base(v, [v - b])
    with pytest.raises(AlgebraError, match="no candidates"):
        ak.nearest_base(v, [])
    deeper = ak.open(tiny.write(tmp_path / "deep.safetensors", tiny.native(tiny.state(seed=1, layers=3))))
    with pytest.raises(MismatchError, match=r"layers\.2"):
        ak.refiner_check(deeper, b)
    assert set(parts_moved(ak.delta_table(v - b)).index) >= {"refiner", "layers", "noise_refiner"}


@pytest.mark.parametrize("k", [171.1, -0.01, 1.0])
def test_the_verdict_is_about_the_variant_whatever_multiple_was_measured(k: float, tmp_path: Path) -> None:
    base = tiny.state(seed=1)
    moved = tiny.near(base, 0.002, seed=3)
    v, b = (ak.open(tiny.write(tmp_path / f"{n}.safetensors", tiny.native(s))) for n, s in (("v", moved), ("b", base)))
    whole = check_of(ak.delta_table(v - b))
    for delta in (v - b, (v - b).without("refiner"), (v - b).scaled({"refiner": 300.0})):
        found = check_of(ak.delta_table(delta, k=k))
        assert found.verdict == whole.verdict == "importable"
        # Rounding of the files is taken off where the delta itself was looked at.
        assert found.refiner == pytest.approx(whole.refiner, rel=0.05)
        assert found.layers == pytest.approx(whole.layers, rel=1e-3)

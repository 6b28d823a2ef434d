"""Extraction against float64 arithmetic, diffusers and PEFT."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import alkahest as ak
from alkahest.engine.record import METADATA_KEY
from alkahest.errors import AlgebraError, NonFiniteError, OutputError, UnknownNameError, UnsupportedError
from alkahest.lora import extract, tensor
from alkahest.lora.result import REPORT

LAYER = "layers.1.feed_forward.w1.weight"
RANK = 6


def planted(
    folder: Path, size: float = 0.02, dtype: torch.dtype = torch.bfloat16
) -> tuple[ak.Checkpoint, ak.Checkpoint]:
    """A base, and a variant whose matrices differ by six directions and whose vectors differ a little."""
    base = {name: value.to(dtype).float() for name, value in tiny.state(seed=1).items()}
    torch.manual_seed(7)
    variant = {}
    for name, value in base.items():
        change = torch.randn_like(value)
        if value.dim() == 2 and min(value.shape) > 1:
            change = torch.randn(value.shape[0], RANK) @ torch.randn(RANK, value.shape[1]) / RANK**0.5
        variant[name] = value + size * value.std() * change
    files = [("variant", variant), ("base", base)]
    v, b = (ak.open(tiny.write(folder / f"{name}.safetensors", tiny.native(values), dtype)) for name, values in files)
    return v, b


def product(lora: Any, key: str) -> torch.Tensor:
    """What the file adds to a weight, in float64, from the stored tensors alone."""
    stored = load_file(lora.path)
    module = key.removesuffix(".weight")
    up, down = (stored[f"diffusion_model.{module}.lora_{half}.weight"].double() for half in "BA")
    alpha = stored.get(f"diffusion_model.{module}.alpha")
    return (1.0 if alpha is None else float(alpha) / up.shape[1]) * (up @ down)


def difference(v: ak.Checkpoint, b: ak.Checkpoint, key: str) -> torch.Tensor:
    return v[key].double() - b[key].double()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("method", ["exact", "randomised"])
@pytest.mark.parametrize(
    "given", [{"energy": 0.9}, {"rank": 3}, {"ratio": 0.5}, {"sum": 0.6}, {"energy": 0.9, "alpha": 2.0}], ids=str
)
def test_the_energy_that_is_reported_is_the_files(
    given: dict[str, Any], method: str, dtype: str, tmp_path: Path
) -> None:
    v, b = planted(tmp_path)
    found = ak.extract_lora(v - b, method=method, dtype=dtype, exclude="refiner", **given)
    lora = found.save(tmp_path / "lora.safetensors")
    assert list(found.report.columns)[5:] == list(REPORT)
    lost = whole = 0.0
    for row in found.report.itertuples():
        d = difference(v, b, row.tensor)
        assert row.delta_norm == pytest.approx(float(d.norm()), rel=1e-6)
        whole += float(d.square().sum())
        if row.kept != "LoRA":
            lost += float(d.square().sum())
            assert row.energy == 0
            continue
        left = float((d - product(lora, row.tensor)).square().sum())
        lost += left
        assert row.energy == pytest.approx(1 - left / float(d.square().sum()), abs=1e-5)
        assert row.energy >= given.get("energy", 0)
        s = torch.linalg.svdvals(d)
        best = float(s[: row.rank].square().sum() / s.square().sum())
        assert best - 1e-3 < row.energy <= best + 1e-6, "no LoRA of this rank keeps more"
    assert found.energy == pytest.approx(1 - lost / whole, abs=1e-5)
    stored = load_file(lora.path)
    assert {tensor.dtype for name, tensor in stored.items() if "alpha" not in name} == {
        {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    }
    assert sum(name.endswith("alpha") for name in stored) == ("alpha" in given) * len(lora.targets)
    assert found.nbytes == sum(t.nbytes for name, t in stored.items() if "alpha" not in name)


def test_the_planted_rank_is_found_by_the_noise_edge(tmp_path: Path) -> None:
    v, b = planted(tmp_path, size=0.005)
    found = ak.extract_lora(v - b, noise_edge=True)
    kept = found.report[found.report.kept == "LoRA"]
    assert len(kept) > 30
    assert set(kept["rank"]) == {RANK}
    assert (kept.edge_rank == RANK).all()
    assert not kept.capped.any()
    much = ak.extract_lora(v - b, energy=0.995, rank_max=None)
    assert much.report[much.report.kept == "LoRA"]["rank"].min() > 4 * RANK, "energy alone keeps rounding noise"
    s = torch.linalg.svdvals(difference(v, b, LAYER))
    beyond = float(s[RANK:].square().sum() / s.square().sum())  # noise lies in the planted directions too
    assert beyond < found.report.set_index("tensor").noise[LAYER] < 1.4 * beyond


def test_a_variant_that_is_all_noise_is_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fine = {name: value + 1e-4 * value.std() * torch.randn_like(value) for name, value in tiny.state(seed=1).items()}
    b = ak.open(tiny.write(tmp_path / "b.safetensors", tiny.native(tiny.state(seed=1)), torch.float32))
    v = ak.open(
        tiny.write(
            tmp_path / "v.safetensors",
            tiny.native({n: x if n == LAYER else tiny.state(seed=1)[n] for n, x in fine.items()}),
        )
    )
    with pytest.raises(AlgebraError, match=r"(?s)nothing is left to extract.*noise"):
        ak.extract_lora((v - b).only(LAYER.removesuffix(".weight")), noise_edge=True)


def test_which_tensors(tmp_path: Path) -> None:
    v, b = planted(tmp_path)
    found = ak.extract_lora(
        v - b, rank=2, include="layers", exclude="attention", full="layers.0.ffn_norm1, layers.1.adaLN_modulation"
    )
    report = found.report.set_index("tensor")
    for key, kept in {
        LAYER: "LoRA",
        "layers.0.ffn_norm1.weight": "full",
        "layers.1.adaLN_modulation.0.bias": "full",
        "layers.1.adaLN_modulation.0.weight": "full",
        "layers.0.ffn_norm2.weight": "no matrix",
        "layers.0.attention.to_q.weight": "excluded",
        "noise_refiner.0.feed_forward.w1.weight": "excluded",
    }.items():
        assert report.kept[key] == kept, key
    assert set(report.index) == set(b)
    lora = found.save(tmp_path / "lora.safetensors")
    assert set(lora.targets) == set(report.index[report.kept.isin(["LoRA", "full"])])
    for key in ("layers.0.ffn_norm1.weight", "layers.1.adaLN_modulation.0.weight"):
        stored = load_file(lora.path)["diffusion_model." + key.removesuffix(".weight") + ".diff"]
        assert torch.equal(stored, difference(v, b, key).bfloat16())
    left = found.summary()["left_out"]
    total = sum(float(difference(v, b, key).square().sum()) for key in b)
    lost = sum(float(difference(v, b, key).square().sum()) for key in report.index[report.kept == "excluded"])
    assert left["excluded"]["energy"] == pytest.approx(lost / total, rel=1e-6)
    assert "left out" in repr(found)
    assert "full" in found.recipe.text
    assert "excluded" in found._repr_html_()
    small = ak.extract_lora(v - b, rank=2, min_dim=97).report.set_index("tensor")
    assert small.kept["layers.0.attention.to_q.weight"] == "too small"
    assert small.kept["t_embedder.mlp.0.weight"] == "LoRA"


def test_a_cap_that_decides_is_said(tmp_path: Path) -> None:
    v, b = planted(tmp_path)
    found = ak.extract_lora(v - b, energy=0.999, rank_max=4)
    assert found.report[found.report.kept == "LoRA"].capped.all()
    assert "rank_max decided the rank of" in repr(found)
    free = ak.extract_lora(v - b, energy=0.9, rank_max=None)
    assert not free.report.capped.any()
    assert "rank_max decided" not in repr(free)


def test_diffusers_loads_every_weight(tmp_path: Path) -> None:
    base, variant = ak.mini.load("base"), ak.mini.load("base-variant")
    found = ak.extract_lora(variant - base, rank=8)
    lora = found.save(tmp_path / "lora.safetensors")
    pipe = ak.pipeline(base)
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(str(lora.path), adapter_name="lora")
    pipe.fuse_lora(lora_scale=0.7, adapter_names=["lora"])
    pipe.unload_lora_weights()
    theirs, ours = pipe.transformer.state_dict(), ak.pipeline(base + 0.7 * lora).transformer.state_dict()
    assert theirs.keys() == ours.keys()
    moved = {name for name in theirs if not torch.equal(theirs[name], before[name])}
    assert moved == set(lora.targets)
    for name, value in theirs.items():
        assert torch.allclose(ours[name].float(), value.float(), rtol=0.01, atol=1e-5), name


def test_peft_keeps_the_same_energy_at_the_same_rank(tmp_path: Path) -> None:
    """PEFT turns its own LoHa into a LoRA; we turn the file of the same LoHa into one."""
    from peft import LoHaConfig, convert_to_lora, get_peft_model

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = torch.nn.Linear(96, 256, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.w1(x)
            return result

    torch.manual_seed(3)
    model = get_peft_model(Block(), LoHaConfig(r=6, alpha=3, target_modules=["w1"], init_weights=False))
    layer = model.base_model.model.w1
    d = layer.get_delta_weight("default").detach().double()
    name = LAYER.removesuffix(".weight")
    halves = {
        f"{name}.hada_{w}_{h}": getattr(layer, f"hada_{w}_{h}")["default"].detach().clone()
        for w in ("w1", "w2")
        for h in "ab"
    }
    save_file({**halves, f"{name}.alpha": torch.tensor(3.0)}, tmp_path / "loha.safetensors")
    for given, theirs_rank in (({"rank": 9}, 9), ({"energy": 0.8}, 0.8)):
        _, theirs = convert_to_lora(model, theirs_rank)
        up, down = (next(value.double() for key, value in theirs.items() if f"lora_{half}" in key) for half in "BA")
        ours = ak.extract_lora(ak.open_lora(tmp_path / "loha.safetensors"), dtype="fp32", **given)
        row = ours.report.iloc[0]
        assert row["rank"] == up.shape[1]
        energy = 1 - float((d - up @ down).square().sum() / d.square().sum())
        assert row.energy == pytest.approx(energy, abs=1e-5)


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    v, b = planted(tmp_path)
    asked: dict[str, Any] = {"energy": 0.9, "exclude": "refiner", "threads": 1}
    whole = ak.extract_lora(v - b, **asked).save(tmp_path / "whole.safetensors")
    assert not len(ak.cached().query("kind == 'extractions'")), "saved work is not kept twice"
    events = extract.stream_extract_lora(v - b, **asked)
    for _ in range(30):
        last = next(events)
    events.close()
    parts = ak.cached().query("kind == 'extractions'")
    assert 0 < len(parts) < len(whole.targets)
    assert 0 < last.done < last.total
    Path(parts.file.iloc[0]).write_bytes(b"damaged")
    done: list[str] = []
    real = tensor.decompose
    monkeypatch.setattr(tensor, "decompose", lambda *given: done.append(given[-1]) or real(*given))
    again = ak.extract_lora(v - b, **asked)
    assert len(done) == len(whole.targets) - len(parts) + 1
    assert again.save(tmp_path / "again.safetensors").path.read_bytes() == whole.path.read_bytes()
    done.clear()
    ak.extract_lora(v - b, **{**asked, "energy": 0.91})
    assert len(done) == len(whole.targets), "another rule is other work"


def test_the_recipe_says_what_it_is(tmp_path: Path) -> None:
    from blake3 import blake3

    v, b = planted(tmp_path)
    lora = ak.extract_lora(2 * (v - b), energy=0.9, exclude="refiner", rank_max=12).save(tmp_path / "s.safetensors")
    what, recipe = ak.read_recipe(lora.path)
    assert what == "a LoRA with a recipe inside"
    assert recipe.text == "extract_lora(2 * (variant - base), energy=0.9, rank_max=12, exclude='refiner')"
    assert recipe.inputs["base"][0]["blake3"] == blake3((tmp_path / "base.safetensors").read_bytes()).hexdigest()
    assert recipe.output["dtype"] == "bf16"
    assert 0.85 < recipe.output["energy"] < 1
    assert METADATA_KEY in lora.metadata
    from alkahest.recipes.inputs import build

    with pytest.raises(ak.AlkahestError, match="this recipe makes a LoRA"):
        build(recipe, {})


def test_resizing_and_merging_need_no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    v, b = planted(tmp_path)
    one = ak.extract_lora(v - b, rank=5, full="layers.0.ffn_norm1").save(tmp_path / "one.safetensors")
    two = ak.extract_lora(b - v, rank=4, include="layers", alpha=3.0).save(tmp_path / "two.safetensors")

    def refuse(*_: Any) -> None:
        raise AssertionError("a matrix was computed")

    monkeypatch.setattr(tensor, "decompose", refuse)
    small = ak.extract_lora(one, rank=2)
    report = small.report.set_index("tensor")
    again = small.save(tmp_path / "small.safetensors")
    assert set(again.targets) == set(one.targets)
    assert report.kept["layers.0.ffn_norm1.weight"] == "full"
    d = product(one, LAYER)
    s = torch.linalg.svdvals(d)
    assert report.energy[LAYER] == pytest.approx(float(s[:2].square().sum() / s.square().sum()), abs=1e-4)
    assert report.energy[LAYER] == pytest.approx(
        1 - float((d - product(again, LAYER)).square().sum() / d.square().sum()), abs=1e-6
    )
    merged = ak.extract_lora(one - 0.5 * two, energy=1.0, dtype="fp32").save(tmp_path / "merged.safetensors")
    expected = product(one, LAYER) - 0.5 * product(two, LAYER)
    assert torch.allclose(product(merged, LAYER), expected, atol=1e-6 * float(expected.abs().max()))
    rest = "noise_refiner.0.feed_forward.w1.weight"
    assert torch.allclose(product(merged, rest), product(one, rest), atol=1e-6)
    assert 5 < ak.open_lora(merged.path).summary()["ranks"][1] <= 9
    assert (
        load_file(small.save(tmp_path / "kept.safetensors").path)["diffusion_model.layers.0.ffn_norm1.diff"].dtype
        == torch.bfloat16
    )


def test_loras_that_cancel_are_nothing(tmp_path: Path) -> None:
    v, b = planted(tmp_path)
    one = ak.extract_lora(v - b, rank=5).save(tmp_path / "one.safetensors")
    (tmp_path / "copy.safetensors").write_bytes(one.path.read_bytes())
    for nothing in (one - one, one - ak.open_lora(tmp_path / "copy.safetensors"), 3 * one - 1.5 * (one + one)):
        with pytest.raises(AlgebraError, match="the delta is zero"):
            ak.extract_lora(nothing, energy=1.0)
    left = ak.extract_lora(one - one.without("layers.0"), energy=1.0, rank_max=None)
    assert all(".0." in key and "layers" in key for key in left.pairs)


def test_from_a_lora_that_is_not_thin(tmp_path: Path) -> None:
    name = LAYER.removesuffix(".weight")
    torch.manual_seed(1)
    tensors = {f"{name}.lora_B.weight": torch.randn(256, 60), f"{name}.lora_A.weight": torch.randn(60, 96)}
    save_file(tensors, tmp_path / "thick.safetensors")
    found = ak.extract_lora(ak.open_lora(tmp_path / "thick.safetensors"), rank=7)
    s = torch.linalg.svdvals(tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double())
    assert found.report.energy.iloc[0] == pytest.approx(float(s[:7].square().sum() / s.square().sum()), abs=1e-4)
    assert math.isnan(found.report.noise.iloc[0])


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "range": ({"energy": 1.2}, AlgebraError, "energy is a share"),
    "pattern": (
        {"exclude": "refinr"},
        UnknownNameError,
        r"(?s)exclude: 'refinr' selects no tensor.*did you mean 'refiner'",
    ),
    "include": ({"include": "layrs"}, UnknownNameError, r"(?s)include.*'layers'"),
    "full": ({"full": "nrom"}, UnknownNameError, "full"),
    "everything excluded": ({"exclude": "all"}, AlgebraError, r"(?s)nothing is left to extract.*excluded"),
    "method": ({"method": "fast"}, UnknownNameError, "unknown method"),
    "seed": ({"method": "exact", "seed": 4}, AlgebraError, r"(?s)the exact method has no seed.*seed=4"),
    "dtype": ({"dtype": "fp8_e4m3fn"}, UnsupportedError, "one of three dtypes"),
    "alpha": ({"alpha": 0}, AlgebraError, "alpha must be a number above zero"),
    "min_dim": ({"min_dim": -1}, AlgebraError, "min_dim"),
    "option": ({"tread": 2}, UnknownNameError, "unknown option"),
    "device": ({"device": "cuda:7"}, UnsupportedError, "device is not there"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, trio: dict[str, Path]) -> None:
    given, kind, words = BAD[case]
    with pytest.raises(kind, match=words):
        ak.extract_lora(ak.open(trio["variant"]) - ak.open(trio["base"]), **given)


def test_bad_deltas(trio: dict[str, Path], tmp_path: Path) -> None:
    v, b = ak.open(trio["variant"]), ak.open(trio["base"])
    with pytest.raises(AlgebraError, match="a delta is needed"):
        ak.extract_lora(v)  # type: ignore[arg-type]
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(trio["base"].read_bytes())
    for same in (b - b, ak.open(copy) - b, 0 * (v - b)):
        with pytest.raises(AlgebraError, match="the delta is zero"):
            ak.extract_lora(same)
    with pytest.raises(AlgebraError, match=r"(?s)rounding noise of this delta is not known.*choose energy"):
        ak.extract_lora((v - b) + (v - b).only("layers"), noise_edge=True)
    values = tiny.near(tiny.state(seed=1), 0.02, seed=3)
    values[LAYER][5, 7] = math.nan
    broken = ak.open(tiny.write(tmp_path / "nan.safetensors", tiny.native(values)))
    with pytest.raises(NonFiniteError, match=r"(?s)extract_lora.*nan\.safetensors.*layers\.1\.feed_forward\.w1"):
        ak.extract_lora(broken - b)
    huge = {name: 1e38 * value for name, value in tiny.state(seed=1).items()}
    large = ak.open(tiny.write(tmp_path / "large.safetensors", tiny.native(huge)))
    with pytest.raises(NonFiniteError, match="too large for fp16"):
        ak.extract_lora((large - b) * 1e-22, dtype="fp16", rank=2)


def test_it_does_not_write_over_its_inputs(tmp_path: Path) -> None:
    v, b = planted(tmp_path)
    found = ak.extract_lora(v - b, rank=1, include="layers.0")
    before = (tmp_path / "base.safetensors").read_bytes()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "base.safetensors")
    for name in ("base.safetensors", "link.safetensors"):
        with pytest.raises(OutputError, match="one of the inputs"):
            found.save(tmp_path / name)
    with pytest.raises(OutputError, match=r"one \.safetensors file"):
        found.save(tmp_path / "lora.bin")
    with pytest.raises(UnknownNameError, match="unknown flavour"):
        found.save(tmp_path / "lora.safetensors", "komfyui")
    assert (tmp_path / "base.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "base.safetensors",
        "link.safetensors",
        "variant.safetensors",
    ]


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_what_is_only_rounding_is_left_out_and_counted(kind: torch.dtype, tmp_path: Path) -> None:
    base = {name: value.bfloat16().float() for name, value in tiny.state(1).items()}
    learned = ["layers.0.attention.to_out.0.weight", "layers.1.feed_forward.w2.weight"]
    changed = {name: value + 0.3 * value.std() * torch.randn_like(value) for name, value in base.items()}
    variant = {name: (changed if name in learned else base)[name] for name in base}
    matrices = [name for name, value in base.items() if value.dim() == 2 and min(value.shape) >= 32]
    stored = {n: v.to(kind) if n in matrices else v.bfloat16() for n, v in variant.items()}
    save_file(stored, tmp_path / "variant.safetensors")
    tiny.write(tmp_path / "base.safetensors", base)
    delta = ak.open(tmp_path / "variant.safetensors") - ak.open(tmp_path / "base.safetensors")
    found = ak.extract_lora(delta, energy=0.9)
    assert sorted(found.pairs) == sorted(learned)
    left = found.summary()["left_out"]["rounding"]["tensors"]
    differing = [n for n in matrices if n not in learned and not torch.equal(stored[n].float(), base[n])]
    assert left == len(differing) > 10
    assert f"{left} tensors (rounding)" in repr(found)
    everything = ak.extract_lora(delta, energy=0.9, rounding=True)
    assert len(everything.pairs) == len(learned) + left
    assert "rounding=True" in everything.recipe.text
    only = ak.open(tmp_path / "variant.safetensors") - ak.open(tmp_path / "base.safetensors")
    with pytest.raises(AlgebraError, match=r"(?s)nothing is left to extract.*rounding"):
        ak.extract_lora(only, exclude=", ".join(name.removesuffix(".weight") for name in learned))

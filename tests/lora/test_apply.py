"""DoRA against PEFT's own merge, and by hand in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

import alkahest as ak
from alkahest.errors import AlgebraError, MismatchError, UnsupportedError
from alkahest.recipes.inputs import build

KEY = "layers.1.feed_forward.w1.weight"
NAME = "diffusion_model." + KEY.removesuffix(".weight")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def model(tmp_path: Path) -> ak.Checkpoint:
    return ak.open(tiny.write(tmp_path / "base.safetensors", tiny.native(tiny.state(seed=1)), torch.float32))


def dora(folder: Path, magnitude: torch.Tensor, name: str = NAME, rows: int = 256, suffix: str = "dora_scale") -> Path:
    tensors = {
        f"{name}.lora_B.weight": 0.05 * random(rows, 5),
        f"{name}.lora_A.weight": 0.05 * random(5, 96),
        f"{name}.alpha": torch.tensor(2.5),
        f"{name}.{suffix}": magnitude,
    }
    save_file(tensors, folder / "dora.safetensors")
    return folder / "dora.safetensors"


def saved(weights: ak.Weights, folder: Path) -> ak.Checkpoint:
    return ak.open(weights.save(folder / "out.safetensors").path)


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("by_column", [False, True])
def test_by_hand(by_column: bool, strength: float, model: ak.Checkpoint, tmp_path: Path) -> None:
    magnitude = 1 + 0.1 * (random(1, 96) if by_column else random(256, 1))
    lora = ak.open_lora(dora(tmp_path, magnitude))
    w = model[KEY].double()
    whole = w + 0.5 * (0.05 * random(256, 5)).double() @ (0.05 * random(5, 96)).double()
    moved = magnitude.double() * whole / whole.norm(dim=0 if by_column else 1, keepdim=True)
    after = saved(ak.apply_lora(model, lora, strength), tmp_path)
    assert torch.allclose(after[KEY].double(), w + strength * (moved - w), atol=1e-6)
    assert all(torch.equal(after[key], model[key]) for key in model if key != KEY)


def test_peft_merges_to_the_same(model: ak.Checkpoint, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    block = torch.nn.Module()
    block.w1 = torch.nn.Linear(96, 256, bias=False)
    block.w1.weight.data.copy_(model[KEY])
    wrapper = torch.nn.Sequential()
    wrapper.add_module("w", block)
    peft = get_peft_model(
        wrapper, LoraConfig(r=5, lora_alpha=2.5, use_dora=True, target_modules=["w1"], init_lora_weights=False)
    )
    for parameter in peft.parameters():
        parameter.data += 0.01 * random(*parameter.shape) * (parameter.dim() == 1)
    state = get_peft_model_state_dict(peft)
    stored = {
        name.replace("base_model.model.w.w1", "base_model.model." + KEY.removesuffix(".weight")): value.contiguous()
        for name, value in state.items()
    }
    save_file(
        {**stored, "base_model.model." + KEY.removesuffix(".weight") + ".alpha": torch.tensor(2.5)},
        tmp_path / "peft.safetensors",
    )
    lora = ak.open_lora(tmp_path / "peft.safetensors")
    assert lora.is_dora
    merged = peft.merge_and_unload().w.w1.weight.detach()
    assert torch.allclose(saved(ak.apply_lora(model, lora), tmp_path)[KEY], merged, atol=1e-6)


def test_a_fused_dora_takes_its_rows(model: ak.Checkpoint, tmp_path: Path) -> None:
    name, magnitude = "diffusion_model.layers.0.attention.qkv", 1 + 0.1 * random(288, 1)
    lora = ak.open_lora(dora(tmp_path, magnitude, name, 288))
    after = saved(ak.apply_lora(model, lora), tmp_path)
    change = 0.5 * (0.05 * random(288, 5)).double() @ (0.05 * random(5, 96)).double()
    for number, part in enumerate("qkv"):
        key, rows = f"layers.0.attention.to_{part}.weight", slice(96 * number, 96 * (number + 1))
        whole = model[key].double() + change[rows]
        assert torch.allclose(
            after[key].double(), magnitude[rows].double() * whole / whole.norm(dim=1, keepdim=True), atol=1e-6
        )
    with pytest.raises(UnsupportedError, match="magnitudes fit neither"):
        ak.apply_lora(model, ak.open_lora(dora(tmp_path, random(1, 95), name, 288)))


def test_it_is_an_expression(model: ak.Checkpoint, tmp_path: Path) -> None:
    lora = ak.open_lora(dora(tmp_path, 1 + 0.1 * random(256)))
    plain = ak.open_lora(save_plain(tmp_path))
    k = ak.param("k", 1.0)
    weights = ak.apply_lora(model.protect("refiner"), lora, k)
    assert weights.params == {"k": 1.0}
    assert weights.bind(k=0.3).text() == "apply_lora(base.protect('refiner'), dora, param('k', 0.3))"
    kept = ak.apply_lora(model.protect("layers.1"), lora)
    assert "protection leaves out 1 of its 1 tensors" in repr(kept)
    assert torch.equal(saved(kept, tmp_path)[KEY], model[KEY])
    assert ak.apply_lora(model, plain, 0.5).text() == "base + 0.5 * plain"
    out = weights.bind(k=0.3).save(tmp_path / "merged.safetensors")
    again = build(ak.read_recipe(out.path)[1], {}, beside=tmp_path).save(tmp_path / "again.safetensors")
    assert again.path.read_bytes() == out.path.read_bytes()
    delta = ak.apply_lora(model, lora) - model
    assert list(ak.extract_lora(delta, rank=3).pairs) == [KEY]


def save_plain(folder: Path) -> Path:
    save_file(
        {f"{NAME}.lora_B.weight": random(256, 5), f"{NAME}.lora_A.weight": random(5, 96)}, folder / "plain.safetensors"
    )
    return folder / "plain.safetensors"


def test_bad_uses(model: ak.Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(AlgebraError, match="weights and an opened LoRA are needed"):
        ak.apply_lora(model, "dora.safetensors")  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match=r"(?s)not of this model.*layers\.9"):
        ak.apply_lora(model, ak.open_lora(dora(tmp_path, random(256), NAME.replace("layers.1", "layers.9"))))
    with pytest.raises(UnsupportedError, match=r"(?s)magnitudes fit neither.*256 or 96"):
        ak.apply_lora(model, ak.open_lora(dora(tmp_path, random(17))))

"""The names that each program reads, against facts: what is written opens to the same numbers everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import alkahest as ak
from alkahest.errors import NonFiniteError, OutputError, UnsupportedError
from alkahest.lora.write import FLAVOURS, Pair, save_lora
from alkahest.model.families.zimage import FAMILY

Q, K, V = (f"layers.0.attention.to_{part}.weight" for part in "qkv")
OUT, EMBED, FINAL = (
    "layers.0.attention.to_out.0.weight",
    "all_x_embedder.2-1.weight",
    "all_final_layer.2-1.linear.weight",
)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def pairs(scale: float = 1.0) -> dict[str, Pair]:
    sides = {Q: (96, 3, 96), K: (96, 4, 96), V: (96, 5, 96), OUT: (96, 6, 96), EMBED: (96, 2, 16), FINAL: (16, 3, 96)}
    return {key: Pair(random(rows, rank), random(rank, columns), scale) for key, (rows, rank, columns) in sides.items()}


EXPECTED = {
    "comfyui": [
        "diffusion_model.layers.0.attention.to_q.lora_A.weight",
        "diffusion_model.all_x_embedder.2-1.lora_B.weight",
        "diffusion_model.layers.0.attention.to_out.0.lora_A.weight",
    ],
    "diffusers": [
        "transformer.layers.0.attention.to_q.lora_A.weight",
        "transformer.all_final_layer.2-1.linear.lora_B.weight",
    ],
    "peft": ["base_model.model.layers.0.attention.to_q.lora_A.weight"],
    "kohya": [
        "lora_unet_layers_0_attention_qkv.lora_down.weight",
        "lora_unet_layers_0_attention_out.lora_up.weight",
        "lora_unet_x_embedder.alpha",
        "lora_unet_final_layer_linear.alpha",
    ],
    "kohya-split": [
        "lora_unet_layers_0_attention_to_q.lora_down.weight",
        "lora_unet_layers_0_attention_to_out_0.alpha",
    ],
    "fused": [
        "diffusion_model.layers.0.attention.qkv.lora_A.weight",
        "diffusion_model.x_embedder.lora_B.weight",
        "diffusion_model.final_layer.linear.lora_B.weight",
    ],
}


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_flavours(flavour: str, scale: float, tmp_path: Path) -> None:
    path = save_lora(tmp_path / "lora.safetensors", pairs(scale), {}, flavour, family=FAMILY)
    stored = load_file(path)
    assert set(EXPECTED[flavour]) <= set(stored)
    with_alpha = scale != 1.0 and flavour not in ("diffusers", "peft")
    assert any("alpha" in name for name in stored) == (with_alpha or "kohya" in flavour)
    lora = ak.open_lora(path)
    assert set(lora.targets) == set(pairs())
    for key, pair in pairs(scale).items():
        found = torch.empty(pair.up.shape[0], pair.down.shape[1])
        lora.read(key, 0, found.numel(), found.view(-1), None)  # type: ignore[arg-type]
        assert torch.allclose(found.double(), scale * pair.up.double() @ pair.down.double(), atol=1e-5), key
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}, "settings of PEFT in the metadata would be applied twice"


def test_a_fused_qkv_is_block_diagonal(tmp_path: Path) -> None:
    stored = load_file(save_lora(tmp_path / "lora.safetensors", pairs(0.5), {}, "fused", family=FAMILY))
    name = "diffusion_model.layers.0.attention.qkv"
    up, down = stored[f"{name}.lora_B.weight"], stored[f"{name}.lora_A.weight"]
    assert up.shape == (288, 12)
    assert torch.equal(up, torch.block_diag(*(pairs()[key].up for key in (Q, K, V))))
    assert torch.equal(down, torch.cat([pairs()[key].down for key in (Q, K, V)]))
    assert float(stored[f"{name}.alpha"]) == 0.5 * 12


def test_a_fused_qkv_without_one_of_them(tmp_path: Path) -> None:
    given = {key: pair for key, pair in pairs().items() if key != K}
    given[V] = Pair(given[V].up, given[V].down, 2.0)
    lora = ak.open_lora(save_lora(tmp_path / "lora.safetensors", given, {}, "kohya", family=FAMILY))
    for key, expected in (
        (Q, given[Q].up @ given[Q].down),
        (K, torch.zeros(96, 96)),
        (V, 2 * given[V].up @ given[V].down),
    ):
        found = torch.empty(96, 96)
        lora.read(key, 0, found.numel(), found.view(-1), None)  # type: ignore[arg-type]
        assert torch.allclose(found, expected, atol=1e-4), key


def test_whole_differences(tmp_path: Path) -> None:
    full = {
        "layers.0.ffn_norm1.weight": random(96),
        "layers.0.adaLN_modulation.0.bias": random(384),
        "x_pad_token": random(1, 96),
    }
    stored = load_file(save_lora(tmp_path / "lora.safetensors", {}, full, family=FAMILY))
    assert set(stored) == {
        "diffusion_model.layers.0.ffn_norm1.diff",
        "diffusion_model.layers.0.adaLN_modulation.0.diff_b",
        "diffusion_model.x_pad_token.diff",
    }
    for flavour in ("kohya", "fused"):
        lora = ak.open_lora(save_lora(tmp_path / f"{flavour}.safetensors", pairs(), full, flavour, family=FAMILY))
        assert set(lora.targets) == {*pairs(), *full}
    fused = load_file(save_lora(tmp_path / "k.safetensors", {}, {K: random(96, 97)}, "kohya", family=FAMILY))
    assert torch.equal(
        fused["lora_unet_layers_0_attention_qkv.diff"],
        torch.cat([torch.zeros(96, 97), random(96, 97), torch.zeros(96, 97)]),
    )
    with pytest.raises(UnsupportedError, match="cannot be fused"):
        save_lora(tmp_path / "no.safetensors", {Q: pairs()[Q]}, {K: random(96, 96)}, "kohya", family=FAMILY)
    for flavour in ("diffusers", "peft"):
        with pytest.raises(UnsupportedError, match="full differences load in ComfyUI only"):
            save_lora(tmp_path / "no.safetensors", {}, full, flavour, family=FAMILY)
    assert not (tmp_path / "no.safetensors").exists()


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match="folder does not exist"):
        save_lora(tmp_path / "nowhere" / "lora.safetensors", pairs(), {}, family=FAMILY)
    with pytest.raises(UnsupportedError):
        save_lora(path, {}, {"layers.0.ffn_norm1.weight": random(96)}, "peft", family=FAMILY)
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("dtype", "scale", "allowed"),
    [
        (torch.float16, 100.0, 4e-4),  # wrote infinity
        (torch.float16, 1 / 64, 0.0),  # rank 64, alpha 1: fell below what fp16 resolves
        (torch.float16, 2.0**-14, 0.0),
        (torch.float16, 2.0**12, 0.0),
        (torch.float16, 0.7, 4e-4),
        (torch.float8_e4m3fn, 0.7, 2e-3),  # lost 2.8 %
        (torch.float8_e4m3fn, 0.25, 0.0),
        (torch.bfloat16, 1 / 3, 2e-3),
        (torch.float32, 1e-9, 1e-6),
        (torch.float32, -2.5, 1e-6),
    ],
)
def test_folding_a_scale_keeps_the_numbers(dtype: torch.dtype, scale: float, allowed: float) -> None:
    generator = torch.Generator().manual_seed(3)
    up = (torch.randn(64, 8, generator=generator) * (800 if scale == 100 else 0.003)).to(dtype)
    down = torch.randn(8, 64, generator=generator).to(dtype)
    folded = Pair(up, down, scale).fold()
    assert folded.scale == 1
    right = scale * up.double() @ down.double()
    found = folded.up.double() @ folded.down.double()
    assert torch.isfinite(found).all()
    assert float((found - right).norm() / right.norm()) <= allowed
    if dtype is torch.bfloat16 or scale == 2.0**12:
        assert folded.up.dtype == dtype  # no wider than it need be
    zero = Pair(up, down, 0.0).fold()
    assert not zero.up.float().any()


def test_what_is_written_is_finite(tmp_path: Path) -> None:
    bad = Pair(torch.full((8, 2), float("nan")), torch.ones(2, 8))
    with pytest.raises(NonFiniteError, match=r"(?s)holds NaN or infinity.*to_q"):
        save_lora(tmp_path / "x.safetensors", {"layers.0.attention.to_q.weight": bad}, {}, family=FAMILY)
    assert not (tmp_path / "x.safetensors").exists()

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import alkahest as ak
from alkahest.cli import app
from alkahest.lora.dropped import dropped_by

NAME = "layers.0.attention.to_q"
SPELLINGS = {
    "without .weight": (f"diffusion_model.{NAME}.lora_A", f"diffusion_model.{NAME}.lora_B"),
    "diffusers of 2023": (f"diffusion_model.{NAME}_lora.down.weight", f"diffusion_model.{NAME}_lora.up.weight"),
    "transformers": (f"{NAME}.lora_linear_layer.down.weight", f"{NAME}.lora_linear_layer.up.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_that_comfyui_loads_are_read(spelling: str, tmp_path: Path) -> None:
    down, up = torch.randn(3, 96), torch.randn(96, 3)
    first, second = SPELLINGS[spelling]
    alpha = first.partition("to_q")[0] + "to_q.alpha"
    save_file({first: down, second: up, alpha: torch.tensor(6.0)}, tmp_path / "l.safetensors")
    lora = ak.open_lora(tmp_path / "l.safetensors")
    found = torch.empty(96 * 96)
    lora.read(f"{NAME}.weight", 0, len(found), found, None)  # type: ignore[arg-type]
    assert torch.allclose(found.view(96, 96), 2 * up @ down, atol=1e-5)


@pytest.mark.parametrize(
    ("flavour", "words"),
    [
        ("comfyui", None),
        ("diffusers", None),
        ("kohya", None),
        ("kohya-split", "note: ComfyUI drops to_q, to_k, to_v and to_out under kohya's names"),
        ("peft", "note: ComfyUI loads nothing of a LoRA with PEFT's names"),
        ("fused", "note: diffusers drops attention, x_embedder and final_layer under ComfyUI's fused names"),
    ],
)
def test_converting_says_which_programs_drop_what(flavour: str, words: str | None, tmp_path: Path) -> None:
    tensors = {}
    for part in "qkv":
        name = f"diffusion_model.layers.0.attention.to_{part}"
        tensors |= {f"{name}.lora_A.weight": torch.randn(2, 96), f"{name}.lora_B.weight": torch.randn(96, 2)}
    save_file(tensors, tmp_path / "l.safetensors")
    call = ["lora", "convert", str(tmp_path / "l.safetensors"), "-o", str(tmp_path / "o.safetensors")]
    done = CliRunner().invoke(app, [*call, "--flavour", flavour])
    assert done.exit_code == 0, done.output
    assert [line for line in done.output.splitlines() if line.startswith("note")] == ([words] if words else [])


def test_what_is_not_there_is_not_dropped() -> None:
    feed = ["layers.0.feed_forward.w1.weight"]
    assert not dropped_by("kohya-split", feed) + dropped_by("fused", feed) + dropped_by("kohya", feed)
    assert dropped_by("kohya", ["x_embedder.weight"])

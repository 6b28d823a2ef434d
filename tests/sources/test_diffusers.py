"""diffusers loads what we write, in both layouts, and computes the same output as the source model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import ZImageTransformer2DModel

import alkahest as ak

Inputs = tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    model = tiny.model(9)
    folder = tmp_path_factory.mktemp("source")
    model.save_pretrained(folder / "transformer")
    return model, folder / "transformer"


def drawn(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(0)
    latents = [torch.randn(4, 1, 8, 12), torch.randn(4, 1, 8, 12)]
    captions = [torch.randn(7, 40), torch.randn(33, 40)]
    with torch.no_grad():
        return torch.stack(model(latents, torch.tensor([0.3, 0.9]), captions, return_dict=False)[0])


@pytest.mark.parametrize("layout", ["native", "diffusers", "all-in-one"])
def test_from_single_file(layout: str, source: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    model, folder = source
    path = tmp_path / "out.safetensors"
    if layout == "all-in-one":  # as CheckpointSave of ComfyUI writes it
        stored = {
            "model.diffusion_model." + name: value for name, value in tiny.native(dict(model.state_dict())).items()
        }
        opened = ak.open(tiny.write(tmp_path / "aio.safetensors", {**stored, "vae.x": torch.ones(1)}, torch.float32))
        opened.save(path)
    else:
        ak.open(folder).save(path, layout=layout)
    loaded = ZImageTransformer2DModel.from_single_file(path, config=str(folder), local_files_only=True)
    assert torch.equal(drawn(loaded), drawn(model))


@pytest.mark.parametrize("shard", [None, "700KB"])
def test_from_pretrained(shard: str | None, source: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    model, folder = source
    native = ak.open(folder).save(tmp_path / "native.safetensors").path
    for number, opened in enumerate([ak.open(folder), ak.open(native)]):
        out = tmp_path / f"out{number}"
        opened.save(out, layout="diffusers", max_shard_size=shard)
        if number == 1:  # nothing in a native file tells the rotary axes' lengths
            config = json.loads((out / "config.json").read_text())
            assert [
                config[name] for name in ("dim", "n_layers", "n_heads", "cap_feat_dim", "in_channels", "axes_dims")
            ] == [
                96,
                2,
                3,
                40,
                4,
                [8, 12, 12],
            ]
        loaded = ZImageTransformer2DModel.from_pretrained(out, dtype=torch.float32)
        torch.testing.assert_close(drawn(loaded), drawn(model), rtol=0, atol=0)


def test_a_merge_draws_what_the_merged_state_draws(source: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    model, folder = source
    other = tiny.model(10)
    other.save_pretrained(tmp_path / "other")
    merged = ak.lerp(ak.open(folder), ak.open(tmp_path / "other"), 0.25)
    merged.save(tmp_path / "merged.safetensors")
    loaded = ZImageTransformer2DModel.from_single_file(
        tmp_path / "merged.safetensors", config=str(folder), local_files_only=True
    )
    by_hand = tiny.model(0)
    state = model.state_dict()
    by_hand.load_state_dict({key: value + 0.25 * (other.state_dict()[key] - value) for key, value in state.items()})
    torch.testing.assert_close(drawn(loaded), drawn(by_hand), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(drawn(loaded), drawn(model))

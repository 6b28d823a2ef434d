from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import alkahest as ak
from alkahest.errors import FileFormatError, MismatchError, UnknownNameError, UnsupportedError


def test_the_transformer_is_the_merged_file(trio: dict[str, Path], parts: dict[str, Any], tmp_path: Path) -> None:
    bridge, variant, base = (ak.open(trio[name]) for name in ("bridge", "variant", "base"))
    merged = bridge.protect("refiner") + 3 * (variant - base)
    pipe = ak.pipeline(merged, parts)
    merged.save(tmp_path / "out.safetensors", dtype="fp32")
    reference = ak.open(tmp_path / "out.safetensors")
    for key, value in pipe.transformer.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, reference[key]), key
    assert pipe.vae is parts["vae"]
    assert not any(parameter.requires_grad for parameter in pipe.transformer.parameters())


def test_components_from_a_folder_and_from_a_pipeline(
    trio: dict[str, Path], parts: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "whole"
    tiny.reference(tiny.model(5), parts).save_pretrained(folder)
    base = ak.open(trio["base"])
    from_folder = ak.pipeline(base, folder)
    shared = ak.pipeline(base, from_folder)
    assert shared.text_encoder is from_folder.text_encoder
    own = ak.pipeline(ak.open(folder))  # a pipeline folder brings its own components
    latents = torch.randn(1, 4, 12, 20)
    for pipe in (from_folder, own):
        assert torch.equal(pipe.vae.decode(latents).sample, parts["vae"].decode(latents).sample)
    assert torch.equal(own.transformer.state_dict()["x_pad_token"], tiny.state(5)["x_pad_token"])


def test_fp8_storage_computes_in_the_wider_dtype(trio: dict[str, Path], parts: dict[str, Any]) -> None:
    base = ak.open(trio["base"])
    pipe = ak.pipeline(base, parts, dtype="bf16", storage="fp8")
    weights = pipe.transformer.state_dict()
    key = "layers.1.feed_forward.w2.weight"
    assert weights[key].dtype == torch.float8_e4m3fn
    assert torch.equal(weights[key].float(), base[key].float().to(torch.float8_e4m3fn).float())
    assert weights["t_embedder.mlp.0.weight"].dtype == torch.bfloat16
    images = ak.sample(pipe, "a red ball", steps=2, cfg=1).images
    assert images[0].size == (24, 24)


def test_what_does_not_fit_is_refused(trio: dict[str, Path], parts: dict[str, Any], tmp_path: Path) -> None:
    base = ak.open(trio["base"])
    from transformers import Qwen3Config, Qwen3Model

    wide = Qwen3Model(Qwen3Config(hidden_size=56, num_hidden_layers=2, intermediate_size=8, vocab_size=9, head_dim=8))
    with pytest.raises(MismatchError, match=r"text encoder does not fit[^$]*text width 40[^$]*56"):
        ak.pipeline(base, {**parts, "text_encoder": wide})
    with pytest.raises(FileFormatError, match=r"vae missing"):
        ak.pipeline(base, {name: part for name, part in parts.items() if name != "vae"})
    with pytest.raises(UnknownNameError, match=r"'vea'[^$]*did you mean 'vae'"):
        ak.pipeline(base, {"vea": parts["vae"]})
    with pytest.raises(FileFormatError, match="components are needed"):
        ak.pipeline(base)
    with pytest.raises(FileFormatError, match="no such folder"):
        ak.pipeline(base, tmp_path / "absent" / "folder")
    with pytest.raises(FileFormatError, match="no diffusers pipeline"):
        ak.pipeline(base, tmp_path)
    with pytest.raises(UnknownNameError, match="bf61"):
        ak.pipeline(base, parts, dtype="bf61")
    with pytest.raises(MismatchError, match="weights are needed"):
        ak.pipeline(base - ak.open(trio["variant"]), parts)  # type: ignore[arg-type]
    if not torch.accelerator.is_available():
        with pytest.raises(UnsupportedError, match="needs a GPU"):
            ak.pipeline(base, parts, offload=True)


def test_a_folder_without_a_component_is_named(trio: dict[str, Path], parts: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "whole"
    tiny.reference(tiny.model(5), parts).save_pretrained(folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(FileFormatError, match="vae missing"):
        ak.pipeline(ak.open(trio["base"]), folder)

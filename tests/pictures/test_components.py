"""ComfyUI's single files as pipeline components, made by hand from diffusers' and transformers' own models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file

import alkahest as ak
from alkahest.errors import AlkahestError, FileFormatError, MismatchError, UnsupportedError


def text_encoder() -> Any:
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )
    return Qwen3Model(config).eval()


def vae() -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(4)
    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=2,
        norm_num_groups=32,
        sample_size=1024,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    ).eval()


def original_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' VAE names -> those of FLUX's ae.safetensors, written out by hand for two levels."""
    renamed = {}
    for name, value in state.items():
        old = name.replace("down_blocks.", "down.").replace("up_blocks.0.", "up.1.").replace("up_blocks.1.", "up.0.")
        old = old.replace(".resnets.", ".block.").replace("conv_norm_out", "norm_out")
        old = old.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        old = old.replace("mid_block.block.0", "mid.block_1").replace("mid_block.block.1", "mid.block_2")
        old = old.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_shortcut", "nin_shortcut")
        for new, short in (
            ("group_norm", "norm"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "proj_out"),
        ):
            if "attn_1" in old:
                old = old.replace(f".{new}.", f".{short}.")
        if "attn_1" in old and value.ndim == 2:
            value = value[:, :, None, None]  # 1 x 1 convolutions there
        renamed[old] = value.contiguous()
    return renamed


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from alkahest.experiment.growing.models import tokenizer

    folder = tmp_path_factory.mktemp("comfy")
    encoder = {f"model.{name}": value for name, value in text_encoder().state_dict().items()}
    save_file(encoder, folder / "qwen.safetensors")
    save_file(original_names(vae().state_dict()), folder / "ae.safetensors")
    words = tokenizer(["a red ball"])
    words.chat_template = "{{ 'You are Qwen' }}"
    words.save_pretrained(folder / "tokenizer")
    return {
        "text_encoder": folder / "qwen.safetensors",
        "vae": folder / "ae.safetensors",
        "tokenizer": folder / "tokenizer",
    }


def test_single_files_are_the_models_they_came_from(trio: dict[str, Path], files: dict[str, Path]) -> None:
    pipe = ak.pipeline(ak.open(trio["base"]), files)
    ids = torch.tensor([[5, 9, 2, 17]])
    with torch.no_grad():
        mine = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        theirs = text_encoder()(ids, output_hidden_states=True).hidden_states[-2]
        assert torch.equal(mine, theirs)
        latents = torch.randn(1, 4, 6, 10)
        assert torch.allclose(pipe.vae.decode(latents).sample, vae().decode(latents).sample, atol=1e-5)
    assert (pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor) == (0.3611, 0.1159)
    said = pipe.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert said == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert ak.sample(pipe, "a ball", steps=1, cfg=2, width=16, height=24).images[0].size == (16, 24)


def test_scaled_fp8_text_encoder(trio: dict[str, Path], files: dict[str, Path], tmp_path: Path) -> None:
    state = text_encoder().state_dict()
    stored: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if value.ndim == 2 and "proj" in name:
            scale = value.abs().max() / 448
            stored[f"model.{name}"] = (value / scale).to(torch.float8_e4m3fn)
            stored[f"model.{name.removesuffix('.weight')}.weight_scale"] = scale.reshape(())
        else:
            stored[f"model.{name}"] = value.to(torch.bfloat16)
    save_file(stored, tmp_path / "q.safetensors")
    try:
        pipe = ak.pipeline(ak.open(trio["base"]), {**files, "text_encoder": tmp_path / "q.safetensors"})
    except (FileFormatError, UnsupportedError) as error:
        pytest.fail(str(error))
    key = "layers.1.mlp.up_proj.weight"
    expected = stored[f"model.{key}"].float() * stored["model.layers.1.mlp.up_proj.weight_scale"]
    assert torch.equal(pipe.text_encoder.state_dict()[key], expected)


def test_wrong_files_are_named(trio: dict[str, Path], files: dict[str, Path], tmp_path: Path) -> None:
    base = ak.open(trio["base"])
    with pytest.raises(FileFormatError, match=r"another kind of file[^$]*embed_tokens"):
        ak.pipeline(base, {**files, "text_encoder": files["vae"]})
    with pytest.raises(FileFormatError, match=r"another kind of file[^$]*decoder.conv_in"):
        ak.pipeline(base, {**files, "vae": trio["base"]})
    with pytest.raises(FileFormatError, match="no such file"):
        ak.pipeline(base, {**files, "vae": tmp_path / "ae.safetensors"})
    with pytest.raises(FileFormatError, match="tokenizer missing"):
        ak.pipeline(base, {name: path for name, path in files.items() if name != "tokenizer"})
    with pytest.raises(FileFormatError, match="tokenizer does not load"):
        ak.pipeline(base, {**files, "tokenizer": tmp_path})
    cut = {f"model.{n}": v for n, v in text_encoder().state_dict().items() if n != "layers.2.mlp.up_proj.weight"}
    save_file(cut, tmp_path / "cut.safetensors")
    with pytest.raises(MismatchError, match=r"not a Qwen3[^$]*layers.2.mlp.up_proj.weight[^$]*no such tensor"):
        ak.pipeline(base, {**files, "text_encoder": tmp_path / "cut.safetensors"})
    (tmp_path / "short.safetensors").write_bytes(files["vae"].read_bytes()[:2000])
    with pytest.raises(AlkahestError):
        ak.pipeline(base, {**files, "vae": tmp_path / "short.safetensors"})


def test_a_mapping_of_loaded_parts_needs_no_scheduler(trio: dict[str, Path], parts: dict[str, Any]) -> None:
    given = {name: part for name, part in parts.items() if name != "scheduler"}
    pipe = ak.pipeline(ak.open(trio["base"]), given)
    one = list(ak.sample(pipe, "a tree", steps=2, cfg=1))[-1].latents
    two = list(ak.sample(tiny.reference(pipe.transformer, parts), "a tree", steps=2, cfg=1))[-1].latents
    assert torch.equal(one, two)

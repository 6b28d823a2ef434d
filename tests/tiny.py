"""Small Z-Image models as tests need them: real diffusers weights, written without our own code."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# No two sizes are equal, so that a transposition shows.
CONFIG = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 4,
    "dim": 96,
    "n_layers": 2,
    "n_refiner_layers": 2,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": 40,
    "axes_dims": [8, 12, 12],
    "axes_lens": [128, 32, 32],
}
LINEARS = ("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
State = dict[str, torch.Tensor]


def model(seed: int = 0, **changes: Any) -> torch.nn.Module:
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(seed)
    made = ZImageTransformer2DModel(**{**CONFIG, **changes})
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1 if "norm" in name else 0.05)
    return made.eval()


@functools.lru_cache(maxsize=8)
def _state(seed: int, layers: int) -> State:
    return {name: value.detach().clone() for name, value in model(seed, n_layers=layers).state_dict().items()}


def state(seed: int = 0, layers: int = 2) -> State:
    """Float32 weights under diffusers' names."""
    return dict(_state(seed, layers))


def near(values: State, share: float, seed: int) -> State:
    """A variant whose difference is about ``share`` of each tensor."""
    torch.manual_seed(seed)
    return {name: value + share * value.std() * torch.randn_like(value) for name, value in values.items()}


def native(values: State) -> State:
    """The same weights under ComfyUI's names, written out by hand."""
    result: State = {}
    for name, value in values.items():
        if ".attention.to_q." in name:
            others = [values[name.replace("to_q", which)] for which in ("to_k", "to_v")]
            result[name.replace("to_q", "qkv")] = torch.cat([value, *others])
        elif ".attention.to_k." in name or ".attention.to_v." in name:
            continue
        else:
            for old, new in {
                "all_x_embedder.2-1.": "x_embedder.",
                "all_final_layer.2-1.": "final_layer.",
                "attention.to_out.0.": "attention.out.",
                "norm_q.": "q_norm.",
                "norm_k.": "k_norm.",
            }.items():
                name = name.replace(old, new)
            result[name] = value
    return result


def write(
    path: Path,
    values: State,
    dtype: torch.dtype = torch.bfloat16,
    prefix: str = "",
    metadata: dict[str, str] | None = None,
) -> Path:
    stored = {
        prefix + name: value.to(dtype).contiguous() if value.is_floating_point() else value
        for name, value in values.items()
    }
    save_file(stored, path, metadata=metadata)
    return path


def scaled(values: State, spelling: str, kind: torch.dtype = torch.float8_e4m3fn) -> tuple[State, dict[str, str]]:
    """Native weights as scaled fp8, in one of three spellings: tensors and metadata."""
    result: State = {}
    metadata: dict[str, str] = {}
    layers = {}
    for name, value in values.items():
        module = name.removesuffix(".weight")
        if not module.endswith(LINEARS):
            result[name] = value.to(torch.bfloat16)
            continue
        largest = torch.finfo(kind).max
        scale = (value.abs().max() / largest).float()
        result[name] = (value / scale).clamp(-largest, largest).to(kind)
        result[f"{module}.{'scale_weight' if spelling == 'scaled_fp8' else 'weight_scale'}"] = scale
        form = str(kind).removeprefix("torch.")
        layers[module] = {"format": form}
        if spelling == "comfy_quant":
            result[f"{module}.comfy_quant"] = torch.tensor(
                list(json.dumps({"format": form}).encode()), dtype=torch.uint8
            )
    if spelling == "scaled_fp8":
        result["scaled_fp8"] = torch.empty(0, dtype=kind)
    if spelling == "header":
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    return result, metadata


def meaning(stored: State) -> State:
    """What scaled tensors stand for, in float64, by hand."""
    result = {}
    for name, value in stored.items():
        if name.endswith((".weight_scale", ".scale_weight", ".comfy_quant")) or name == "scaled_fp8":
            continue
        module = name.removesuffix(".weight")
        scale = stored.get(f"{module}.weight_scale", stored.get(f"{module}.scale_weight"))
        result[name] = value.double() * (1.0 if scale is None else scale.double())
    return result


def write_scaled(path: Path, values: State, spelling: str, kind: torch.dtype = torch.float8_e4m3fn) -> Path:
    stored, metadata = scaled(values, spelling, kind)
    save_file(stored, path, metadata=metadata or None)
    return path


def components() -> dict[str, Any]:
    """An untrained text encoder, tokenizer, VAE (2 pixels a latent) and scheduler that fit `model`."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from transformers import Qwen3Config, Qwen3Model

    from alkahest.experiment.growing.models import tokenizer

    words = tokenizer(["a red ball at night", "a blue box"])
    torch.manual_seed(7)
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=CONFIG["cap_feat_dim"],
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
    )
    vae = AutoencoderKL(
        latent_channels=CONFIG["in_channels"],
        block_out_channels=(8, 12),
        norm_num_groups=4,
        sample_size=24,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.8,
        shift_factor=0.1,
    )
    return {
        "text_encoder": Qwen3Model(config).eval(),
        "tokenizer": words,
        "vae": vae.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=6.0),
    }


def reference(transformer: torch.nn.Module, parts: dict[str, Any]) -> Any:
    """diffusers' own pipeline, put together by hand."""
    from diffusers import ZImagePipeline

    pipe = ZImagePipeline(transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe

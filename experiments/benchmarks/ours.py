"""Alkahest's side of each benchmark."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from measured import run_job

K = 0.7  # a multiplier that is no power of two
LIVE: dict[str, Any] = {}


def opened(folder: Path, *names: str) -> list[Any]:
    import alkahest as ak

    return [ak.open(folder / f"{name}.safetensors") for name in names]


def merge(folder: Path, threads: int) -> None:
    bridge, variant, base = opened(folder, "bridge", "variant", "base")
    (bridge + K * (variant - base)).save(folder / "out.safetensors", dtype="bf16", threads=threads)


def table(folder: Path, threads: int) -> None:
    import alkahest as ak

    variant, base = opened(folder, "variant", "base")
    ak.delta_table(variant - base, threads=threads)


def lora(folder: Path, threads: int, layers: str = "layers.0") -> None:
    import alkahest as ak

    variant, base = opened(folder, "variant", "base")
    ak.extract_lora((variant - base).only(layers), energy=0.995, threads=threads).save(folder / "lora.safetensors")


def whole_lora(folder: Path, threads: int) -> None:
    lora(folder, threads, "all")


def open_and_print(folder: Path, threads: int) -> None:
    repr(opened(folder, "base")[0])


def live_set(folder: Path, threads: int) -> None:
    LIVE["model"].set({"k": 2.0})


def prepare() -> None:
    import pandas  # noqa: F401
    import torch  # noqa: F401


def prepare_live() -> None:
    import torch

    import alkahest as ak

    torch.set_num_threads(int(sys.argv[3]))
    variant, base = opened(Path(sys.argv[2]), "variant", "base")
    expression = base + ak.param("k", 1.0) * (variant - base).only("layers")
    LIVE["model"] = ak.LiveModel(expression, components=small_parts(), memory="6GB")
    LIVE["model"].set({"k": 1.5})  # inputs are held from the second change on


def small_parts() -> dict[str, Any]:
    """A text encoder, tokenizer and VAE that fit a real transformer and weigh nothing: only the transformer is
    rewritten.
    """
    from diffusers import AutoencoderKL
    from transformers import Qwen3Config, Qwen3Model

    import alkahest as ak

    config = Qwen3Config(
        vocab_size=8,
        hidden_size=2560,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=16, norm_num_groups=2)
    return {"text_encoder": Qwen3Model(config), "tokenizer": ak.mini.components() / "tokenizer", "vae": vae}


def import_torch(folder: Path, threads: int) -> None:
    import torch  # noqa: F401


def import_alkahest(folder: Path, threads: int) -> None:
    import alkahest as ak

    ak.open, ak.lerp  # noqa: B018 - what they stand on is imported when they are first named


def nothing() -> None:
    """Importing is what is measured."""


def with_torch() -> None:
    import torch  # noqa: F401


if __name__ == "__main__":
    run_job(
        {
            "merge": (prepare, merge),
            "table": (prepare, table),
            "lora": (prepare, lora),
            "whole lora": (prepare, whole_lora),
            "open": (prepare, open_and_print),
            "live": (prepare_live, live_set),
            "import": (with_torch, import_alkahest),
            "import torch": (nothing, import_torch),
        }
    )

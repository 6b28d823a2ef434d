"""What ships of the miniature family: names, files, and how they were made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alkahest.errors import FileFormatError
from alkahest.model.families import Sizes

WEIGHTS = Path(__file__).with_name("weights")

FAMILY = {
    "base": "the Base lineage: shaded pictures; 24 steps, cfg 3",
    "turbo": "the Turbo lineage: flat outlined pictures in few steps; 8 steps, cfg 1",
    "deturbo": "Turbo trained on its own pictures until guidance works again; 24 steps, cfg 3",
    "base-variant": "Base that learned a new colour, cyan; refiners untouched",
    "turbo-variant": "De-Turbo that learned a new subject, the heart; refiners untouched",
    "base-weak": "base-variant's lesson at a strength that does not show at 1x; in float32",
    "base-weak-bf16": "base-weak as its file would be saved by most: in bfloat16",
    "base-refiner-trained": "Base trained on sketches, its refiners most of all",
    "tb0": "bridge: Turbo + Base, averaged refiners frozen, trained on people; 24 steps, cfg 3",
    "tb1": "bridge: De-Turbo + Base, averaged refiners frozen, trained on their own pictures; 24 steps, cfg 3",
}
LORAS = {
    "base-lora": "general LoRA of Base: pictures as sketches",
    "turbo-lora": "general LoRA of De-Turbo: pictures as sketches",
    "base-distill-lora": "distill LoRA of Base: 4 steps, cfg 1",
    "turbo-distill-lora": "distill LoRA of De-Turbo: 4 steps, cfg 1",
}


def family() -> dict[str, str]:
    """Name -> what it is, for every checkpoint of the family; `loras` names its LoRAs."""
    return dict(FAMILY)


def loras() -> dict[str, str]:
    """Name -> what it is, for every LoRA of the family."""
    return dict(LORAS)


def components() -> Path:
    """The pipeline folder with text encoder, tokenizer, VAE and scheduler that all members share."""
    return require_shipped(WEIGHTS / "components")


def manifest() -> dict[str, Any]:
    """How each shipped file was made: BLAKE3, seed, steps, seconds, data."""
    read: dict[str, Any] = json.loads(require_shipped(WEIGHTS / "manifest.json").read_text())
    return read


def is_miniature(sizes: Sizes) -> bool:
    """Whether weights have the family's sizes, so that its components fit them."""
    return (sizes.width, sizes.text_width, sizes.latent_channels) == (96, 64, 16)


def require_shipped(path: Path) -> Path:
    """A file that must have been shipped; FileFormatError otherwise."""
    if not path.exists():
        raise FileFormatError(
            "mini",
            "a file of the miniature family is missing",
            file=path,
            fix="install the package again, or rebuild it: alkahest mini build",
        )
    return path

"""The miniature family: real Z-Image models small enough to ship, whose lineages do not mix.

>>> base, turbo = ak.mini.load("base"), ak.mini.load("turbo")
>>> ak.sample(ak.pipeline(base), "a red ball on the left of a meadow at night", cfg=3).images[0]

Made by ``alkahest mini build``; README.md beside this file says what they can do, with numbers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alkahest.checkpoint import Checkpoint
from alkahest.checkpoint import open as open_checkpoint
from alkahest.errors import FileFormatError, UnknownNameError, nearest

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


def load(name: str) -> Checkpoint:
    """One member of the family as a Checkpoint: ``ak.mini.load("turbo")``."""
    if name not in FAMILY:
        raise UnknownNameError("mini.load", "no such member of the family", found=repr(name), fix=nearest(str(name), FAMILY))  # fmt: skip
    return open_checkpoint(_existing(WEIGHTS / f"{name}.safetensors"))


def lora(name: str) -> Path:
    """The file of one LoRA of the family, for ``pipe.load_lora_weights``."""
    if name not in LORAS:
        raise UnknownNameError("mini.lora", "no such LoRA in the family", found=repr(name), fix=nearest(str(name), LORAS))  # fmt: skip
    return _existing(WEIGHTS / f"{name}.safetensors")


def components() -> Path:
    """The pipeline folder with text encoder, tokenizer, VAE and scheduler that all members share."""
    return _existing(WEIGHTS / "components")


def save_pipeline(name: str, folder: str | Path) -> Path:
    """Write a member as a pipeline folder, which ``ZImagePipeline.from_pretrained(folder)`` loads as it is.

    >>> ak.mini.save_pipeline("turbo", "mini-turbo")

    The folder must not exist yet, or be empty. Transformer in diffusers layout, 4 MB in all.
    """
    member, target = load(name), Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileFormatError("mini.save_pipeline", "there is something in the way", file=target, fix="another name, or an empty folder")  # fmt: skip
    shutil.copytree(components(), target, dirs_exist_ok=True)
    member.save(target / "transformer", layout="diffusers")
    return target


def manifest() -> dict[str, Any]:
    """How each shipped file was made: BLAKE3, seed, steps, seconds, data."""
    read: dict[str, Any] = json.loads(_existing(WEIGHTS / "manifest.json").read_text())
    return read


def is_miniature(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether weights have the family's sizes, so that its components fit them."""
    return shapes.get("cap_embedder.1.weight") == (96, 64) and shapes.get("all_x_embedder.2-1.weight") == (96, 64)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileFormatError("mini", "a file of the miniature family is missing", file=path, fix="install the package again, or rebuild it: alkahest mini build")  # fmt: skip
    return path

"""The members of the miniature family, opened."""

from __future__ import annotations

import shutil
from pathlib import Path

from alkahest.errors import FileFormatError, unknown
from alkahest.mini.shipped import FAMILY, LORAS, WEIGHTS, components, require_shipped
from alkahest.sources.checkpoint import Checkpoint
from alkahest.sources.checkpoint import open as open_checkpoint


def load(name: str) -> Checkpoint:
    """One member of the family as a Checkpoint: ``ak.mini.load("turbo")``."""
    if name not in FAMILY:
        raise unknown("mini.load", "no such member of the family", name, FAMILY)
    return open_checkpoint(require_shipped(WEIGHTS / f"{name}.safetensors"))


def lora(name: str) -> Path:
    """The file of one LoRA of the family, for ``pipe.load_lora_weights``."""
    if name not in LORAS:
        raise unknown("mini.lora", "no such LoRA in the family", name, LORAS)
    return require_shipped(WEIGHTS / f"{name}.safetensors")


def save_pipeline(name: str, folder: str | Path) -> Path:
    """Write a member as a pipeline folder, which ``ZImagePipeline.from_pretrained(folder)`` loads as it is.

    >>> ak.mini.save_pipeline("turbo", "mini-turbo")

    The folder must not exist yet, or be empty. Transformer in diffusers layout, 4 MB in all.
    """
    member, target = load(name), Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileFormatError(
            "mini.save_pipeline", "there is something in the way", file=target, fix="another name, or an empty folder"
        )
    shutil.copytree(components(), target, dirs_exist_ok=True)
    member.save(target / "transformer", layout="diffusers")
    return target

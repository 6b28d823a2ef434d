"""The members of the miniature family, opened."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from alkahest.errors import FileFormatError, unknown
from alkahest.mini.scenes import NEW_COLOUR, NEW_SUBJECT, held_out_prompts
from alkahest.mini.shipped import FAMILY, LORAS, WEIGHTS, components, require_shipped
from alkahest.sources.checkpoint import Checkpoint
from alkahest.sources.checkpoint import open as open_checkpoint

# What prompts have to name for a derivative to show what it learned; styles come unasked.
_LESSONS: dict[str, dict[str, Any]] = {
    "base-variant": {"colour": NEW_COLOUR},
    "base-weak": {"colour": NEW_COLOUR},
    "base-weak-bf16": {"colour": NEW_COLOUR},
    "turbo-variant": {"subject": NEW_SUBJECT},
}


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


def prompts(name: str, count: int = 24, seed: int = 0) -> list[str]:
    """Prompts that nobody trained on and that ask for what a derivative learned, if prompts have to name it.

    Examples
    --------
    >>> ak.mini.prompts("base-variant", count=2)
    ['a cyan cone on the left of a city at sunset, high quality',
     'a cyan tree in the middle of a city at sunset, high quality']
    """
    if name not in (known := {**FAMILY, **LORAS}):
        raise unknown("mini.prompts", "no such member of the family", name, known)
    lesson = _LESSONS.get(name, {})
    return [replace(scene, **lesson).caption() for scene in held_out_prompts(count, seed)]


def save_pipeline(name: str, folder: str | Path) -> Path:
    """Write a member as a pipeline folder, which ``ZImagePipeline.from_pretrained(folder)`` loads as it is.

    The folder must not exist yet, or be empty. Transformer in diffusers layout, 4 MB in all.

    Examples
    --------
    >>> ak.mini.save_pipeline("turbo", "mini-turbo")
    """
    member, target = load(name), Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileFormatError(
            "mini.save_pipeline", "there is something in the way", file=target, fix="another name, or an empty folder"
        )
    shutil.copytree(components(), target, dirs_exist_ok=True)
    member.save(target / "transformer", layout="diffusers")
    return target

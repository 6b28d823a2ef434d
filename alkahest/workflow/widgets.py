"""The names of a node's widgets, in the order of ``widgets_values``: files of the editor often do not say them.

Core's are from ComfyUI's ``/object_info`` (its version is in ``core_widgets.json``), with what the editor adds behind
a seed, ``control_after_generate``; later nodes and those of others are from their sources.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

_LORA_STACK = tuple(name for n in range(1, 5) for name in (f"lora_{n:02}", f"strength_{n:02}"))
_CR_STACK = tuple(
    name for n in range(1, 4) for name in (f"switch_{n}", f"lora_name_{n}", f"model_weight_{n}", f"clip_weight_{n}")
)
_LAYERS = tuple(f"layers.{n}." for n in range(30))
_Z_IMAGE = (
    "cap_embedder.",
    "cap_pad_token",
    *(f"context_refiner.{n}." for n in range(2)),
    *_LAYERS,
    *(f"noise_refiner.{n}." for n in range(2)),
    "final_layer.",
    "t_embedder.",
    "x_embedder.",
    "x_pad_token",
)
_ZIT_GROUPS = [
    "early",
    "lowmid",
    "upmid",
    "late",
    "x_embedder",
    "t_embedder",
    "cap_embedder",
    "refiners",
    "final",
    "other",
]
_ZIT_BLOCKS = (*(f"layer_{n}" for n in range(30)), "context_refiner", "noise_refiner", "final_layer", "norm_final")
OTHERS: Mapping[str, Sequence[str]] = {
    "LoraLoaderBypassModelOnly": ("lora_name", "strength_model"),
    "LoraLoaderBypass": ("lora_name", "strength_model", "strength_clip"),
    "ComfySwitchNode": ("switch",),
    "DiffusionModelLoaderKJ": (
        "model_name",
        "weight_dtype",
        "compute_dtype",
        "patch_cublaslinear",
        "sage_attention",
        "enable_fp16_accumulation",
    ),
    "UnetLoaderGGUF": ("unet_name",),
    "CLIPLoaderGGUF": ("clip_name", "type"),
    "Lora Loader Stack (rgthree)": _LORA_STACK,
    "CR LoRA Stack": _CR_STACK,
    "ModelMergeZImage": _Z_IMAGE,
    "EasygoingNodes_ModelMergeZImage": _Z_IMAGE,
    "ModelMergeZIT": (*_ZIT_GROUPS, "granularity", *_ZIT_BLOCKS),
    "AlkahestMerge": ("multiplier", "protect", "parts"),
    "AlkahestSubtract": ("multiplier", "keep_refiner"),
    "AlkahestAdd": ("multiplier", "keep_refiner"),
    "AlkahestMultiplier": ("basis", "target"),
    "AlkahestSupplement": ("energy", "rank_max", "exclude", "filename_prefix"),
    "AlkahestSave": ("filename_prefix",),
}


@functools.cache
def core() -> Mapping[str, Sequence[str]]:
    """Core's nodes and their widgets."""
    return dict(json.loads((files("alkahest.workflow") / "core_widgets.json").read_text())["nodes"])


def widget_names(kind: str, listed: Sequence[str], values: Sequence[Any]) -> Sequence[str] | None:
    """The names that belong to ``values``: those that the file lists if it lists all, else the known ones; or none.

    >>> widget_names("CLIPLoader", ["clip_name"], ["qwen_3_4b.safetensors", "lumina2", "default"])
    ['clip_name', 'type', 'device']
    """
    if len(listed) == len(values):
        return listed
    return OTHERS.get(kind) or core().get(kind)


def lora_lines(kind: str, values: Sequence[Any]) -> dict[str, Any]:
    """The inputs that nodes with widgets of their own making send: a line for each LoRA."""
    lines = [one for one in values if isinstance(one, Mapping) and "lora" in one]
    if kind == "Power Lora Loader (rgthree)":
        return {f"lora_{number}": dict(line) for number, line in enumerate(lines, 1)}
    if kind == "Lora Loader (LoraManager)":
        rows = next((one for one in values if isinstance(one, list)), [])
        return {"text": next((one for one in values if isinstance(one, str)), ""), "loras": {"__value__": rows}}
    return {}

"""ComfyUI nodes that measure a difference: the multiplier that it needs, and a LoRA of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from alkahest.errors import UnsupportedError
from alkahest.nodes.merging import CATEGORY
from alkahest.nodes.patches import require_same


class AlkahestMultiplier:
    """The multiplier with which a difference takes effect on a bridge, and a report of every basis."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "variant": ("MODEL",), "base": ("MODEL",), "bridge": ("MODEL",),
                "basis": (["relative", "survival", "bridge"], {"default": "relative", "tooltip": "relative: reach a share of the bridge's norm; survival: outlive rounding; bridge: the bridge's own distance"}),
                "target": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.005, "round": False, "tooltip": "what the basis aims at; 0 for its default"}),
            }
        }  # fmt: skip

    RETURN_TYPES = ("FLOAT", "STRING")
    RETURN_NAMES = ("multiplier", "report")
    FUNCTION = "measure"
    CATEGORY = CATEGORY
    OUTPUT_NODE = True
    DESCRIPTION = "How far variant - base must be multiplied to take effect on the bridge, refiner left out; one pass over the three models. The report has every basis, by part, ComfyUI's factor pair and warnings."  # fmt: skip

    def measure(self, variant: Any, base: Any, bridge: Any, basis: str, target: float) -> dict[str, Any]:
        require_same("Alkahest Multiplier", {"variant": variant, "base": base, "bridge": bridge})
        _require_pandas("Alkahest Multiplier")
        from alkahest.multiplier import stream_needed_multiplier
        from alkahest.nodes.model import ModelWeights

        v, b, a = ModelWeights(variant, "variant"), ModelWeights(base, "base"), ModelWeights(bridge, "bridge")
        found = with_progress(stream_needed_multiplier(v - b, a.protect("refiner"), basis, target or None))
        report = repr(found)
        return {"ui": {"text": [report]}, "result": (float(found), report)}


class AlkahestSupplement:
    """A LoRA of ``variant - base``, written for ComfyUI and diffusers."""

    def __init__(self) -> None:
        import folder_paths

        self.output_dir = folder_paths.get_output_directory()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "base": ("MODEL", {"tooltip": "what the LoRA will be added to: the bridge"}),
                "variant": ("MODEL", {"tooltip": "what it leads to: Base, De-Turbo, ..."}),
                "energy": ("FLOAT", {"default": 0.995, "min": 0.01, "max": 1.0, "step": 0.001, "round": False, "tooltip": "share of the squared singular values that is kept"}),
                "rank_max": ("INT", {"default": 64, "min": 0, "max": 4096, "tooltip": "0 for no cap"}),
                "exclude": ("STRING", {"default": "refiner"}),
                "filename_prefix": ("STRING", {"default": "loras/supplement"}),
            }
        }  # fmt: skip

    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    FUNCTION = "extract"
    CATEGORY = CATEGORY
    OUTPUT_NODE = True
    DESCRIPTION = "Extract variant - base as a LoRA whose names ComfyUI and diffusers both load in full. Used at low strength on the bridge it pulls it toward one lineage."  # fmt: skip

    def extract(self, base: Any, variant: Any, energy: float, rank_max: int, exclude: str, filename_prefix: str) -> dict[str, Any]:  # fmt: skip
        require_same("Alkahest Supplement LoRA", {"base": base, "variant": variant})
        _require_pandas("Alkahest Supplement LoRA")
        import folder_paths

        from alkahest.lora.extract import stream_extract_lora
        from alkahest.nodes.model import ModelWeights

        folder, name, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, self.output_dir)
        delta = ModelWeights(variant, "variant") - ModelWeights(base, "base")
        lora = with_progress(stream_extract_lora(delta, energy=energy, rank_max=rank_max or None, exclude=exclude.strip() or None))  # fmt: skip
        path = os.path.join(folder, f"{name}_{counter:05}_.safetensors")
        lora.save(path)
        report = f"{path}\n{lora!r}"
        return {"ui": {"text": [report]}, "result": (report,)}


def with_progress(events: Iterator[Any]) -> Any:
    """Run a generator of events behind ComfyUI's progress bar, where its Cancel is heard; the result."""
    from comfy.model_management import throw_exception_if_processing_interrupted
    from comfy.utils import ProgressBar

    bar, event = None, None
    for event in events:
        bar = bar or ProgressBar(event.total)
        bar.update_absolute(event.done, event.total)
        throw_exception_if_processing_interrupted()
    return event.result if event is not None else None


def _require_pandas(operation: str) -> None:
    try:
        import blake3  # noqa: F401
        import pandas  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(operation, "ComfyUI's Python lacks a package", found=str(error), fix="with that Python: -m pip install pandas blake3") from None  # fmt: skip

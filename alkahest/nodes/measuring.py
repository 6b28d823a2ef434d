"""ComfyUI nodes that measure a difference: the multiplier that it needs, and a LoRA of it."""

from __future__ import annotations

from typing import Any

from alkahest.nodes.merging import STEP
from alkahest.nodes.patches import require_same
from alkahest.nodes.running import CATEGORY, GRAPH, SavingNode, report_of, require_packages, with_progress


class AlkahestMultiplier:
    """The multiplier with which a difference takes effect on a bridge, and a report of every basis."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "variant": ("MODEL",),
                "base": ("MODEL",),
                "bridge": ("MODEL",),
                "basis": (
                    ["relative", "survival", "bridge"],
                    {
                        "default": "relative",
                        "tooltip": (
                            "relative: reach a share of the bridge's norm; survival: outlive rounding; bridge: the "
                            "bridge's own distance"
                        ),
                    },
                ),
                "target": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 100.0,
                        "step": STEP,
                        "round": False,
                        "tooltip": "what the basis aims at; 0 for its default",
                    },
                ),
            },
            "hidden": GRAPH,
        }

    RETURN_TYPES = ("FLOAT", "STRING")
    RETURN_NAMES = ("multiplier", "report")
    FUNCTION = "measure"
    CATEGORY = CATEGORY
    OUTPUT_NODE = True
    DESCRIPTION = (
        "How far variant - base must be multiplied to take effect on the bridge, refiner left out; one pass over "
        "the three models. The report has every basis, by part, ComfyUI's factor pair and warnings."
    )

    def measure(
        self,
        variant: Any,
        base: Any,
        bridge: Any,
        basis: str,
        target: float,
        prompt: Any = None,
        unique_id: str = "",
    ) -> dict[str, Any]:
        models = {"variant": variant, "base": base, "bridge": bridge}
        require_same("Alkahest Multiplier", models)
        require_packages("Alkahest Multiplier")
        from alkahest.nodes.graph_files import weights_behind
        from alkahest.pictures.needed import stream_needed_multiplier

        behind = weights_behind("Alkahest Multiplier", models, prompt, unique_id)
        v, b, a = (behind.weights[name] for name in models)
        found = with_progress(stream_needed_multiplier(v - b, a.protect("refiner"), basis, target or None))
        return report_of("\n".join([repr(found), *behind.notes]), float(found))


class AlkahestSupplement(SavingNode):
    """A LoRA of ``variant - base``, written for ComfyUI and diffusers."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "base": ("MODEL", {"tooltip": "what the LoRA will be added to: the bridge"}),
                "variant": ("MODEL", {"tooltip": "what it leads to: Base, De-Turbo, ..."}),
                "energy": (
                    "FLOAT",
                    {
                        "default": 0.995,
                        "min": 0.01,
                        "max": 1.0,
                        "step": STEP,
                        "round": False,
                        "tooltip": "share of the squared singular values that is kept",
                    },
                ),
                "rank_max": ("INT", {"default": 64, "min": 0, "max": 4096, "tooltip": "0 for no cap"}),
                "exclude": ("STRING", {"default": "refiner"}),
                "filename_prefix": ("STRING", {"default": "loras/supplement"}),
            },
            "hidden": GRAPH,
        }

    FUNCTION = "extract"
    DESCRIPTION = (
        "Extract variant - base as a LoRA whose names ComfyUI and diffusers both load in full. Used at low strength "
        "on the bridge it pulls it toward one lineage."
    )

    def extract(
        self,
        base: Any,
        variant: Any,
        energy: float,
        rank_max: int,
        exclude: str,
        filename_prefix: str,
        prompt: Any = None,
        unique_id: str = "",
    ) -> dict[str, Any]:
        models = {"base": base, "variant": variant}
        require_same("Alkahest Supplement LoRA", models)
        require_packages("Alkahest Supplement LoRA")
        from alkahest.lora.extract import stream_extract_lora
        from alkahest.nodes.graph_files import weights_behind

        path = self.path(filename_prefix)
        behind = weights_behind("Alkahest Supplement LoRA", models, prompt, unique_id)
        delta = behind.weights["variant"] - behind.weights["base"]
        lora = with_progress(
            stream_extract_lora(delta, energy=energy, rank_max=rank_max or None, exclude=exclude.strip() or None)
        )
        lora.save(path)
        return report_of("\n".join([f"{path}\n{lora!r}", *behind.notes]))

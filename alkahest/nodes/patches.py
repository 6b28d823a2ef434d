"""ComfyUI's patches: what it would add to each weight of a model, and which weights it patches at all.

Source: ComfyUI's ``comfy/model_patcher.py`` (``_load_list``, ``get_key_patches``) and ``comfy/lora.py``
(``calculate_weight``); read and run in 0.14.1 and 0.33.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from alkahest.errors import MismatchError, UnknownNameError, nearest
from alkahest.model.families.zimage import FAMILY
from alkahest.model.keys import Pattern

PREFIX = "diffusion_model."
Patches = dict[str, list[Any]]
NOTHING = ("diff", (torch.zeros(1),))  # at strength 0: such a patch only multiplies what is there
ZERO = ("set", (torch.tensor([-0.0]),))  # a difference of -0: added to anything, -0 too, it changes no bit


def patchable(model: Any) -> list[str]:
    """The names of the weights of a MODEL that ComfyUI patches: parameters of modules with none below them.

    ``diffusion_model.x_pad_token`` and ``cap_pad_token`` are not among them.
    """
    found = []
    for name, module in model.model.named_modules():
        own = [one for one, _ in module.named_parameters(recurse=False)]
        if own and name.startswith(PREFIX.rstrip(".")) and len(own) == len(list(module.named_parameters())):
            found += [f"{name}.{one}" for one in own if one in ("weight", "bias")]  # and no scales of quantised ones
    return found


def key_patches(model: Any) -> Patches:
    """``model.get_key_patches``, for the weights that are patched; in 0.14 that call fails on scaled fp8."""
    from comfy.model_patcher import get_key_weight

    found: Patches = {}
    for key in patchable(model):
        weight, _, convert = get_key_weight(model.model, key)
        if key in model.backup:  # it is patched at the moment: the weight that it had before
            weight = model.backup[key].weight
        if key in model.hook_backup:
            weight = model.hook_backup[key][0]
        found[key] = [(weight, convert or as_it_is), *model.patches.get(key, [])]
    return found


def difference(variant: Patches, base: Patches, key: str, factor: float) -> list[Any]:
    """The value of a patch that is ``factor * (variant - base)``, evaluated by ComfyUI in float32."""
    scale = [] if factor == 1.0 else [(0.0, NOTHING, factor, None, None)]
    return [*variant[key], (-1.0, base[key], 1.0, None, None), *scale]


def canonical(key: str) -> tuple[str, ...]:
    """The canonical names of a patched weight; three for a fused qkv."""
    return FAMILY.canonical(key.removeprefix(PREFIX))


def select_weights(pattern: str, keys: list[str], operation: str) -> set[str]:
    """The weights that a pattern takes; UnknownNameError if it takes none, or a part of a fused one."""
    if not pattern.strip():
        return set()
    chosen = Pattern(pattern, FAMILY)
    every = {key: canonical(key) for key in keys}
    # Pad tokens may be named too, though ComfyUI never patches them.
    chosen.require_match([*(name for names in every.values() for name in names), *FAMILY.pads], operation)
    found = set()
    for key, names in every.items():
        hits = [chosen.matches(name) for name in names]
        if any(hits) and not all(hits):
            raise UnknownNameError(
                operation,
                "the pattern takes a part of a tensor that ComfyUI has as one",
                key=key.removeprefix(PREFIX),
                found=repr(pattern),
                fix="name attention.qkv, or all of to_q, to_k and to_v",
            )
        if all(hits):
            found.add(key)
    return found


def require_same(operation: str, models: Mapping[str, Any]) -> None:
    """Raise MismatchError unless all models are of the family, with the same weights."""
    shapes = {
        name: {
            key: tuple(value.shape)
            for key, value in model.model.named_parameters()
            if key.startswith(PREFIX) and key.endswith((".weight", ".bias"))
        }
        for name, model in models.items()  # parameters, because quantised ones are packed in a state dict
    }
    first, *others = shapes
    if not FAMILY.recognises([key.removeprefix(PREFIX) for key in shapes[first]]):
        raise MismatchError(
            operation,
            f"{first} is not a {FAMILY.title} model",
            expected=", ".join(FAMILY.landmarks),
            found=type(models[first].model).__name__,
        )
    for other in others:
        for key in shapes[first].keys() | shapes[other].keys():
            one, two = shapes[first].get(key), shapes[other].get(key)
            if one != two:
                raise MismatchError(
                    operation,
                    f"{other} does not have the weights of {first}",
                    key=key.removeprefix(PREFIX),
                    expected=one or "no such weight",
                    found=two or nearest(key, shapes[other]),
                )


def as_it_is(weight: Any, **_: Any) -> Any:
    """What ComfyUI calls to decode a weight, for one that needs no decoding."""
    return weight

"""How LoRA files name things: who trained them decides the prefix, the module's spelling and the suffix.

diffusion_model.layers.0.attention.to_q.lora_A.weight      ComfyUI, ai-toolkit
transformer.layers.0.attention.to_q.lora_A.weight          diffusers
base_model.model.layers.0.attention.to_q.lora_A.weight     PEFT
lora_unet_layers_0_attention_qkv.lora_down.weight          kohya, musubi (fused or split)
lora_transformer_layers_0_attention_to_q.lora_down.weight  OneTrainer
lycoris_layers_0_attention_to_q.lokr_w1                    LyCORIS
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from alkahest.errors import UnknownNameError, UnsupportedError, nearest
from alkahest.model.families import Family, best_family

DOTTED = {
    "base_model.model.": "PEFT",
    "model.diffusion_model.": "ComfyUI",
    "diffusion_model.": "ComfyUI",
    "transformer.": "diffusers",
}
FLAT = {"lora_unet_": "kohya", "lora_transformer_": "OneTrainer", "lycoris_": "LyCORIS"}
# What stands after the module's name -> the part that the tensor plays. Pairs multiply: up @ down and so on.
ROLES = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "hada_w1_a": "w1_a",
    "hada_w1_b": "w1_b",
    "hada_w2_a": "w2_a",
    "hada_w2_b": "w2_b",
    "lokr_w1": "w1",
    "lokr_w1_a": "w1_a",
    "lokr_w1_b": "w1_b",
    "lokr_w2": "w2",
    "lokr_w2_a": "w2_a",
    "lokr_w2_b": "w2_b",
    "diff": "diff",
    "w_norm": "diff",
    "diff_b": "bias",
    "b_norm": "bias",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.default.weight": "magnitude",
}
REFUSED = {
    "lora_mid.weight": "a convolution's LoRA",
    "hada_t1": "a convolution's LoHa",
    "hada_t2": "a convolution's LoHa",
    "lokr_t2": "a convolution's LoKr",
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "boft_blocks": "BOFT",
    "set_weight": "a replacement of weights",
    "reshape_weight": "a change of shape",
    "lora_B.bias": "a LoRA with biases",
    "lora_up.bias": "a LoRA with biases",
    "scalar": "a learned scalar",
    "a1.weight": "GLoRA",
    "a2.weight": "GLoRA",
    "b1.weight": "GLoRA",
    "b2.weight": "GLoRA",
}
_TEXT_ENCODER = ("lora_te", "text_encoder", "text_encoders.", "te_", "lora_prior_te")


@dataclass(frozen=True)
class Name:
    """What one stored name of a LoRA means."""

    flavour: str
    keys: tuple[str, ...]  # canonical names of the weights it changes; several are equal row slices of a fused one
    kind: str  # lora, hada (LoHa), lokr, diff, or "" where the suffix does not tell
    role: str


def parse_name(stored: str, family: Family) -> Name:
    """What a stored name means.

    >>> name = parsed("lora_unet_layers_0_attention_qkv.alpha", zimage.FAMILY); name.keys[0], name.role
    ('layers.0.attention.to_q.weight', 'alpha')

    Raises UnknownNameError with the nearest name if it fits nothing, UnsupportedError for what is known but not
    handled.
    """
    rest, suffix = _without_suffix(stored)
    if suffix in REFUSED:
        raise UnsupportedError(
            "open_lora",
            f"{REFUSED[suffix]} is not handled",
            key=stored,
            fix="LoRA, LoHa, LoKr, DoRA and full differences are",
        )
    flavour, module = _without_prefix(rest)
    if module.startswith(_TEXT_ENCODER):
        raise UnsupportedError(
            "open_lora",
            "this part is for a text encoder, and would be lost",
            key=stored,
            fix="remove the text encoder's tensors from the file",
        )
    keys = _keys(module, ROLES.get(suffix, ""), family)
    if suffix not in ROLES or not keys:
        raise UnknownNameError(
            "open_lora",
            f"this name fits no module of {family.title}" if suffix in ROLES else "this is no tensor of a LoRA",
            key=stored,
            found=module,
            fix=nearest(_with_dots(module, family), _known_near(module, family))
            if suffix in ROLES
            else nearest(suffix, ROLES),
        )
    kind = next((kind for kind in ("hada", "lokr", "lora") if suffix.startswith(kind)), "")
    return Name(flavour, keys, "diff" if ROLES[suffix] in ("diff", "bias") else kind, ROLES[suffix])


def is_lora(stored: str) -> bool:
    """Whether a stored name is one of a LoRA's, as far as its end tells."""
    return _without_suffix(stored)[1] in {**ROLES, **REFUSED}


def _without_suffix(stored: str) -> tuple[str, str]:
    for suffix in sorted((*ROLES, *REFUSED), key=len, reverse=True):
        if stored.endswith("." + suffix):
            return stored[: -len(suffix) - 1], suffix
    rest, _, last = stored.rpartition(".")
    return rest, last


def _without_prefix(name: str) -> tuple[str, str]:
    """The flavour that the outermost prefix tells, and the module."""
    flavour = ""
    while dotted := next((prefix for prefix in DOTTED if name.startswith(prefix)), ""):
        flavour, name = flavour or DOTTED[dotted], name.removeprefix(dotted)
    flat = next((prefix for prefix in FLAT if name.startswith(prefix)), "")
    if flat:
        return flavour or FLAT[flat], name.removeprefix(flat).lstrip("_")
    return flavour or "bare", name


def family_of(names: Iterable[str]) -> Family:
    """The family that a LoRA's names are of: the one that understands most of them."""

    def understood(family: Family) -> int:
        return sum(bool(_keys(_without_prefix(_without_suffix(name)[0])[1], "", family)) for name in names)

    return best_family(understood)


def _keys(module: str, role: str, family: Family) -> tuple[str, ...]:
    name = _with_dots(module, family)
    for end in (".bias",) if role == "bias" else (".weight", ""):
        keys = family.canonical(name + end)
        if all(family.template(key) in family.templates for key in keys):
            return keys if end or name in family.pads else ()
    return ()


def _with_dots(module: str, family: Family) -> str:
    """A module's name with dots, from one with underscores, which alone do not say where the dots were."""
    if block := _in_block(module, family):
        stack, number, rest = block
        return f"{stack}.{number}.{_flat(family).get(rest.replace('.', '_'), rest)}"
    return _flat(family).get(module.replace(".", "_"), module)


def _in_block(module: str, family: Family) -> tuple[str, str, str] | None:
    """Stack, number and the name within the block, of a module in one; between them are dots or underscores."""
    for stack in family.stacks:
        spelled = re.escape(stack).replace(r"\.", "[._]")
        if found := re.fullmatch(rf"{spelled}[._](\d+)[._](.+)", module):
            return stack, found[1], found[2]
    return None


@functools.cache
def _flat(family: Family) -> dict[str, str]:
    """A module's name with underscores, within its block, in every layout -> the name with dots."""
    found = {}
    for key in family.templates:
        for name in (key, *(layout.stored(key) for layout in family.layouts)):
            head, _, tail = _module(name).partition(".N.")
            found[(tail or head).replace(".", "_")] = tail or head
    return found


def _known_near(module: str, family: Family) -> list[str]:
    """Names to suggest: those of the block, or those outside of blocks."""
    block = _in_block(module, family)
    inside = sorted({_module(key).partition(".N.")[2] for key in family.templates if ".N." in key})
    outside = sorted({_module(key) for key in family.templates if ".N." not in key})
    return [f"{block[0]}.{block[1]}.{name}" for name in inside] if block else outside


def _module(key: str) -> str:
    return re.sub(r"\.(weight|bias)$", "", key)

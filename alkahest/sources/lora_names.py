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
from dataclasses import dataclass

from alkahest.errors import UnknownNameError, UnsupportedError, nearest
from alkahest.model.architecture import Architecture
from alkahest.model.keys import PAD_TOKENS
from alkahest.model.layouts import native

DOTTED = {
    "base_model.model.": "PEFT", "model.diffusion_model.": "ComfyUI", "diffusion_model.": "ComfyUI",
    "transformer.": "diffusers",
}  # fmt: skip
FLAT = {"lora_unet_": "kohya", "lora_transformer_": "OneTrainer", "lycoris_": "LyCORIS"}
# What stands after the module's name -> the part that the tensor plays. Pairs multiply: up @ down and so on.
ROLES = {
    "lora_A.weight": "down", "lora_B.weight": "up", "lora_A.default.weight": "down", "lora_B.default.weight": "up",
    "lora_down.weight": "down", "lora_up.weight": "up", "lora.down.weight": "down", "lora.up.weight": "up",
    "hada_w1_a": "w1_a", "hada_w1_b": "w1_b", "hada_w2_a": "w2_a", "hada_w2_b": "w2_b",
    "lokr_w1": "w1", "lokr_w1_a": "w1_a", "lokr_w1_b": "w1_b", "lokr_w2": "w2", "lokr_w2_a": "w2_a", "lokr_w2_b": "w2_b",
    "diff": "diff", "w_norm": "diff", "diff_b": "bias", "b_norm": "bias", "alpha": "alpha",
    "dora_scale": "magnitude", "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.default.weight": "magnitude",
}  # fmt: skip
REFUSED = {
    "lora_mid.weight": "a convolution's LoRA", "hada_t1": "a convolution's LoHa", "hada_t2": "a convolution's LoHa",
    "lokr_t2": "a convolution's LoKr", "oft_blocks": "OFT", "oft_diag": "OFT", "boft_blocks": "BOFT", "set_weight": "a replacement of weights",
    "reshape_weight": "a change of shape", "lora_B.bias": "a LoRA with biases", "lora_up.bias": "a LoRA with biases",
    "scalar": "a learned scalar", "a1.weight": "GLoRA", "a2.weight": "GLoRA", "b1.weight": "GLoRA", "b2.weight": "GLoRA",
}  # fmt: skip
_TEXT_ENCODER = ("lora_te", "text_encoder", "text_encoders.", "te_", "lora_prior_te")
_BLOCK = re.compile(r"(layers|noise_refiner|context_refiner|siglip_refiner)[._](\d+)[._](.+)")


@dataclass(frozen=True)
class Name:
    """What one stored name of a LoRA means."""

    flavour: str
    keys: tuple[str, ...]  # canonical names of the weights it changes; several are equal row slices of a fused one
    kind: str  # lora, hada (LoHa), lokr, diff, or "" where the suffix does not tell
    role: str


def parsed(stored: str) -> Name:
    """What a stored name means.

    >>> parsed("lora_unet_layers_0_attention_qkv.alpha").keys[0], parsed("lora_unet_layers_0_attention_qkv.alpha").role
    ('layers.0.attention.to_q.weight', 'alpha')

    Raises UnknownNameError with the nearest name if it fits nothing, UnsupportedError for what is known but not handled.
    """
    rest, suffix = _without_suffix(stored)
    if suffix in REFUSED:
        raise UnsupportedError("open_lora", f"{REFUSED[suffix]} is not handled", key=stored, fix="LoRA, LoHa, LoKr, DoRA and full differences are")  # fmt: skip
    flavour, module = _without_prefix(rest)
    if module.startswith(_TEXT_ENCODER):
        raise UnsupportedError("open_lora", "this part is for a text encoder, and would be lost", key=stored, fix="remove the text encoder's tensors from the file")  # fmt: skip
    keys = _keys(module, ROLES.get(suffix, ""))
    if suffix not in ROLES or not keys:
        raise UnknownNameError(
            "open_lora", "this name fits no module of Z-Image" if suffix in ROLES else "this is no tensor of a LoRA", key=stored,
            found=module, fix=nearest(_dotted(module), _known_near(module)) if suffix in ROLES else nearest(suffix, ROLES),
        )  # fmt: skip
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


def _keys(module: str, role: str) -> tuple[str, ...]:
    name = _dotted(module)
    for end in (".bias",) if role == "bias" else (".weight", ""):
        keys = native.canonical(name + end)
        if all(_template(key) in _known() for key in keys):
            return keys if end or name in PAD_TOKENS else ()
    return ()


def _dotted(module: str) -> str:
    """A module's name with dots, from one with underscores, which alone do not say where the dots were."""
    if block := _BLOCK.fullmatch(module):
        return f"{block[1]}.{block[2]}.{_flat().get(block[3].replace('.', '_'), block[3])}"
    return _flat().get(module.replace(".", "_"), module)


def _template(key: str) -> str:
    """A key with the number of its block left out; SigLIP's refiner is built as the context's."""
    return re.sub(r"^(layers|noise_refiner|context_refiner|siglip_refiner)\.\d+\.", lambda found: f"{found[1]}.N.".replace("siglip", "context"), key)  # fmt: skip


@functools.cache
def _known() -> frozenset[str]:
    shapes = Architecture(layers=1, width=128, feed_forward=341, head=128, caption=85, time=128).shapes()
    return frozenset(map(_template, shapes))


@functools.cache
def _flat() -> dict[str, str]:
    """A module's name with underscores, within its block, in both layouts -> the name with dots."""
    found = {}
    for key in _known():
        for name in (key, native.stored(key)):
            head, _, tail = _module(name).partition(".N.")
            found[(tail or head).replace(".", "_")] = tail or head
    return found


def _known_near(module: str) -> list[str]:
    """Names to suggest: those of the block, or those outside of blocks."""
    block = _BLOCK.fullmatch(module)
    inside = sorted({_module(key).partition(".N.")[2] for key in _known() if ".N." in key})
    return (
        [f"{block[1]}.{block[2]}.{name}" for name in inside]
        if block
        else sorted({_module(key) for key in _known() if ".N." not in key})
    )


def _module(key: str) -> str:
    return re.sub(r"\.(weight|bias)$", "", key)

"""How LoRA files name things: who trained them decides the prefix, the module's spelling and the suffix.

diffusion_model.layers.0.attention.to_q.lora_A.weight      ComfyUI, ai-toolkit
transformer.layers.0.attention.to_q.lora_A.weight          diffusers
base_model.model.layers.0.attention.to_q.lora_A.weight     PEFT
lora_unet_layers_0_attention_qkv.lora_down.weight          kohya, musubi (fused or split)
lora_transformer_layers_0_attention_to_q.lora_down.weight  OneTrainer
lycoris_layers_0_attention_to_q.lokr_w1                    LyCORIS

Without .weight, with _lora.down.weight and with .lora_linear_layer.down.weight are older names of diffusers and Mochi.
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
    "pipe.dit.": "DiffSynth",
    # Wrappers of trainers, which say nothing.
    **dict.fromkeys(("module.", "model.", "net.", "dit.", "unet."), "wrapped"),
}
FLAT = {"lora_unet_": "kohya", "lora_transformer_": "OneTrainer", "lycoris_": "LyCORIS"}
# What stands after the module's name -> the part that the tensor plays. Pairs multiply: up @ down and so on.
ROLES = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_A": "down",
    "lora_B": "up",
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
    "magnitude": "magnitude",
    "scalar": "scalar",
    "reshape_weight": "reshape",
    "oft_blocks": "blocks",
    "rescale": "rescale",
    "oft_R.weight": "rotation",
    "boft_R": "butterfly",
    "boft_s": "stretch",
    "ia3_l": "ia3",
}
# Roles that tell the kind by themselves; of the rest the suffix does.
_KIND_OF = {
    "diff": "diff",
    "bias": "diff",
    "whole": "whole",
    "whole_bias": "whole",
    "blocks": "oft",
    "rotation": "peft_oft",
    "butterfly": "peft_boft",
    "ia3": "ia3",
}
# Suffixes that PEFT writes with an adapter's name in them.
_ADAPTED = re.compile(
    r"\.(?P<start>lora_[AB]|lora_magnitude_vector|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|oft_R|boft_R|boft_s|ia3_l|"
    r"modules_to_save)\.(?P<adapter>[^.]+)(?P<end>(?:\.weight|\.bias)?)"
)
REFUSED = {
    "lora_mid.weight": "a convolution's LoRA",
    "hada_t1": "a convolution's LoHa",
    "hada_t2": "a convolution's LoHa",
    "lokr_t2": "a convolution's LoKr",
    "oft_diag": "kohya's OFT",
    "oft_r": "OFT of PEFT before 0.16",
    "oft_s": "OFT of PEFT before 0.16",
    "set_weight": "a replacement of weights",
    "lora_B.bias": "a LoRA with biases",
    "lora_up.bias": "a LoRA with biases",
    "a1.weight": "GLoRA",
    "a2.weight": "GLoRA",
    "b1.weight": "GLoRA",
    "b2.weight": "GLoRA",
    "vera_lambda_b": "VeRA",
    "vera_lambda_d": "VeRA",
    "vera_A": "VeRA",
    "vera_B": "VeRA",
    "up_list.0": "DyLoRA",
    "down_list.0": "DyLoRA",
    "lora_E": "AdaLoRA",
    "hra_u": "HRA",
    "on_input": "LyCORIS' IA3",
}
_OWN = ("base_layer", "original_module")  # what PEFT keeps of the model's own weights
_TEXT_ENCODER = ("lora_te", "text_encoder", "text_encoders.", "te_", "lora_prior_te")


@dataclass(frozen=True)
class Name:
    """What one stored name of a LoRA means."""

    flavour: str
    keys: tuple[str, ...]  # canonical names of the weights it changes; several are equal row slices of a fused one
    kind: str  # lora, hada (LoHa), lokr, diff, a kind that needs the weights, or "" where the suffix does not tell
    role: str
    module: str  # the module's name as it is stored, without prefixes
    copy: str  # what the tensors of one module and one copy of it have in common
    adapter: str = ""  # PEFT's name for it


def parse_name(stored: str, family: Family) -> Name:
    """What a stored name means.

    >>> name = parse_name("lora_unet_layers_0_attention_qkv.alpha", zimage.FAMILY); name.keys[0], name.role
    ('layers.0.attention.to_q.weight', 'alpha')

    Raises UnknownNameError with the nearest name if it fits nothing, UnsupportedError for what is known but not
    handled.
    """
    rest, suffix, adapter = _split(stored)
    flavour, module = _without_prefix(rest)
    if module.startswith(_TEXT_ENCODER):
        raise UnsupportedError(
            "open_lora",
            "this part is for a text encoder, and would be lost",
            key=stored,
            fix=ONLY,
        )
    module = ".".join(part for part in module.split(".") if part not in _OWN)
    role = _role(rest, suffix, flavour)
    keys = _keys(module, role, family)
    if suffix in REFUSED and (keys or not _in_another_model(module)):
        raise UnsupportedError(
            "open_lora",
            f"{REFUSED[suffix]} is not handled",
            key=stored,
            fix="LoRA, LoHa, LoKr, DoRA, OFT, BOFT, IA3 and full differences are",
        )
    if not role or not keys:
        raise UnknownNameError(
            "open_lora",
            f"this name fits no module of {family.title}" if role else "this is no tensor of a LoRA",
            key=stored,
            found=module,
            fix=(nearest(_with_dots(module, family), _known_near(module, family)) if role else nearest(suffix, ROLES))
            + f"; or {ONLY}",
        )
    kind = next((kind for kind in ("hada", "lokr", "lora") if suffix.startswith(kind)), "")
    kind = kind if role in ("up", "down", "w1", "w2") or "_" in role else ""
    return Name(flavour, keys, _KIND_OF.get(role, kind), role, module, rest, adapter)


ONLY = "open_lora(path, only='transformer'), which leaves out what is of other models and says so"


def _split(stored: str) -> tuple[str, str, str]:
    """A stored name's module, suffix, and PEFT's name for the adapter if the suffix holds one."""
    found = _ADAPTED.search(stored)
    if found is not None and found.end() == len(stored):
        if found["start"] == "modules_to_save":
            return stored[: found.start()], f"modules_to_save{found['end']}", found["adapter"]
        plain = found["start"] + (found["end"] or "")
        if found["adapter"] != "weight" and (plain in ROLES or found["start"] in ROLES):
            return stored[: found.start()], plain if plain in ROLES else found["start"], found["adapter"]
    return (*_without_suffix(stored), "")


def _role(rest: str, suffix: str, flavour: str) -> str:
    """The part that a tensor plays; empty for none of a LoRA's. PEFT stores some modules whole."""
    if suffix in ROLES:
        return ROLES[suffix]
    own = rest.rpartition(".")[2] in _OWN
    if suffix in ("weight", "bias") and own:
        return "own"
    whole = suffix.startswith("modules_to_save.") or (suffix in ("weight", "bias") and flavour == "PEFT")
    return "" if not whole else "whole_bias" if suffix.endswith("bias") else "whole"


def _in_another_model(module: str) -> bool:
    """Whether a module is surely of another model than the transformer."""
    return module.startswith((*_TEXT_ENCODER, "control"))


def is_lora(stored: str) -> bool:
    """Whether a stored name is one of a LoRA's, as far as its end tells."""
    return _split(stored)[1] in {**ROLES, **REFUSED}


def _without_suffix(stored: str) -> tuple[str, str]:
    for suffix in sorted((*ROLES, *REFUSED), key=len, reverse=True):
        if stored.endswith("." + suffix):
            return stored[: -len(suffix) - 1], suffix
    for suffix in ("lora.down.weight", "lora.up.weight"):  # of diffusers in 2023, which ComfyUI loads too
        if stored.endswith("_" + suffix):
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
        return sum(bool(_keys(_without_prefix(_split(name)[0])[1], "", family)) for name in names)

    return best_family(understood)


def _keys(module: str, role: str, family: Family) -> tuple[str, ...]:
    name = _with_dots(module, family)
    for end in (".bias",) if role in ("bias", "whole_bias") else (".weight", ""):
        fused = next((fused for fused in family.fused_modules if f".{name}".endswith(fused)), None)
        if fused:
            keys = tuple(name.removesuffix(fused[1:]) + part[1:] + end for part in family.fused_modules[fused])
        else:
            keys = family.canonical(name + end)
        if all(family.template(key) in family.templates or (end and family.is_optional(key)) for key in keys):
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
    return found | {fused[1:].replace(".", "_"): fused[1:] for fused in family.fused_modules}


def _known_near(module: str, family: Family) -> list[str]:
    """Names to suggest: those of the block, or those outside of blocks."""
    block = _in_block(module, family)
    inside = sorted({_module(key).partition(".N.")[2] for key in family.templates if ".N." in key})
    outside = sorted({_module(key) for key in family.templates if ".N." not in key})
    return [f"{block[0]}.{block[1]}.{name}" for name in inside] if block else outside


def _module(key: str) -> str:
    return re.sub(r"\.(weight|bias)$", "", key)

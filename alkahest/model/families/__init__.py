"""The families of models that are known: one file of facts each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from alkahest.errors import FileFormatError, UnsupportedError
from alkahest.model.families import zimage
from alkahest.model.families.family import Family, Part, Sizes

__all__ = ["FAMILIES", "Family", "Part", "Sizes", "best_family", "family_of", "holds_model", "recognise"]
FAMILIES: tuple[Family, ...] = (zimage.FAMILY,)


def recognise(names: Collection[str], file: object) -> tuple[Family, str]:
    """The family of a file with these names, and the prefix of its model's tensors.

    >>> family, prefix = recognise(ak.open("z_image_bf16.safetensors").keys(), "z_image_bf16.safetensors")
    >>> family.title
    'Z-Image'

    Raises FileFormatError if the file holds two, UnsupportedError, saying what it is instead, if it holds none.
    """
    names = set(names)
    for family in FAMILIES:
        prefixes = family.prefix_in(names)
        if len(prefixes) > 1:
            raise FileFormatError(
                "open",
                "the file holds two transformers",
                file=file,
                found=" and ".join(map(repr, prefixes)),
                fix="split the file, then open one of them",
            )
        for prefix in prefixes:
            if family.recognises([name.removeprefix(prefix) for name in names if name.startswith(prefix)]):
                return family, prefix
    raise _other_model(sorted(names), file)


def family_of(keys: Iterable[str]) -> Family:
    """The family that has most of these canonical names."""
    keys = list(keys)
    return best_family(lambda family: sum(family.template(key) in family.templates for key in keys))


def best_family(score: Callable[[Family], int]) -> Family:
    """The family with the highest score; of equal ones the first."""
    return FAMILIES[0] if len(FAMILIES) == 1 else max(FAMILIES, key=score)


def holds_model(names: Collection[str]) -> bool:
    """Whether a file with these names holds a model of some family."""
    return any(family.prefix_in(names) for family in FAMILIES)


def _other_model(names: list[str], file: object) -> UnsupportedError:
    if any(mark in key for key in names for mark in ("lora_A", "lora_down", "lora_up", "lokr_", "hada_")):
        what, fix = "this is a LoRA, not a checkpoint", "ak.open_lora(path), and add it to the checkpoint it belongs to"
    elif names and all(key.startswith(("decoder.", "encoder.", "vae.", "quant_conv", "post_quant")) for key in names):
        what, fix = "this is a VAE, not a transformer", "open the diffusion model's file"
    elif any(key.startswith(("model.layers.", "text_encoders.", "model.embed_tokens")) for key in names):
        what, fix = "this is a text encoder, not a transformer", "open the diffusion model's file"
    else:
        known = " or ".join(family.title for family in FAMILIES)
        what, fix = f"this is not a {known} model", f"Alkahest handles {known} transformers only"
    found = ", ".join(names[:3]) + (f", ... ({len(names)} tensors)" if len(names) > 3 else "")
    return UnsupportedError(
        "open",
        what,
        file=file,
        expected=" or ".join(", ".join(family.landmarks) for family in FAMILIES),
        found=found or "nothing",
        fix=fix,
    )

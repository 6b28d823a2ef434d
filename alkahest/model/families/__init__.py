"""The families of models that are known: one file of facts each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from alkahest.errors import FileFormatError, UnsupportedError, unknown
from alkahest.model.families import zimage
from alkahest.model.families.family import Family, Part, Sizes

__all__ = ["FAMILIES", "Family", "Part", "Sizes", "best_family", "family_of", "holds_model", "recognise"]
FAMILIES: tuple[Family, ...] = (zimage.FAMILY,)


def recognise(names: Collection[str], file: object, prefix: str | None = None) -> tuple[Family, str]:
    """The family of a file with these names, and the prefix of its model's tensors.

    A file may hold one model under a published prefix, or under any one wrapper's (``module.``); ``prefix`` says which,
    where it holds several.

    >>> family, prefix = recognise(ak.open("z_image_bf16.safetensors").keys(), "z_image_bf16.safetensors")
    >>> family.title
    'Z-Image'

    Raises FileFormatError if the file holds several, UnknownNameError for a ``prefix`` that holds none,
    UnsupportedError, saying what it is instead, if it holds no model.
    """
    names = set(names)
    for family in FAMILIES:
        prefixes = [one for one in family.prefixes_in(names) if family.recognises(_under(one, names))]
        published = [one for one in prefixes if one in family.prefixes]
        if prefix is not None and prefix in prefixes:
            return family, prefix
        if prefix is not None and prefixes:
            raise unknown("open", "no model lies under this prefix", prefix, prefixes)
        found = published or prefixes
        if len(found) > 1:
            raise FileFormatError(
                "open",
                f"the file holds {'two' if len(found) == 2 else len(found)} transformers",
                file=file,
                found=" and ".join(map(repr, found)),
                fix=f"say which: ak.open(path, prefix={found[0]!r}), on the command line convert --prefix {found[0]!r}",
            )
        if found:
            return family, found[0]
    raise _other_model(sorted(names), file)


def _under(prefix: str, names: Iterable[str]) -> list[str]:
    """The names under a prefix, without it."""
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def family_of(keys: Iterable[str]) -> Family:
    """The family that has most of these canonical names."""
    keys = list(keys)
    return best_family(lambda family: sum(family.template(key) in family.templates for key in keys))


def best_family(score: Callable[[Family], int]) -> Family:
    """The family with the highest score; of equal ones the first."""
    return FAMILIES[0] if len(FAMILIES) == 1 else max(FAMILIES, key=score)


def holds_model(names: Collection[str]) -> bool:
    """Whether a file with these names holds a model of some family."""
    return any(family.has_most_of(_under(one, names)) for family in FAMILIES for one in family.prefixes_in(names))


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

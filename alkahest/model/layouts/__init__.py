"""Key layouts: how files name the tensors of one model, and how canonical names map to them."""

from __future__ import annotations

from collections.abc import Iterable

from alkahest.errors import FileFormatError, UnknownNameError, nearest
from alkahest.model.layouts import diffusers, native
from alkahest.model.layouts.layout import Layout

LAYOUTS: dict[str, Layout] = {"native": native.LAYOUT, "diffusers": diffusers.LAYOUT}

# Published prefixes, longest first; an all-in-one file has other models beside the prefixed one.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "")
_LANDMARK = "cap_embedder.1.weight"


def get(name: str) -> Layout:
    """The layout of that name; UnknownNameError otherwise."""
    if name not in LAYOUTS:
        raise UnknownNameError("save", "unknown layout", found=repr(name), fix=nearest(str(name), LAYOUTS))
    return LAYOUTS[name]


def find_prefix(names: Iterable[str], file: object) -> str:
    """The prefix of the transformer's tensors in a file.

    >>> find_prefix(["model.diffusion_model.cap_embedder.1.weight"], "a.safetensors")
    'model.diffusion_model.'
    """
    present = set(names)
    prefixes = [prefix for prefix in PREFIXES if prefix + _LANDMARK in present]
    if len(prefixes) > 1:
        raise FileFormatError(
            "open", "the file holds two transformers", file=file, found=" and ".join(map(repr, prefixes)),
            fix="split the file, then open one of them",
        )  # fmt: skip
    return prefixes[0] if prefixes else ""


def canonical(stored: str) -> tuple[str, ...]:
    """Canonical names of one stored tensor, prefix removed; three for a fused qkv, as equal row slices.

    Names that are canonical already stay, so files with mixed naming work too.
    """
    return native.LAYOUT.canonical(stored)


def layout_of(names: Iterable[str]) -> str:
    """``native``, ``diffusers`` or ``mixed``, from stored names without their prefix."""
    names = list(names)
    fused = any(canonical(name) != (name,) for name in names)
    split = any(".attention.to_q." in name or name.startswith("all_x_embedder.") for name in names)
    return "mixed" if fused and split else "diffusers" if split else "native"

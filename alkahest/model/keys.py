"""Canonical tensor names, the parts of the model, and patterns that select tensors.

Canonical names are those of diffusers' ``ZImageTransformer2DModel``, with ``to_q``, ``to_k`` and
``to_v`` apart. A pattern is the one way to say "these tensors": for protection, for the part of a
delta that is used, for LoRA exclusion and for freezing.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from alkahest.errors import UnknownNameError, nearest

PAD_TOKENS = ("x_pad_token", "cap_pad_token")
REFINERS = ("noise_refiner", "context_refiner", "siglip_refiner")
EMBEDDERS = ("all_x_embedder", "t_embedder", "cap_embedder", *PAD_TOKENS, "siglip_embedder", "siglip_pad_token")
FINAL = ("all_final_layer", "norm_final")

# Short names that a pattern may use, and the dotted names they stand for.
ALIASES = {
    "all": ("*",),
    "refiner": REFINERS,
    "refiners": REFINERS,
    "embedders": EMBEDDERS,
    "pad_tokens": (*PAD_TOKENS, "siglip_pad_token"),
    "input": (*REFINERS, *EMBEDDERS),
    "final": FINAL,
    # The names that ComfyUI's layout gives to the same tensors.
    "x_embedder": ("all_x_embedder",),
    "final_layer": ("all_final_layer",),
    "qkv": ("to_q", "to_k", "to_v"),
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out",),
    "q_norm": ("norm_q",),
    "k_norm": ("norm_k",),
}


def part_of(key: str) -> str:
    """The part of the model that a canonical name belongs to.

    >>> part_of("layers.3.attention.to_q.weight"), part_of("x_pad_token")
    ('layers.3', 'embedders')
    """
    head, _, rest = key.partition(".")
    if head == "layers":
        return f"layers.{rest.split('.')[0]}"
    if head in REFINERS:
        return head
    if head in EMBEDDERS:
        return "embedders"
    if head in FINAL:
        return "final"
    return "other"


def is_optional(key: str) -> bool:
    """Whether a checkpoint may lack this tensor: ``norm_final`` and the SigLIP branch of the omni models."""
    return key.startswith(("norm_final.", "siglip_"))


def in_model_order(keys: Iterable[str]) -> list[str]:
    """Names sorted as the data flows: embedders, refiners, layers by number, final layer."""
    heads = (*EMBEDDERS, *REFINERS, "layers", *FINAL)
    rank = {head: position for position, head in enumerate(heads)}

    def place(key: str) -> tuple[object, ...]:
        pieces = key.split(".")
        numbers_padded = tuple(f"{piece:0>6}" if piece.isdigit() else piece for piece in pieces)
        return (rank.get(pieces[0], len(rank)), numbers_padded)

    return sorted(keys, key=place)


@dataclass(frozen=True)
class Pattern:
    """A selection of tensors by name.

    ``Pattern("refiner")`` takes every refiner tensor. A pattern is a comma-separated list; each
    item is a part (``refiner``, ``embedders``, ``input``, ``final``, ``layers``), a dotted run of
    name components anywhere in the key (``layers.3``, ``feed_forward.w1``, ``attention``), with
    ``*`` as a wildcard inside a component and ``0-9`` as a range of numbers (``layers.0-9``).

    >>> Pattern("layers.0-9.attention").matches("layers.7.attention.to_q.weight")
    True
    """

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise UnknownNameError(
                "select", "a pattern is one string", found=repr(self.text), fix="such as 'refiner, layers.0-9'"
            )
        if not all(item.strip() for item in self.text.split(",")):
            raise UnknownNameError(
                "select", "empty pattern", found=repr(self.text), fix="name a part, such as 'refiner'"
            )

    def matches(self, key: str) -> bool:
        return _matches(self.text, key)

    def require_match(self, keys: Iterable[str], operation: str) -> Pattern:
        """Return self, or raise UnknownNameError if an item selects none of ``keys``."""
        keys = list(keys)
        for item in (item.strip() for item in self.text.split(",")):
            if not any(_matches(item, key) for key in keys):
                pieces = sorted({piece for key in keys for piece in key.split(".") if not piece.isdigit()})
                raise UnknownNameError(
                    operation,
                    f"{item!r} selects no tensor of this model",
                    expected="a part, a name component, or a dotted run of them",
                    found=repr(item),
                    fix=nearest(item, [*ALIASES, *pieces]),
                )
        return self


@functools.lru_cache(maxsize=65536)
def _matches(text: str, key: str) -> bool:
    components = key.split(".")
    return any(_contains(components, run) for run in _runs(text))


@functools.lru_cache(maxsize=1024)
def _runs(text: str) -> tuple[tuple[str, ...], ...]:
    items = [item.strip() for item in text.split(",")]
    names = [name for item in items for name in ALIASES.get(item, (item,))]
    return tuple(tuple(name.split(".")) for name in names)


def _contains(components: list[str], run: tuple[str, ...]) -> bool:
    starts = range(len(components) - len(run) + 1)
    return any(all(_fits(components[start + i], wanted) for i, wanted in enumerate(run)) for start in starts)


def _fits(component: str, wanted: str) -> bool:
    bounds = re.fullmatch(r"(\d+)-(\d+)", wanted)
    if bounds and component.isdigit():
        return int(bounds[1]) <= int(component) <= int(bounds[2])
    return fnmatchcase(component, wanted)

"""What a family of models is: a table of facts, and the questions that are answered from it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from alkahest.errors import MismatchError, unknown
from alkahest.model.layouts import Layout

Shape = tuple[int, ...]
# What to do with an incomplete file.
AS_A_PART = "get the file again, or lay what it holds over a whole model: base.with_parts_of(ak.open_part(path))"
Shapes = Mapping[str, Shape]


class Sizes(Protocol):
    """The sizes of one model of a family, read from its shapes; every tensor's shape follows from them."""

    @property
    def layers(self) -> int: ...  # blocks of the main stack

    @property
    def width(self) -> int: ...

    @property
    def text_width(self) -> int: ...  # of what the text encoder gives

    @property
    def latent_channels(self) -> int: ...

    def shapes(self) -> dict[str, Shape]:
        """Canonical name -> shape, in model order."""
        ...

    def diffusers_config(self) -> dict[str, Any]:
        """diffusers' ``config.json``."""
        ...

    def guesses(self) -> list[str]:
        """What of that configuration does not follow from the weights, in words."""
        ...

    def lacks(self, config: Mapping[str, Any] | None) -> list[str]:
        """Which blocks an incomplete file surely lacks, in words. ``config`` is diffusers', if there is one."""
        ...

    def oddities(self) -> list[str]:
        """How it differs from the published models of its width, in words."""
        ...


@dataclass(frozen=True)
class Part:
    """A part of the model: tensors whose names begin with one of ``heads``."""

    name: str
    heads: tuple[str, ...]
    label: str  # short, for plots
    is_stack: bool = False  # a head is followed by the number of a block
    is_main: bool = False  # the main stack, whose blocks are parts of their own
    built_as: str | None = None  # a stack whose blocks have the same tensors


@dataclass(frozen=True, eq=False)
class Family:
    """The facts of one family. Canonical names are those of its first layout."""

    name: str  # in options and files
    title: str  # in messages
    landmarks: tuple[str, ...]  # stored names, prefix apart, that every file has; one may end in *
    parts: tuple[Part, ...]  # in the order in which data flow
    bridge: str  # the pattern of the text bridge: what the article calls the refiner
    layouts: tuple[Layout, ...]  # canonical names first
    default_layout: str  # what is written unless another is asked for
    quantised: tuple[str, ...]  # ends of the matrices that quantised files quantise, in the stacks of `quantised_parts`
    quantised_parts: tuple[str, ...]
    infer: Callable[[Shapes, object], Sizes]  # sizes from shapes; raises FileFormatError
    smallest: Sizes  # of one block a stack: the names of all tensors
    shift: float  # of the flow, for pictures
    text_tokens: int  # that a prompt may have
    kinds: tuple[str, ...]  # of modules within a block, by a run of their names; for plots
    lora_targets: str  # a pattern: what its trainers adapt
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # short names in patterns -> dotted names
    optional: tuple[str, ...] = ()  # beginnings of names that a file may lack
    streams: Mapping[str, str] = field(default_factory=dict)  # stack before the main one -> image or text, in order
    patch: int = 2  # side of a token, in latents
    # What a block could be permuted by: kind -> the size that says how many rows one has ("" for one), what reads into
    # it, and last what reads from it; see `alkahest.measure.units`.
    units: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    # Modules that other programs' LoRAs fuse and no layout of a file does -> what their rows are.
    fused_modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pads: tuple[str, ...] = ()  # learned tokens, which ComfyUI does not patch
    scales: tuple[str, ...] = ()  # scales of norms whose name does not say norm
    prefixes: tuple[str, ...] = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "")

    @cached_property
    def main(self) -> str:
        """The main stack's head."""
        return next(part.heads[0] for part in self.parts if part.is_main)

    @cached_property
    def main_part(self) -> str:
        """The main stack's name as a part."""
        return next(part.name for part in self.parts if part.is_main)

    @cached_property
    def stacks(self) -> tuple[str, ...]:
        """Heads that are followed by the number of a block, in the order of the data."""
        return tuple(head for part in self.parts if part.is_stack for head in part.heads)

    @cached_property
    def bridge_parts(self) -> tuple[str, ...]:
        """Names of the parts that are the text bridge."""
        heads = self.aliases.get(self.bridge, (self.bridge,))
        return tuple(
            part.name
            for part in self.parts
            if any(f"{head}.".startswith(f"{one}.") for head in part.heads for one in heads)
        )

    def layout(self, name: str) -> Layout:
        """The layout of that name; UnknownNameError otherwise."""
        known = {layout.name: layout for layout in self.layouts}
        if name not in known:
            raise unknown("save", "unknown layout", name, known)
        return known[name]

    def recognises(self, names: Collection[str]) -> bool:
        """Whether these are the names of such a model, prefix apart."""
        return all(
            any(name.startswith(mark[:-1]) for name in names) if mark.endswith("*") else mark in names
            for mark in self.landmarks
        )

    def prefixes_in(self, names: Collection[str]) -> list[str]:
        """Prefixes under which the names may hold such a model, published ones first: none, one, or several."""
        mark = self.landmarks[0]
        found = [name.removesuffix(mark) for name in names if name == mark or name.endswith(f".{mark}")]
        rank = {prefix: number for number, prefix in enumerate(self.prefixes)}
        return sorted(found, key=lambda prefix: (rank.get(prefix, len(rank)), prefix))

    def has(self, stored: str) -> bool:
        """Whether a stored name, prefix removed, is that of a tensor of such a model."""
        return all(self.template(key) in self.templates or self.is_optional(key) for key in self.canonical(stored))

    def has_most_of(self, names: Iterable[str]) -> bool:
        """Whether most kinds of the family's tensors are among stored names: a LoRA may hold a few of them whole."""
        found = {self.template(key) for name in names for key in self.canonical(name)}
        return 2 * len(found & self.templates) > len(self.templates)

    def canonical(self, stored: str) -> tuple[str, ...]:
        """Canonical names of one stored tensor, prefix removed; several for a fused one, whose rows they are.

        Names that are canonical already stay, so files with mixed naming work too.
        """
        for layout in self.layouts:
            if (names := layout.canonical(stored)) != (stored,):
                return names
        return (stored,)

    def rows(self, keys: tuple[str, ...], total: int) -> tuple[int, ...] | None:
        """How many rows each of several canonical tensors has that are stored as one; None if it cannot be cut so."""
        if len(keys) == 1:
            return (total,)
        names = ((layout, layout.stored(keys[0])) for layout in self.layouts)
        return next((layout.rows(name, total) for layout, name in names if layout.canonical(name) == keys), None)

    def layout_of(self, names: Iterable[str]) -> str:
        """The layout of stored names without their prefix, or ``mixed``."""
        names, found = list(names), []
        for layout in self.layouts[1:]:
            if any(layout.canonical(name) != (name,) for name in names):
                found.append(layout.name)
        if any(all(layout.stored(name) != name for layout in self.layouts[1:]) for name in names if self.layouts[1:]):
            found.append(self.layouts[0].name)
        return "mixed" if len(found) > 1 else found[0] if found else self.default_layout

    def part_of(self, key: str) -> str:
        """The part of the model that a canonical name belongs to; of the main stack with the block's number."""
        part = self._part(key)
        if part is None:
            return "other"
        if not part.is_main:
            return part.name
        return f"{part.name}.{key.removeprefix(self.main + '.').split('.')[0]}"

    def block_of(self, key: str) -> tuple[int | None, str]:
        """The number of the block that a tensor is in, if it is in one, and its name within."""
        for head in self.stacks:
            if key.startswith(f"{head}."):
                number, _, rest = key.removeprefix(f"{head}.").partition(".")
                if number.isdigit():
                    return int(number), rest
        return None, key

    def place_in_main(self, key: str, blocks: int) -> float:
        """Where in the main stack a tensor is, 0 for the first block to 1 for the last; 0 before it, 1 after it."""
        if key.startswith(f"{self.main}."):
            number, _ = self.block_of(key)
            return (number or 0) / (blocks - 1) if blocks > 1 else 0.0
        names = [part.name for part in self.parts]
        part = self._part(key)
        return float(part is not None and names.index(part.name) > names.index(self.main_part))

    def in_model_order(self, keys: Iterable[str]) -> list[str]:
        """Names sorted as the data flow, blocks by their numbers."""
        heads = [head for part in self.parts for head in part.heads]

        def place(key: str) -> tuple[object, ...]:
            rank = next((n for n, head in enumerate(heads) if key == head or key.startswith(f"{head}.")), len(heads))
            return rank, tuple(f"{piece:0>6}" if piece.isdigit() else piece for piece in key.split("."))

        return sorted(keys, key=place)

    def is_optional(self, key: str) -> bool:
        """Whether a checkpoint may lack this tensor."""
        return key.startswith(self.optional)

    def is_quantisable(self, key: str) -> bool:
        """Whether quantised output quantises this tensor."""
        part = self._part(key)
        return part is not None and part.name in self.quantised_parts and key.endswith(self.quantised)

    def is_scale(self, key: str) -> bool:
        """Whether a tensor multiplies what a norm gives, and so lies around 1."""
        return "norm" in key or key in self.scales

    def depth(self, shapes: Shapes) -> int:
        """How many blocks the main stack has, by its names."""
        return count_blocks(shapes, self.main)

    def require_same_tensors(
        self, operation: str, left: Shapes, right: Shapes, left_name: Callable[[], str], right_name: Callable[[], str]
    ) -> None:
        """Raise MismatchError unless both have the same tensors; optional ones may be on one side only."""
        if left is right or left == right:
            return
        fix = "subtract and merge checkpoints of the same architecture"
        names = (left_name(), right_name())
        depths = (self.depth(left), self.depth(right))
        if depths[0] != depths[1]:
            found = "; ".join(f"{name}: {depth} layers" for name, depth in zip(names, depths, strict=True))
            alone = sorted(set(left) ^ set(right))
            key = f"{alone[0]}, ... ({len(alone)} tensors on one side only)" if alone else None
            raise MismatchError(operation, "the models have different depths", key=key, found=found, fix=fix)
        for key in {**left, **right}:
            if key in left and key in right and left[key] != right[key]:
                found = f"{names[0]}: {left[key]}; {names[1]}: {right[key]}"
                raise MismatchError(operation, "a tensor has different shapes", key=key, found=found, fix=fix)
            if (key in left) != (key in right) and not self.is_optional(key):
                has, lacks = names if key in left else names[::-1]
                found = f"{has} has it, {lacks} does not"
                raise MismatchError(operation, "a tensor is on one side only", key=key, found=found, fix=fix)

    def template(self, key: str) -> str:
        """A key with the number of its block left out, as ``layers.N.attention...``, of the stack that it is built
        as.
        """
        for part in self.parts:
            for head in part.heads if part.is_stack else ():
                if block := re.match(rf"{re.escape(head)}\.\d+\.", key):
                    return f"{part.built_as or head}.N.{key[block.end() :]}"
        return key

    @cached_property
    def templates(self) -> frozenset[str]:
        """Every tensor's `template`."""
        return frozenset(map(self.template, self.smallest.shapes()))

    def _part(self, key: str) -> Part | None:
        fits = (part for part in self.parts if any(key == head or key.startswith(f"{head}.") for head in part.heads))
        return next(fits, None)


def count_blocks(shapes: Collection[str], stack: str) -> int:
    """How many numbered blocks a stack has.

    A gap in the numbers shows up as missing tensors; a name like layers.99999999 must not.
    """
    at = len(stack) + 1
    numbers = [key[at:].split(".")[0] for key in shapes if key.startswith(f"{stack}.")]
    return min(1 + max((int(n) for n in numbers if n.isdigit() and len(n) < 5), default=-1), len(numbers))

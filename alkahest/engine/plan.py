"""What an output file will hold: every tensor's name, storage and place, before anything is read."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from alkahest.engine import terms
from alkahest.engine.readable import Leading
from alkahest.engine.scalars import Rules
from alkahest.engine.terms import Computable, Term
from alkahest.errors import AlgebraError, OutputError, unknown
from alkahest.files.header import BITS, Entry
from alkahest.files.reader import Reader
from alkahest.model.dtypes import FORMATS, FP8, FP64, SCALED, STORAGES, Format, storage_name
from alkahest.model.keys import Pattern
from alkahest.model.stored import MARKER, QUANTISATION, Slice, helper_bytes

ALL_IN_ONE_PREFIX = "model.diffusion_model."
_SUFFIXES = {"comfy_quant": ("weight_scale", "input_scale"), "scaled_fp8": ("scale_weight", "scale_input")}


@dataclass(frozen=True)
class Piece:
    """One canonical tensor inside a stored one: its term, or the slice that is copied byte for byte."""

    key: str
    term: Term
    elements: int
    copied: Slice | None = None
    before: Term | None = None  # what the leading checkpoint holds there, where the term is another


@dataclass(frozen=True)
class Weight:
    """A stored tensor that is copied or computed; ``scale_name`` is set if it is scaled fp8."""

    name: str
    form: Format
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    scale_name: str | None = None
    scale: float | None = None  # known beforehand if the bytes are copied
    spelling: str | None = None

    @property
    def tag(self) -> str:
        return self.form.tag

    @property
    def storage(self) -> str:
        return self.spelling or self.form.name

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.form.itemsize


@dataclass(frozen=True)
class Constant:
    """A small tensor whose bytes are known, or (``data`` None) a scale that is computed."""

    name: str
    tag: str
    shape: tuple[int, ...]
    data: bytes | None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.tag] // 8


@dataclass(frozen=True)
class Carried:
    """A tensor of another model in an all-in-one file, copied untouched."""

    name: str
    reader: Reader
    entry: Entry

    @property
    def tag(self) -> str:
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes


Item = Weight | Constant | Carried


@dataclass(frozen=True)
class Plan:
    """All tensors of the output in file order, one list per file, and what is worth telling about them."""

    files: list[list[Item]]
    layout: str
    notes: list[str]
    metadata: dict[str, str]

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for items in self.files for item in items)

    def weights(self) -> Iterator[Weight]:
        yield from (item for items in self.files for item in items if isinstance(item, Weight))


def make_plan(
    expression: Computable,
    rules: Rules,
    dtype: object,
    layout: str | None,
    max_shard_bytes: int | None = None,
    drop: str | None = None,
) -> Plan:
    """Decide the storage of every tensor and whether its bytes can be copied.

    ``dtype`` None keeps each tensor's storage in the leading checkpoint; ``layout`` None is native,
    or all-in-one if the leading checkpoint is. ``drop`` is a pattern of what lies beside the model and is left out.
    """
    leading = expression.leading
    dropped = _dropped(leading, drop)
    chosen = _choose_layout(layout, leading)
    names = leading.family.layout(leading.family.default_layout if chosen == "all-in-one" else chosen)
    prefix = ALL_IN_ONE_PREFIX if chosen == "all-in-one" else ""
    requested = None if dtype is None else storage_name(dtype)  # type: ignore[arg-type]
    groups: list[list[Item]] = []
    for name, keys in names.group(leading.shapes).items():
        form, spelling = _storage(leading, keys, requested)
        pieces = tuple(_piece(expression, key, rules, form, spelling) for key in keys)
        shape = _joined_shape([leading.shapes[key] for key in keys])
        groups.append(_weight_items(prefix + name, form, spelling, shape, pieces, leading))
    if any(item.name.endswith(".scale_weight") for group in groups for item in group):
        full = leading.full_precision
        groups.append([Constant(prefix + MARKER, "F8_E4M3", (2,) if full else (0,), b"\0\0" if full else b"")])
    extras = {name: place for name, place in leading.extras.items() if name not in dropped}
    groups += [[Carried(prefix + name, *place)] for name, place in extras.items()]
    if chosen == "all-in-one":
        groups += [[Carried(n, *place)] for n, place in leading.companions.items() if n not in dropped]
    weights = [item for group in groups for item in group if isinstance(item, Weight)]
    notes = _notes(expression, leading, chosen, weights, list(extras))
    if dropped:
        notes.append(f"{len(dropped)} tensors beside the model are left out: {', '.join(sorted(dropped)[:3])}")
    metadata = _companion_metadata(leading) if chosen == "all-in-one" else {}
    return Plan([_in_file_order(group) for group in _shards(groups, max_shard_bytes)], chosen, notes, metadata)


def count_restored(weights: Iterable[Weight], only: Callable[[str], bool] = lambda key: True) -> Counter[str]:
    """How many unchanged tensors had to be decoded and rounded once, by change of storage."""
    changes: Counter[str] = Counter()
    for weight in weights:
        for piece in weight.pieces:
            held = _place_of(piece.term)
            if held is not None and not piece.copied and only(piece.key):
                changes[f"{held.stored.storage} to {weight.storage}"] += 1
    return changes


def _choose_layout(layout: str | None, leading: Leading) -> str:
    if layout is None:
        return "all-in-one" if leading.companions else leading.family.default_layout
    if layout == "all-in-one" and not leading.companions:
        raise OutputError(
            "save",
            "there is no VAE or text encoder to carry",
            expected="an all-in-one file as leading checkpoint",
            found=leading.name,
            fix=f"use layout={leading.family.default_layout!r}",
        )
    known = [*(one.name for one in leading.family.layouts), "all-in-one"]
    if layout not in known:
        raise unknown("save", "unknown layout", layout, known)
    return layout


def _storage(leading: Leading, keys: list[str], requested: str | None) -> tuple[Format, str | None]:
    if requested is None:
        # Parts of a fused tensor may be stored differently when they come from a split layout.
        name = max((_written_as(leading.storage[key]) for key in keys), key=_WIDTHS.index)
    elif requested in (*FP8, *SCALED) and not all(map(leading.family.is_quantisable, keys)):
        name = "bf16"
    else:
        name = requested
    if name not in SCALED:
        return FORMATS[name], None
    held = leading.stored(keys[0]) if requested is None else None
    return FORMATS["fp8_e4m3fn"] if held is None else held.stored.form, name


# From the narrowest range to the widest: what a fused tensor is stored as whose parts differ.
_WIDTHS = (*FP8, *SCALED, "fp16", "bf16", "fp32")


def _written_as(storage: str) -> str:
    """The form that stored numbers keep, or get if theirs is read and never written."""
    return storage if storage in STORAGES else "fp32" if storage == FP64.name else "bf16"


def _piece(expression: Computable, key: str, rules: Rules, form: Format, spelling: str | None) -> Piece:
    found = expression.at(key, rules)
    if found is None:
        raise AlgebraError("save", "no value for a tensor", key=key)
    held = _place_of(found)
    same = (
        held is not None
        and held.stored.is_plain
        and held.stored.form == form
        and (held.stored.spelling is None) == (spelling is None)
    )
    leading = terms.Source(expression.leading, key)
    before = leading if found != leading and key in expression.leading.shapes else None
    return Piece(key, found, math.prod(expression.shapes[key]), held if same else None, before)


def _place_of(found: Term) -> Slice | None:
    """Where the bytes of a tensor lie that an expression leaves as it is."""
    return found.leaf.stored(found.key) if isinstance(found, terms.Source) else None


def _weight_items(
    name: str, form: Format, spelling: str | None, shape: tuple[int, ...], pieces: tuple[Piece, ...], leading: Leading
) -> list[Item]:
    if spelling is None:
        return [Weight(name, form, shape, pieces)]
    module = name.removesuffix(".weight")
    scale_suffix, input_suffix = _SUFFIXES[spelling]
    scales = {piece.copied.stored.scale if piece.copied else None for piece in pieces}
    scale = scales.pop() if len(scales) == 1 else None
    if scale is None:  # one scale for all rows: a piece can be copied only if all can, with the same scale
        pieces = tuple(replace(piece, copied=None) for piece in pieces)
    scale_name = f"{module}.{scale_suffix}"
    place = leading.stored(pieces[0].key)
    held = None if place is None else place.stored
    items: list[Item] = [
        Weight(name, form, shape, pieces, scale_name, scale, spelling),
        Constant(scale_name, "F32", (), None),
    ]
    if spelling == "comfy_quant":
        known = helper_bytes(held, "comfy_quant") if held is not None and held.form == form else None
        data = known or json.dumps({"format": f"float8_{form.name.removeprefix('fp8_')}"}).encode()
        items.append(Constant(f"{module}.comfy_quant", "U8", (len(data),), data))
    for suffix in ("input_scale", "scale_input"):
        known = helper_bytes(held, suffix) if held is not None else None
        if known is not None and len(known) == 4:
            items.append(Constant(f"{module}.{input_suffix}", "F32", (), known))
    return items


def _joined_notes(leading: Leading, weights: list[Weight]) -> list[str]:
    """What becomes of tensors that are written as one and were stored differently."""
    joined: Counter[str] = Counter()
    for weight in weights:
        stored = dict.fromkeys(leading.storage[piece.key] for piece in weight.pieces)
        if len(stored) > 1:
            joined[f"{' and '.join(stored)} are written as {weight.storage}"] += 1
    return [f"{count} fused tensors whose parts are stored as {change}" for change, count in joined.items()]


def _joined_shape(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    first = shapes[0]
    return first if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *first[1:])


def _companion_metadata(leading: Leading) -> dict[str, str]:
    # The header may describe a quantised text encoder, which is carried as it is.
    if QUANTISATION not in leading.metadata:
        return {}
    described = json.loads(leading.metadata[QUANTISATION])
    layers = {name: value for name, value in described["layers"].items() if f"{name}.weight" in leading.companions}
    return {QUANTISATION: json.dumps({**described, "layers": layers})} if layers else {}


def _shards(items: list[list[Item]], limit: int | None) -> list[list[Item]]:
    shards: list[list[Item]] = [[]]
    for group in items:  # a weight and its scale stay together
        size = sum(item.nbytes for item in group)
        if limit and shards[-1] and sum(item.nbytes for item in shards[-1]) + size > limit:
            shards.append([])
        shards[-1] += group
    return shards


def _in_file_order(items: list[Item]) -> list[Item]:
    # Widest first keeps every tensor aligned to its element size, as the safetensors library does.
    return sorted(items, key=lambda item: -BITS[item.tag])


def _dropped(leading: Leading, drop: str | None) -> set[str]:
    """What lies beside the model and a pattern leaves out. UnknownNameError if an item of it names none of that."""
    if drop is None:
        return set()
    beside = [*leading.extras, *leading.companions]
    if not beside:
        raise OutputError("save", "nothing lies beside the model that could be dropped", found=drop, fix="leave it out")
    pattern = Pattern(drop, leading.family).require_match(beside, "drop")
    return {name for name in beside if pattern.matches(name)}


def _notes(
    expression: Computable, leading: Leading, layout: str, weights: list[Weight], extras: list[str]
) -> list[str]:
    notes = []
    for change, count in count_restored(weights, expression.is_protected).items():
        notes.append(f"{count} protected tensors change storage ({change}): decoded and rounded once, not copied")
    if leading.companions and layout != "all-in-one":
        notes.append(
            f"{len(leading.companions)} tensors of other models in {leading.name} are left out; layout='all-in-one' "
            "keeps them"
        )
    if extras:
        first = ", ".join(extras[:3]) + (", ..." if len(extras) > 3 else "")
        notes.append(
            f"{len(extras)} tensors that are no part of {leading.family.title} are carried along as they are: "
            f"{first}; drop= leaves them out"
        )
    notes += [f"{leading.name}: {text}" for text in leading.oddities]
    notes += _joined_notes(leading, weights)
    whole = [piece.key for weight in weights for piece in weight.pieces if terms.needs_whole_tensor(piece.term)]
    if whole:
        largest = max(math.prod(expression.shapes[key]) for key in whole) * 4
        notes.append(
            f"{len(whole)} tensors are computed whole: each operand takes up to {largest / 1e6:,.0f} MB of memory"
        )
    return notes

"""Quantised storage: which helper tensors belong to which weight, and what the weight means.

Recognises ComfyUI's three spellings of fp8 with one scale per tensor (``scale_weight`` with a
``scaled_fp8`` marker, ``comfy_quant`` with ``weight_scale``, the ``_quantization_metadata`` header),
the packed forms of `alkahest.model.packed`, and refuses every other quantised format by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from alkahest.errors import FileFormatError, UnsupportedError
from alkahest.files.header import Entry
from alkahest.files.reader import Reader
from alkahest.model.dtypes import BY_TAG, FP8, Format, decode
from alkahest.model.packed import PACKED, Packed, packed_of, unpack
from alkahest.model.scales import SCALES, Grid, read_scale, refuse_unknown_beside

MARKER = "scaled_fp8"
QUANTISATION = "_quantization_metadata"
_INPUT_SCALES = ("input_scale", "scale_input")
_HELPERS = (*SCALES, *_INPUT_SCALES, "comfy_quant", "weight_scale_2")
_FORMATS = {"float8_e4m3fn": "fp8_e4m3fn", "float8_e5m2": "fp8_e5m2"}
_CONVERT = (
    "use the bf16, fp16, fp8, nvfp4, mxfp8 or int8 file of the same model; GGUF can be dequantised with the gguf "
    "package"
)


@dataclass(frozen=True)
class Stored:
    """One weight as a file holds it: where, in which format, with which scale and helper tensors."""

    reader: Reader
    name: str
    entry: Entry
    form: Format
    scale: float = 1.0
    spelling: str | None = None  # "comfy_quant", "scaled_fp8", or None if there is no scale
    helpers: tuple[tuple[str, Entry], ...] = field(default=(), compare=False)
    packed: Packed | None = None
    grid: Grid | None = None  # a scale for each row or block

    @property
    def storage(self) -> str:
        """The storage form's name: one of `dtypes.STORAGES`, or of what is read and never written."""
        return self.grid.storage if self.grid else self.spelling or self.form.name

    @property
    def is_plain(self) -> bool:
        """Whether the file's numbers, times one scale, are the weight's."""
        return self.packed is None and self.grid is None

    def decode(self, raw: torch.Tensor, start: int, out: torch.Tensor) -> None:
        """Numbers of a weight that is not packed, from their bytes: float32, from element ``start`` on."""
        decode(raw, self.form, out, self.scale)
        if self.grid is not None:
            self.grid.apply(out, start)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, unpacked."""
        return self.packed.shape if self.packed else self.entry.shape


@dataclass(frozen=True)
class Slice:
    """Where one canonical tensor lies: a stored tensor, and which of its elements, row after row."""

    stored: Stored
    start: int
    elements: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The canonical tensor's."""
        shape = self.stored.shape
        return (
            shape
            if len(shape) == 0
            else (self.elements // math.prod(shape[1:]) if math.prod(shape[1:]) else shape[0], *shape[1:])
        )

    @cached_property
    def is_bf16(self) -> bool:
        """Whether its numbers are bf16 as they stand."""
        return self.stored.is_plain and self.stored.form.name == "bf16" and self.stored.scale == 1.0

    @property
    def nbytes(self) -> int:
        """Bytes in the file, scales apart."""
        return self.stored.entry.nbytes * self.elements // max(1, math.prod(self.stored.shape))

    @cached_property
    def offset(self) -> int:
        """Position of the first byte in the file."""
        return self.stored.entry.offset + self.start * self.stored.form.itemsize


@dataclass(frozen=True)
class Resolved:
    """What a file holds of one model: stored weights by name, and the rest, which no part of it is."""

    weights: dict[str, Stored]
    extras: dict[str, tuple[Reader, Entry]]


def resolve(
    tensors: Mapping[str, tuple[Reader, Entry]],
    metadata: Mapping[str, str],
    prefix: str,
    is_known: Callable[[str], bool],
    block: tuple[int, int] | None = None,
) -> Resolved:
    """Stored weights by name (prefix removed), their helper tensors folded in; what is not known stays apart.

    ``block`` are the sides of fp8 blocks, if the model's configuration names them. Raises UnsupportedError for unknown
    formats and dtypes, for packed ones without comfy-kitchen, and for what lies beside an fp8 weight without being
    understood; FileFormatError if a scale is missing, orphaned, of the wrong shape, or not a positive number.
    """
    bare = {name.removeprefix(prefix): place for name, place in tensors.items()}
    marker = bare.pop(MARKER, None)
    helpers_of, extras = _sorted(bare, is_known)
    layers = _header_formats(metadata, prefix, bare)
    scaled = (
        marker is not None or layers or any({"comfy_quant", *SCALES} & given.keys() for given in helpers_of.values())
    )
    found: dict[str, Stored] = {}
    for name, helpers in helpers_of.items():
        reader, entry = bare[name]
        about = layers.get(name.removesuffix(".weight")) or _declaration(helpers, reader, name)
        declared = str(about["format"]) if about else None
        kind = declared or ("nvfp4" if "weight_scale_2" in helpers else None)
        kept = tuple((helper, place[1]) for helper, place in helpers.items())
        if kind in PACKED:
            packed = packed_of(name, kind, about or {}, entry, helpers, reader)
            found[name] = Stored(reader, name, entry, PACKED[kind], 1.0, None, kept, packed)
            continue
        form = _form(name, entry, reader, declared)
        required = bool(scaled and len(entry.shape) == 2)
        scale, spelling = _scale(name, form, entry.shape, helpers, reader, required, block)
        single, grid = (1.0, scale) if isinstance(scale, Grid) else (scale, None)
        found[name] = Stored(reader, name, entry, form, single, spelling, kept, grid=grid)
    fp8 = [name for name, one in found.items() if one.packed is None and one.form.name in FP8]
    refuse_unknown_beside(fp8, {n for n in fp8 if found[n].spelling}, extras, _file_of(bare))
    return Resolved(found, extras)


def _sorted(
    bare: Mapping[str, tuple[Reader, Entry]], is_known: Callable[[str], bool]
) -> tuple[dict[str, dict[str, tuple[Reader, Entry]]], dict[str, tuple[Reader, Entry]]]:
    """Known weights with their helper tensors, and what is neither. FileFormatError for a scale without its weight."""
    weights: dict[str, dict[str, tuple[Reader, Entry]]] = {
        name: {} for name in bare if name.rpartition(".")[2] not in _HELPERS and is_known(name)
    }
    extras: dict[str, tuple[Reader, Entry]] = {}
    for name, place in bare.items():
        module, _, helper = name.rpartition(".")
        weight = f"{module}.weight"
        if name in weights:
            continue
        if helper in _HELPERS and weight in weights:
            weights[weight][helper] = place
        elif helper in _HELPERS and weight not in bare and is_known(weight):
            raise FileFormatError(
                "open",
                "a scale without its weight",
                file=place[0].path,
                key=name,
                fix="the file is incomplete; get it again",
            )
        else:
            extras[name] = place
    return weights, extras


def _file_of(bare: Mapping[str, tuple[Reader, Entry]]) -> object:
    return next(iter(bare.values()))[0].path if bare else None


def helper_bytes(stored: Stored, helper: str) -> bytes | None:
    """A helper tensor's raw bytes, or None if the file has none for this weight."""
    entry = dict(stored.helpers).get(helper)
    return None if entry is None else stored.reader.read(entry.offset, entry.nbytes)


def whole_packed(stored: Stored) -> torch.Tensor:
    """Every number of a packed weight, float32 and flat."""
    assert stored.packed is not None
    raw = {}
    for name, entry in (("weight", stored.entry), *stored.helpers):
        raw[name] = torch.empty(entry.nbytes, dtype=torch.uint8)
        stored.reader.read_into(raw[name].numpy().data, entry.offset)
    return unpack(stored.packed, raw).flatten()


def _header_formats(metadata: Mapping[str, str], prefix: str, bare: Mapping[str, object]) -> dict[str, dict[str, Any]]:
    text = metadata.get(QUANTISATION)
    if text is None:
        return {}
    try:
        layers = json.loads(text)["layers"]
        formats = {str(name): {**value, "format": str(value["format"])} for name, value in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FileFormatError(
            "open", "the _quantization_metadata header cannot be read", found=text[:200], fix="get the file again"
        ) from None
    formats = {name.removeprefix(prefix): value for name, value in formats.items()}
    # An all-in-one file may describe its text encoder here as well.
    return {name: value for name, value in formats.items() if f"{name}.weight" in bare}


def _declaration(helpers: Mapping[str, tuple[Reader, Entry]], reader: Reader, name: str) -> dict[str, Any] | None:
    """What ``comfy_quant`` says about a weight, its format above all."""
    if "comfy_quant" not in helpers:
        return None
    entry = helpers["comfy_quant"][1]
    if entry.nbytes > 4096:
        raise FileFormatError("open", "comfy_quant is too long", file=reader.path, key=name, found=entry.nbytes)
    try:
        about = dict(json.loads(reader.read(entry.offset, entry.nbytes)))
        return {**about, "format": str(about["format"])}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FileFormatError(
            "open", "comfy_quant is not the JSON it should be", file=reader.path, key=name, fix="get the file again"
        ) from None


def _form(name: str, entry: Entry, reader: Reader, declared: str | None) -> Format:
    kind = declared if declared not in _FORMATS else None
    if kind is None and entry.dtype in ("U8", "I8"):
        kind = f"packed {entry.dtype} without comfy_quant, which would say what it is,"
    if kind is not None:
        raise UnsupportedError(
            "open",
            f"{kind} storage is not supported",
            file=reader.path,
            key=name,
            expected=", ".join(BY_TAG),
            found=kind,
            fix=_CONVERT,
        )
    if entry.dtype not in BY_TAG:
        raise UnsupportedError(
            "open",
            "this dtype is not supported for weights",
            file=reader.path,
            key=name,
            expected=", ".join(BY_TAG),
            found=entry.dtype,
            fix=_CONVERT,
        )
    form = BY_TAG[entry.dtype]
    if declared is not None and form.name != _FORMATS[declared]:
        raise FileFormatError(
            "open",
            "the declared format is not the stored one",
            file=reader.path,
            key=name,
            expected=declared,
            found=entry.dtype,
            fix="get the file again",
        )
    return form


def _scale(
    name: str,
    form: Format,
    shape: tuple[int, ...],
    helpers: Mapping[str, tuple[Reader, Entry]],
    reader: Reader,
    required: bool,
    block: tuple[int, int] | None,
) -> tuple[float | Grid, str | None]:
    """A weight's scale, and the spelling that it is written in; a weight without one has 1 and None."""
    present = [helper for helper in SCALES if helper in helpers]
    if len(present) > 1:
        raise FileFormatError(
            "open",
            "an fp8 weight has two scales",
            file=reader.path,
            key=name,
            found=" and ".join(present),
            fix="get another file of the same model",
        )
    if not present:
        if "comfy_quant" in helpers or (required and form.name in FP8):
            raise FileFormatError(
                "open",
                "an fp8 weight of a scaled file has no scale",
                file=reader.path,
                key=name,
                expected="weight_scale or scale_weight",
                found="none",
                fix="get the file again",
            )
        return 1.0, None
    scale = read_scale(name, present[0], helpers[present[0]], shape, block)
    return scale, "scaled_fp8" if present[0] == "scale_weight" else "comfy_quant"

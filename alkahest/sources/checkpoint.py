"""Checkpoint: the weights of one Z-Image transformer in whatever files people have.

Opening reads headers only. Tensors are read block by block when an expression is streamed.
"""

from __future__ import annotations

import html
import math
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from alkahest.algebra.expression import identifier
from alkahest.algebra.leaves import Leaf
from alkahest.engine.readable import Workspace
from alkahest.errors import (
    FileFormatError,
    NonFiniteError,
    UnknownNameError,
    UnsupportedError,
    nearest,
    refuse_unknown_options,
)
from alkahest.files.header import Entry
from alkahest.files.locate import Located, locate
from alkahest.files.reader import Reader, size_text
from alkahest.model.dtypes import decode
from alkahest.model.families import Family, recognise
from alkahest.model.keys import Pattern
from alkahest.model.stored import MARKER, Slice, Stored, resolve, whole_packed
from alkahest.sources.signs import holds_signs

_UNPACKING = threading.Lock()  # one at a time: memory is scarce there


class Checkpoint(Leaf, Mapping[str, torch.Tensor]):
    """An opened checkpoint, which is also a lazy mapping from canonical name to tensor, names in model order.

    >>> base = ak.open("z_image_bf16.safetensors")
    >>> base["layers.0.attention.to_q.weight"].shape
    torch.Size([3840, 3840])

    Keys are diffusers' names whatever the file's layout; q, k and v are rows of a fused tensor.
    """

    def __init__(self, located: Located, name: str | None = None) -> None:
        self.path = located.path
        self.files = located.files
        self.metadata = located.metadata
        self.config = located.config
        self.file_names = {reader: reader.path.name for reader in self.files}  # as recipes record them
        self.family, self.prefix = recognise(located.tensors.keys(), located.path)
        self.name = identifier(name or located.path)
        mine = {n: place for n, place in located.tensors.items() if n.startswith(self.prefix)}
        self.companions: dict[str, tuple[Reader, Entry]] = {
            n: place for n, place in located.tensors.items() if self.prefix and n not in mine
        }
        marker = mine.get(self.prefix + MARKER)
        self.full_precision = marker is not None and math.prod(marker[1].shape) == 2
        slices = _slices(self.family, resolve(mine, located.metadata, self.prefix), located.path)
        self.slices = {key: slices[key] for key in self.family.in_model_order(slices)}
        self._shapes = {key: piece.shape for key, piece in self.slices.items()}
        self.architecture = self.family.infer(self._shapes, located.path)
        self.unknown = self.family.unknown_in(self._shapes, self.architecture)
        self._whole: dict[str, torch.Tensor] = {}
        self.layout = self.family.layout_of(name.removeprefix(self.prefix) for name in mine)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    @cached_property
    def storage(self) -> dict[str, str]:
        """Canonical name -> storage form (``bf16``, ``comfy_quant``, ...)."""
        return {key: piece.stored.storage for key, piece in self.slices.items()}

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.slices.values())

    @property
    def parameters(self) -> int:
        return sum(piece.elements for piece in self.slices.values())

    def read(self, key: str, start: int, stop: int, out: torch.Tensor, workspace: Workspace) -> None:
        piece = self.slices[key]
        if piece.stored.packed is not None:
            out.copy_(self._unpack(piece)[start:stop])
            return
        size, offset = piece.stored.form.itemsize, piece.offset + start * piece.stored.form.itemsize
        with workspace.raw((stop - start) * size, offset) as raw:
            piece.stored.reader.read_into(raw.numpy().data, offset)
            decode(raw, piece.stored.form, out, piece.stored.scale)

    def stored(self, key: str) -> Slice:
        return self.slices[key]

    def check_finite(self, key: str, operation: str) -> None:
        if bad := int((~torch.isfinite(self[key].float())).sum()):
            raise NonFiniteError(
                operation,
                "an input holds NaN or infinity",
                file=self.slices[key].stored.reader.path,
                key=key,
                expected="finite numbers",
                found=f"{bad:,} of them in this tensor",
                fix="get the file again, or allow_nonfinite=True to keep them",
            )

    def _unpack(self, piece: Slice) -> torch.Tensor:
        """The numbers of a packed tensor; the last two weights are kept whole, because blocks and rows are asked for
        one by one.
        """
        stored, first = piece.stored, piece.start
        with _UNPACKING:
            if stored.name not in self._whole:
                while len(self._whole) > 1:
                    self._whole.pop(next(iter(self._whole)))
                self._whole[stored.name] = whole_packed(stored)
            return self._whole[stored.name][first : first + piece.elements]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_whole": {}}  # another process decodes for itself

    def part(self, pattern: str) -> Part:
        """The tensors that a pattern selects: ``base.part("refiner")``, ``base.part("layers.3")``."""
        chosen = Pattern(pattern, self.family).require_match(self._shapes, "part")
        return Part(self, pattern, [key for key in self._shapes if chosen.matches(key)])

    def __getitem__(self, key: str) -> torch.Tensor:
        """One tensor: in its stored dtype, or float32 where a scale had to be applied."""
        if key not in self.slices:
            raise UnknownNameError("read", "no such tensor", file=self.path, key=key, fix=nearest(key, self._shapes))
        piece = self.slices[key]
        if piece.stored.packed is not None:
            return self._unpack(piece).clone().view(self._shapes[key])
        raw = (
            torch.frombuffer(
                bytearray(piece.stored.reader.read(piece.offset, piece.elements * piece.stored.form.itemsize)),
                dtype=torch.uint8,
            )
            if piece.elements
            else torch.empty(0, dtype=torch.uint8)
        )
        if piece.stored.spelling is None:
            return raw.view(piece.stored.form.torch).view(self._shapes[key])
        values = torch.empty(piece.elements)
        decode(raw, piece.stored.form, values, piece.stored.scale)
        return values.view(self._shapes[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, key: object) -> bool:
        return key in self._shapes

    def _ipython_key_completions_(self) -> list[str]:
        return list(self._shapes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Checkpoint) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @cached_property
    def _identity(self) -> tuple[Any, ...]:
        return (self.prefix, *((os.path.realpath(f.path), f.stamp) for f in self.files))

    def summary(self) -> dict[str, Any]:
        """What `inspect --json` prints: layout, storage, sizes and parts, from the headers alone."""
        whole = [piece.stored for piece in self.slices.values() if piece.start == 0]
        return {
            "path": str(self.path),
            "files": len(self.files),
            "layout": self.layout,
            "prefix": self.prefix,
            "storage": dict(Counter(stored.storage for stored in whole).most_common()),
            "tensors": len(whole),
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "layers": self.architecture.layers,
            "width": self.architecture.width,
            "parts": self._parts(),
            "companions": dict(Counter(n.split(".")[0] for n in self.companions)),
            "unknown": self.unknown,
            "recipe": "alkahest" in self.metadata,
        }

    def _parts(self) -> dict[str, dict[str, Any]]:
        parts: dict[str, dict[str, Any]] = {}
        for key, piece in self.slices.items():
            name = self.family.part_of(key).split(".")[0]
            row = parts.setdefault(name, {"tensors": 0, "parameters": 0, "bytes": 0, "storage": []})
            row["tensors"] += piece.start == 0
            row["parameters"] += piece.elements
            row["bytes"] += piece.nbytes
            if piece.stored.storage not in row["storage"]:
                row["storage"].append(piece.stored.storage)
        return parts

    def __repr__(self) -> str:
        about = self.summary()
        lines = [f"{self.name}: Checkpoint {self.path.name}", *(f"  {name:9} {text}" for name, text in _facts(about))]
        lines.append(f"  {'part':16} {'tensors':>8} {'parameters':>14} {'size':>10}  storage")
        for name, row in about["parts"].items():
            lines.append(
                f"  {name:16} {row['tensors']:>8} {row['parameters']:>14,} {size_text(row['bytes']):>10}  "
                + ", ".join(row["storage"])
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        about = self.summary()
        facts = "".join(f"<tr><th>{n}</th><td>{html.escape(t)}</td></tr>" for n, t in _facts(about))
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{row['tensors']}</td><td>{row['parameters']:,}</td>"
            f"<td>{size_text(row['bytes'])}</td><td>{', '.join(row['storage'])}</td></tr>"
            for name, row in about["parts"].items()
        )
        head = "<tr><th>part</th><th>tensors</th><th>parameters</th><th>size</th><th>storage</th></tr>"
        title = html.escape(f"{self.name}: Checkpoint {self.path.name}")
        return f"<div><b>{title}</b><table>{facts}</table><table>{head}{rows}</table></div>"


@dataclass(frozen=True, repr=False)
class Part(Mapping[str, torch.Tensor]):
    """Some tensors of a checkpoint, read when asked for: a mapping from canonical name to tensor."""

    checkpoint: Checkpoint
    pattern: str
    names: list[str]

    def _ipython_key_completions_(self) -> list[str]:
        return self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self.names:
            raise UnknownNameError("read", f"not in part {self.pattern!r}", key=key, fix=nearest(key, self.names))
        return self.checkpoint[key]

    @property
    def parameters(self) -> int:
        return sum(self.checkpoint.slices[key].elements for key in self.names)

    def __repr__(self) -> str:
        lines = [f"{self.checkpoint.name}.part({self.pattern!r}): {len(self)} tensors, {self.parameters:,} parameters"]
        shapes, storage = self.checkpoint.shapes, self.checkpoint.storage
        lines += [f"  {key:52} {shapes[key]!s:16} {storage[key]}" for key in self.names[:20]]
        return "\n".join(lines + ([f"  ... and {len(self) - 20} more"] if len(self) > 20 else []))


@refuse_unknown_options
def open(source: str | os.PathLike[str], *, name: str | None = None) -> Checkpoint:
    """Open a Z-Image checkpoint by reading its headers.

    >>> ak.open("z_image_bf16.safetensors")
    >>> ak.open("models/Z-Image/transformer"), ak.open("Tongyi-MAI/Z-Image")

    Takes single files with any published prefix, all-in-one files, diffusers and pipeline folders,
    sharded checkpoints and hub ids; fp32, fp16, bf16, fp8 plain and scaled, and with comfy-kitchen nvfp4, mxfp8 and
    int8. ``name`` is what recipes call it (default: from the file's name). Raises FileFormatError for damaged,
    incomplete or lying files, UnsupportedError for other models, other quantised forms, GGUF and pickles.
    """
    located = locate(source)
    if holds_signs(located):
        raise UnsupportedError(
            "open", "these are gradient signs, not a checkpoint", file=located.path, fix="ak.open_signs(path)"
        )
    return Checkpoint(located, name)


def _slices(family: Family, stored: Mapping[str, Stored], file: Path) -> dict[str, Slice]:
    slices: dict[str, Slice] = {}
    for name, weight in stored.items():
        keys, start = family.canonical(name), 0
        for key, elements in zip(keys, _elements(family, name, weight, keys, file), strict=True):
            if key in slices:
                raise FileFormatError(
                    "open",
                    "the same tensor is there twice, under two names",
                    file=file,
                    key=key,
                    found=f"{slices[key].stored.name} and {name}",
                    fix="the file mixes two layouts; get it again",
                )
            slices[key] = Slice(weight, start, elements)
            start += elements
    return slices


def _elements(family: Family, name: str, weight: Stored, keys: tuple[str, ...], file: Path) -> list[int]:
    """How many elements each of the canonical tensors has that are rows of a stored one."""
    if len(keys) == 1:
        return [math.prod(weight.shape)]
    rows = family.rows(keys, weight.shape[0]) if weight.shape else None
    if rows is None:
        raise FileFormatError(
            "open",
            "a fused tensor cannot be cut into its parts",
            file=file,
            key=name,
            expected=f"a multiple of {len(keys)} rows",
            found=weight.shape,
        )
    return [count * math.prod(weight.shape[1:]) for count in rows]


def _facts(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    storage = ", ".join(f"{form} ({count})" for form, count in about["storage"].items())
    prefix = f", prefix {about['prefix']!r}" if about["prefix"] else ""
    files = f" in {about['files']} files" if about["files"] > 1 else ""
    facts = [
        ("layout", about["layout"] + prefix + files),
        ("storage", storage),
        ("size", f"{size_text(about['bytes'])}, {about['parameters']:,} parameters, {about['tensors']} tensors"),
        ("depth", f"{about['layers']} layers, width {about['width']}"),
    ]
    if about["companions"]:
        facts.append(("also", ", ".join(f"{n} ({count} tensors)" for n, count in about["companions"].items())))
    if about["unknown"]:
        facts.append(("unknown", ", ".join(about["unknown"][:5])))
    if about["recipe"]:
        facts.append(("recipe", "recorded in the file"))
    return facts

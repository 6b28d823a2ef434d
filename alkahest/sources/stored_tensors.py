"""Tensors that lie in files, by canonical name: what whole checkpoints and partial ones have in common."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from alkahest.engine.readable import Readable, Workspace
from alkahest.errors import FileFormatError, NonFiniteError, UnknownNameError, nearest
from alkahest.model.families import Family
from alkahest.model.stored import Slice, Stored, whole_packed

_UNPACKING = threading.Lock()  # one at a time: memory is scarce there


class StoredTensors(Readable, Mapping[str, torch.Tensor]):
    """A lazy mapping from canonical name to tensor, names in model order."""

    path: Path
    prefix: str
    family: Family
    slices: dict[str, Slice]

    def _take(self, weights: Mapping[str, Stored]) -> None:
        """Hold what `resolve` found, under canonical names."""
        slices = _slices_of(self.family, weights, self.path)
        self.slices = {key: slices[key] for key in self.family.in_model_order(slices)}
        self._shapes = {key: piece.shape for key, piece in self.slices.items()}
        self._whole: dict[str, torch.Tensor] = {}

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
            piece.stored.decode(raw, piece.start + start, out)

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
        if piece.stored.is_plain and piece.stored.spelling is None:
            return raw.view(piece.stored.form.torch).view(self._shapes[key])
        values = torch.empty(piece.elements)
        piece.stored.decode(raw, piece.start, values)
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
        return isinstance(other, type(self)) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @cached_property
    def _identity(self) -> tuple[Any, ...]:
        return (self.prefix, *((os.path.realpath(f.path), f.stamp) for f in self.files))


def _slices_of(family: Family, stored: Mapping[str, Stored], file: Path) -> dict[str, Slice]:
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

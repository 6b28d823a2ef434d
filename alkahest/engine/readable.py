"""What can be read, as the engine sees it: checkpoints, LoRAs and what is computed elsewhere are this, by no other
name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from alkahest.errors import NonFiniteError
from alkahest.files.header import Entry
from alkahest.files.reader import LINE, Reader
from alkahest.model.families import Family, Sizes
from alkahest.model.stored import Slice

Bits = npt.NDArray[np.uint16]
Shapes = Mapping[str, tuple[int, ...]]


class Workspace:
    """One worker's reusable buffers; they grow to the largest block asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: list[torch.Tensor] = []
        self._raw: list[torch.Tensor] = []
        self.repeated: dict[int, tuple[object, tuple[int, ...]]] = {}  # by a term's id: what stands in it repeatedly
        # What NaN and infinity in a merge method's operand are told to, by tensor and count; None: they are an error.
        self.watch: Callable[[str, int], None] | None = None

    @contextmanager
    def raw(self, nbytes: int, offset: int) -> Iterator[torch.Tensor]:
        """``nbytes`` bytes on the CPU, for the length of the with block, to be read from or written to ``offset`` of
        a file.
        """
        buffer = self._raw.pop() if self._raw else torch.empty(0, dtype=torch.uint8)
        if buffer.numel() < nbytes + LINE:
            buffer = torch.empty(nbytes + LINE, dtype=torch.uint8)
        first = offset % LINE // 8 * 8  # torch's memory begins a line; a view as numbers needs 8
        try:
            yield buffer[first : first + nbytes]
        finally:
            self._raw.append(buffer)

    @contextmanager
    def block(self, count: int) -> Iterator[torch.Tensor]:
        """``count`` float32 numbers on the device, for the length of the with block."""
        buffer = self._free.pop() if self._free else torch.empty(0, device=self.device)
        if buffer.numel() < count:
            buffer = torch.empty(count, dtype=torch.float32, device=self.device)
        try:
            yield buffer[:count]
        finally:
            self._free.append(buffer)


class Readable(ABC):
    """A source of numbers by canonical name: a checkpoint, a LoRA, weights made from a seed, another program's model.

    Blocks are asked for by several workers at once, in any order. Equal ones hold the same numbers.
    """

    name: str  # what recipes call it
    files: tuple[Reader, ...] = ()  # that it reads, if it reads any
    file_names: Mapping[Reader, str] = {}  # as recipes record them
    config: dict[str, Any] | None = None  # diffusers' config.json, where the files have one
    is_reproducible = True  # whether a recipe can name it

    @property
    @abstractmethod
    def shapes(self) -> Shapes:
        """Canonical name -> shape of every tensor that it has."""

    @property
    def storage(self) -> Mapping[str, str]:
        """Canonical name -> storage form, as `alkahest.model.dtypes.STORAGES` names it, of numbers that are stored
        as they are.
        """
        return {}

    @abstractmethod
    def read(self, key: str, start: int, stop: int, out: torch.Tensor, workspace: Workspace) -> None:
        """Fill ``out`` (float32) with elements ``start`` to ``stop`` of a tensor, flat and row-major."""

    def stored(self, key: str) -> Slice | None:
        """Where a tensor lies in a file, to be copied byte for byte; None if it is computed."""
        return None

    @contextmanager
    def bits(self, key: str, start: int, stop: int, workspace: Workspace) -> Iterator[Bits]:
        """Elements of a tensor that is stored in bf16, as they are stored, for the length of the with block."""
        held = self.stored(key)
        assert held is not None
        offset = held.offset + 2 * start
        with workspace.raw(2 * (stop - start), offset) as raw:
            held.stored.reader.read_into(raw.numpy().data, offset)
            yield raw.numpy().view(np.uint16)

    def check_finite(self, key: str, operation: str) -> None:
        """Raise NonFiniteError if a tensor holds NaN or infinity."""
        whole = torch.empty(math.prod(self.shapes[key]))
        self.read(key, 0, whole.numel(), whole, Workspace(whole.device))
        if bad := int((~torch.isfinite(whole)).sum()):
            raise NonFiniteError(
                operation,
                f"{self.name} holds NaN or infinity",
                key=key,
                expected="finite numbers",
                found=f"{bad:,} of them in this tensor",
            )


class Leading(Readable):
    """A whole model, from which an output takes storage, layout and what lies beside the weights."""

    family: Family
    architecture: Sizes
    layout: str = ""  # how its files name the tensors; empty if it is in none
    metadata: Mapping[str, str] = {}
    companions: Mapping[str, tuple[Reader, Entry]] = {}  # tensors of other models in the same file
    extras: Mapping[str, tuple[Reader, Entry]] = {}  # tensors beside the model's that are no part of it, prefix removed
    oddities: Sequence[str] = ()  # what is unusual about the files, in words
    full_precision = False  # what a scaled fp8 file says of its arithmetic

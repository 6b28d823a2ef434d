"""Signs of a gradient as a source: eight weights a byte, and of a delta what goes downhill by them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alkahest.algebra.expression import identifier
from alkahest.algebra.leaves import DeltaLeaf
from alkahest.engine.readable import Workspace
from alkahest.errors import AlgebraError, FileFormatError, UnsupportedError, printable, refuse_unknown_options
from alkahest.files.header import Entry, parse_json
from alkahest.files.locate import locate
from alkahest.files.paths import recorded_name
from alkahest.files.reader import Reader, size_text
from alkahest.files.shards import Located
from alkahest.files.whole import write_file
from alkahest.model.families import Family, family_of

MARK = "alkahest_signs"  # in the header's metadata: the shapes, and what the signs were taken of


class Signs(DeltaLeaf):
    """The sign of a loss' gradient for every weight, +1 where it is positive and -1 elsewhere.

    Made by `ak.gradient_signs`, and opened from a file by `open_signs`; ``delta.agreeing(signs)`` keeps what goes
    downhill.
    """

    holds_signs = True

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        packed: Mapping[str, torch.Tensor] | None = None,
        located: Located | None = None,
        name: str = "signs",
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.about = dict(about or {})
        self.family: Family = family_of(shapes)
        self._shapes = dict(shapes)
        self._packed = packed
        self._places: Mapping[str, tuple[Reader, Entry]] = {} if located is None else located.tensors
        self.files = () if located is None else located.files
        self.file_names = {reader: recorded_name(reader.path) for reader in self.files}
        self.is_reproducible = bool(self.files)

    @property
    def path(self) -> Path:
        """The file; AlgebraError for signs that were not saved."""
        if not self.files:
            raise AlgebraError("signs", "these were not saved yet", fix="signs = signs.save('signs.safetensors')")
        return self.files[0].path

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, key: str, start: int, stop: int, out: torch.Tensor, workspace: Workspace) -> None:
        first = start // 8
        raw = self._bytes(key, first, -(-stop // 8))
        bits = np.unpackbits(raw, bitorder="little")[start - 8 * first : stop - 8 * first]
        out.copy_(torch.from_numpy(bits.astype(np.float32) * 2 - 1))

    def _bytes(self, key: str, first: int, last: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        if self._packed is not None:
            found: np.ndarray[Any, np.dtype[np.uint8]] = self._packed[key][first:last].numpy()
            return found
        reader, entry = self._places[key]
        raw = np.empty(last - first, np.uint8)
        reader.read_into(raw.data, entry.offset + first)
        return raw

    def save(self, path: str | os.PathLike[str]) -> Signs:
        """Write the signs as one safetensors file; the same, opened from it, which recipes know by its hash."""
        from safetensors.torch import save as to_bytes

        whole = {
            key: torch.from_numpy(self._bytes(key, 0, -(-math.prod(s) // 8)).copy()) for key, s in self._shapes.items()
        }
        told = json.dumps({"shapes": self._shapes, "about": self.about})
        write_file(Path(path), to_bytes(whole, {"format": "pt", MARK: told}))
        return open_signs(path)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Signs) and bool(self.files) and self._identity == other._identity)

    def __hash__(self) -> int:
        return hash(self._identity) if self.files else id(self)

    @property
    def _identity(self) -> tuple[Any, ...]:
        return tuple((os.path.realpath(reader.path), reader.stamp) for reader in self.files)

    def __repr__(self) -> str:
        size = sum(-(-math.prod(shape) // 8) for shape in self._shapes.values())
        of = "".join(f"\n  {name}: {value}" for name, value in self.about.items())
        return printable(f"{self.name}: gradient signs of {len(self._shapes)} tensors, {size_text(size)}{of}")


@refuse_unknown_options
def open_signs(source: str | os.PathLike[str], *, name: str | None = None) -> Signs:
    """Open signs that `Signs.save` wrote, by reading the header.

    Parameters
    ----------
    source : str or path
        The file.
    name : str, optional
        What recipes call it, by default from the file's name.

    Returns
    -------
    Signs

    Raises
    ------
    UnsupportedError
        For other files.
    FileFormatError
        For shapes that the bytes do not fit.

    Examples
    --------
    >>> made = ak.gradient_signs(bridge, prompts=prompts, variant=variant, count=3, steps=4).save("signs.safetensors")
    >>> merged = bridge.protect("refiner") + 1.2 * (variant - base).agreeing(ak.open_signs("signs.safetensors"))
    """
    located = locate(source)
    if not holds_signs(located):
        raise UnsupportedError(
            "open_signs",
            "this file holds no gradient signs",
            file=located.path,
            fix="ak.gradient_signs(bridge, pictures, prompts).save('signs.safetensors')",
        )
    return signs_of(located, name)


def holds_signs(located: Located) -> bool:
    """Whether a file says that it holds gradient signs."""
    return MARK in located.metadata


def signs_of(located: Located, name: str | None = None) -> Signs:
    """The signs in a file; FileFormatError unless its header describes them."""
    told = parse_json(located.metadata[MARK].encode(), located.files[0])
    try:
        shapes = {str(key): tuple(int(side) for side in shape) for key, shape in told["shapes"].items()}
        about = dict(told["about"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(
            "open_signs", "the header does not describe its signs", file=located.path, found=error
        ) from None
    for key, (_, entry) in located.tensors.items():
        expected = [-(-math.prod(shapes[key]) // 8)] if key in shapes else None
        if entry.dtype != "U8" or list(entry.shape) != expected:
            raise FileFormatError(
                "open_signs",
                "the bytes do not fit the shape",
                file=located.path,
                key=key,
                expected=f"{expected} of U8",
                found=f"{list(entry.shape)} of {entry.dtype}",
            )
    if absent := [key for key in shapes if key not in located.tensors]:
        raise FileFormatError("open_signs", "a tensor is missing", file=located.path, key=absent[0])
    return Signs(shapes, None, located, name or identifier(located.path), about)

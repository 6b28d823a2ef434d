"""fp8 with a scale for each row or block of a matrix, and what may lie beside an fp8 weight without being understood.

Forms: one scale a row (compressed-tensors, torchao), or one a square block, as DeepSeek's and transformers'
``weight_scale_inv`` (https://huggingface.co/docs/transformers/quantization/finegrained_fp8), which in spite of its name
is multiplied with.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alkahest.errors import FileFormatError, UnsupportedError
from alkahest.files.header import Entry
from alkahest.files.reader import Reader
from alkahest.model.dtypes import BY_TAG

SCALES = ("weight_scale", "scale_weight", "weight_scale_inv")
_SIDES = (128, 64, 32, 16, 256)  # of blocks, the published one first
_DTYPES = ("F32", "F16", "BF16", "F64")
# Words in names of what is a scale, or belongs to one.
_WORDS = ("scale", "quant", "amax", "absmax", "zero_point", "zeros", "blocks")


@dataclass(frozen=True)
class Grid:
    """Scales of a matrix' blocks of ``rows`` by ``columns`` numbers; ``width`` is the matrix' own."""

    values: Tensor = field(compare=False)  # float32 [blocks down, blocks across]
    rows: int
    columns: int
    width: int

    @property
    def storage(self) -> str:
        """The storage form's name."""
        return "fp8_rows" if self.rows == 1 and self.columns >= self.width else "fp8_blocks"

    def apply(self, out: Tensor, start: int) -> None:
        """Multiply flat numbers of the matrix, from element ``start`` on, by their scales."""
        place = torch.arange(start, start + out.numel())
        row, column = place.div(self.width, rounding_mode="floor"), place % self.width
        found = self.values[row.div(self.rows, rounding_mode="floor"), column.div(self.columns, rounding_mode="floor")]
        out.mul_(found.to(out.device))


def read_scale(
    name: str, helper: str, place: tuple[Reader, Entry], shape: tuple[int, ...], block: tuple[int, int] | None
) -> float | Grid:
    """The scale of a whole weight, or the grid of its blocks'; ``block`` is what the model's configuration says.

    FileFormatError if its shape fits no form, or it is not of positive numbers.
    """
    reader, entry = place
    sides = _sides_of(entry.shape, shape, block)
    if sides is None or entry.dtype not in _DTYPES:
        raise FileFormatError(
            "open",
            "a scale has the wrong shape or dtype",
            file=reader.path,
            key=f"{name} ({helper})",
            expected=f"one float, one for each of {shape[0] if shape else 1} rows, or one for each square block",
            found=f"{entry.dtype} {entry.shape}",
            fix="use the bf16, fp16 or another fp8 file of the same model",
        )
    raw = bytearray(reader.read(entry.offset, entry.nbytes))
    dtype = torch.float64 if entry.dtype == "F64" else BY_TAG[entry.dtype].torch
    values = torch.frombuffer(raw, dtype=dtype).float()
    if not (torch.isfinite(values).all() and (values > 0).all()):
        bad = values[~(torch.isfinite(values) & (values > 0))]
        raise FileFormatError(
            "open",
            "a scale is not a positive number",
            file=reader.path,
            key=f"{name} ({helper})",
            expected="a positive number",
            found=float(bad[0]),
            fix="get the file again",
        )
    if values.numel() == 1:
        return float(values)
    rows, columns = sides
    return Grid(values.view(-(-shape[0] // rows), -(-shape[1] // columns)), rows, columns, shape[1])


def _sides_of(scale: tuple[int, ...], shape: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns of the blocks that so many scales are for; None if they fit no form."""
    if math.prod(scale) == 1:
        return 1, 1
    if len(shape) != 2:
        return None
    if scale in ((shape[0],), (shape[0], 1)):
        return 1, shape[1]
    tried = [block] if block else [*((side, side) for side in _SIDES), *((1, side) for side in _SIDES)]
    fits = (sides for sides in tried if scale == tuple(-(-n // side) for n, side in zip(shape, sides, strict=True)))
    return next(fits, None)


def refuse_unknown_beside(
    weights: Iterable[str], scaled: Collection[str], extras: Collection[str], file: object
) -> None:
    """Raise UnsupportedError if something lies beside an fp8 weight that might say what its numbers mean.

    ``weights`` are names of fp8 weights, ``scaled`` those of them whose scale is known, ``extras`` what the model's
    family does not have. Read without it, such a weight would be thousands of times too large.
    """
    modules = {name.removesuffix(".weight"): name for name in weights}
    plain = {module.rpartition(".")[0] for module, name in modules.items() if name not in scaled}
    for extra in extras:
        if extra.endswith(".bias"):
            continue
        near = next((modules[run] for run in _runs(extra) if run in modules), None)
        beside = plain and (extra.rpartition(".")[0] in plain or any(word in extra.lower() for word in _WORDS))
        if near or beside:
            raise UnsupportedError(
                "open",
                "something lies beside an fp8 weight that is not understood: it may say how to scale it",
                file=file,
                key=extra,
                expected=f"{', '.join(SCALES)} or comfy_quant beside {near or 'fp8 weights'}",
                found=extra,
                fix="use the bf16, fp16 or ComfyUI's fp8 file of the same model",
            )


def _runs(name: str) -> Iterable[str]:
    """Every dotted run of a name, its last component also cut short at an underscore: what module it may be about."""
    parts = name.split(".")
    for first in range(len(parts)):
        for last in range(first + 1, len(parts) + 1):
            head, tail = parts[first : last - 1], parts[last - 1].split("_")
            yield from (".".join([*head, "_".join(tail[:count])]) for count in range(1, len(tail) + 1))

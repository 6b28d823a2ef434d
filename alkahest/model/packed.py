"""Storage that packs numbers or scales them block by block: nvfp4, mxfp8 and int8, decoded by comfy-kitchen.

Which tensors belong together, and how they are laid out, is ComfyUI's (``comfy/ops.py``, 0.33.0). comfy-kitchen
(Apache-2.0) is the library that ComfyUI itself decodes with; it needs whole tensors.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from alkahest.errors import FileFormatError, UnsupportedError
from alkahest.files.header import Entry
from alkahest.files.reader import Reader
from alkahest.model.dtypes import Format

# Kind -> the dtype of its weight; a Format of that name stands for "none that can be copied or rounded to".
PACKED = {
    kind: Format(kind, tag, torch.uint8, 0, 0, math.inf)
    for kind, tag in {"nvfp4": "U8", "mxfp8": "F8_E4M3", "int8_tensorwise": "I8"}.items()
}
_ROTATIONS = (4, 16, 64, 256, 1024)  # group sizes of ConvRot: regular Hadamard matrices


@dataclass(frozen=True)
class Packed:
    """How one weight is packed: its kind, its shape unpacked, and the size of rotated groups of columns, if any."""

    kind: str
    shape: tuple[int, ...]
    rotated: int = 0


def packed_of(
    name: str,
    kind: str,
    about: Mapping[str, Any],
    entry: Entry,
    helpers: Mapping[str, tuple[Reader, Entry]],
    reader: Reader,
) -> Packed:
    """What a packed weight is, checked from the header alone; UnsupportedError without comfy-kitchen."""

    def refused(problem: str, expected: object, found: object) -> FileFormatError:
        return FileFormatError(
            "open", problem, file=reader.path, key=name, expected=expected, found=found, fix="get the file again"
        )

    if importlib.util.find_spec("comfy_kitchen") is None:
        raise UnsupportedError(
            "open",
            f"{kind} storage needs comfy-kitchen, which is not installed",
            file=reader.path,
            key=name,
            found=kind,
            fix="pip install comfy-kitchen, or use the bf16, fp16 or fp8 file of the same model",
        )
    if entry.dtype != PACKED[kind].tag or len(entry.shape) != 2:
        raise refused(f"this is no {kind} weight", f"a matrix of {PACKED[kind].tag}", f"{entry.dtype} {entry.shape}")
    rows, columns = entry.shape[0], entry.shape[1] * (2 if kind == "nvfp4" else 1)
    block = {"nvfp4": 16, "mxfp8": 32, "int8_tensorwise": 1}[kind]
    # Scales of blocks lie in tiles of 128 rows and 4 blocks, as cuBLAS wants them, the last ones padded.
    tiles = -(-rows // 128) * 128 * -(-(columns // block) // 4) * 4
    every: dict[str, dict[str, tuple[tuple[str, ...], tuple[int, ...]]]] = {
        "nvfp4": {"weight_scale": (("U8", "F8_E4M3"), (tiles,)), "weight_scale_2": (("F32",), (1,))},
        "mxfp8": {"weight_scale": (("U8", "F8_E8M0"), (tiles,))},
        "int8_tensorwise": {"weight_scale": (("F32",), (1, rows))},
    }
    if columns % block:
        raise refused(f"a {kind} weight has whole blocks in a row", f"a multiple of {block} columns", columns)
    for helper, (tags, counts) in every[kind].items():
        held = helpers[helper][1] if helper in helpers else None
        if held is None or held.dtype not in tags or math.prod(held.shape) not in counts:
            found = "none" if held is None else f"{held.dtype} {held.shape}"
            raise refused(
                f"a {kind} weight without its {helper}",
                f"{' or '.join(map(str, counts))} of {' or '.join(tags)}",
                found,
            )
    return Packed(kind, (rows, columns), _rotation(about, columns, refused) if kind == "int8_tensorwise" else 0)


def _rotation(about: Mapping[str, Any], columns: int, refused: Any) -> int:
    inner = about.get("params")
    known = {**(inner if isinstance(inner, dict) else {}), **about}
    if not known.get("convrot", False):
        return 0
    group = known.get("convrot_groupsize", 256)
    if group not in _ROTATIONS or columns % group:
        raise refused("rotated groups of columns do not fit", f"one of {_ROTATIONS} that divides {columns}", group)
    return int(group)


def unpack(packed: Packed, raw: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The numbers of a packed weight, float32; ``raw`` has its bytes (uint8) and those of its helper tensors."""
    layouts = _layouts()
    given = {"orig_dtype": torch.float32, "orig_shape": packed.shape}
    weight = raw["weight"].view(packed.shape[0], -1)
    match packed.kind:
        case "nvfp4":
            blocks = raw["weight_scale"].view(torch.float8_e4m3fn).view(-1, 4)
            scale = raw["weight_scale_2"].view(torch.float32).view(())
            params = layouts["nvfp4"].Params(scale=scale, block_scale=blocks, **given)
        case "mxfp8":
            weight = weight.view(torch.float8_e4m3fn)
            params = layouts["mxfp8"].Params(scale=raw["weight_scale"].view(torch.float8_e8m0fnu).view(-1, 4), **given)
        case _:
            weight = weight.view(torch.int8)
            scale = raw["weight_scale"].view(torch.float32)
            scale = scale.view(()) if scale.numel() == 1 else scale.view(-1, 1)
            params = layouts["int8_tensorwise"].Params(
                scale=scale, convrot=bool(packed.rotated), convrot_groupsize=packed.rotated or 256, **given
            )
    result: torch.Tensor = layouts[packed.kind].dequantize(weight, params)
    return result[: packed.shape[0], : packed.shape[1]]


@functools.cache
def _layouts() -> dict[str, Any]:
    from comfy_kitchen import tensor

    return {
        "nvfp4": tensor.TensorCoreNVFP4Layout,
        "mxfp8": tensor.TensorCoreMXFP8Layout,
        "int8_tensorwise": tensor.TensorWiseINT8Layout,
    }

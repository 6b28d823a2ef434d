"""Number formats: decode to float32, encode from float32 with nearest or stochastic rounding.

fp8 here is e4m3fn (largest 448) or e5m2 (largest 57,344), as in the OCP 8-bit specification.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from alkahest.errors import UnknownNameError, nearest
from alkahest.model import seeded

Tensor = torch.Tensor


@dataclass(frozen=True)
class Format:
    """A stored number format: its safetensors tag, torch dtype and the numbers that define rounding."""

    name: str
    tag: str
    torch: torch.dtype
    mantissa: int  # explicit bits
    min_exponent: int  # of the smallest normal number
    largest: float

    @property
    def itemsize(self) -> int:
        return self.torch.itemsize


FORMATS = {
    form.name: form
    for form in (
        Format("fp32", "F32", torch.float32, 23, -126, torch.finfo(torch.float32).max),
        Format("fp16", "F16", torch.float16, 10, -14, 65504.0),
        Format("bf16", "BF16", torch.bfloat16, 7, -126, torch.finfo(torch.bfloat16).max),
        Format("fp8_e4m3fn", "F8_E4M3", torch.float8_e4m3fn, 3, -6, 448.0),
        Format("fp8_e5m2", "F8_E5M2", torch.float8_e5m2, 2, -14, 57344.0),
    )
}
# Read and rounded once, never written.
FP64 = Format("fp64", "F64", torch.float64, 52, -1022, torch.finfo(torch.float64).max)
BY_TAG = {form.tag: form for form in (*FORMATS.values(), FP64)}
FORMAT_OF = {form.torch: form for form in FORMATS.values()}
FP8 = ("fp8_e4m3fn", "fp8_e5m2")

# Storage forms of whole files: a format, or fp8 with one scale per tensor in one of two spellings.
SCALED = ("comfy_quant", "scaled_fp8")
STORAGES = (*FORMATS, *SCALED)
_ALIASES = {
    "float32": "fp32",
    "float": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "fp8": "fp8_e4m3fn",
    "float8_e4m3fn": "fp8_e4m3fn",
    "e4m3fn": "fp8_e4m3fn",
    "float8_e5m2": "fp8_e5m2",
    "e5m2": "fp8_e5m2",
    "fp8_scaled": "comfy_quant",
}
_PIECE = 1 << 17  # elements at a time where float64 temporaries are needed


def storage_name(dtype: str | torch.dtype) -> str:
    """The storage form that a user's ``dtype=`` means.

    >>> storage_name(torch.bfloat16), storage_name("fp8")
    ('bf16', 'fp8_e4m3fn')
    """
    name = str(dtype).removeprefix("torch.").lower()
    name = _ALIASES.get(name, name)
    if name not in STORAGES:
        fix = nearest(name, [*STORAGES, *_ALIASES])
        raise UnknownNameError("save", "unknown or unsupported dtype", found=repr(dtype), fix=fix)
    return name


def decode(raw: Tensor, form: Format, out: Tensor, scale: float = 1.0) -> None:
    """Write the numbers in ``raw`` (uint8 bytes on the CPU) to ``out`` (float32, any device)."""
    if form.name in FP8:
        # Three times faster than torch's own conversion, and MPS has none.
        values = np.empty(raw.numel(), np.float32) if out.device.type != "cpu" else out.numpy()
        np.take(_fp8_values(form.name, scale), raw.numpy(), out=values, mode="clip")
        if out.device.type != "cpu":
            out.copy_(torch.from_numpy(values))
    else:
        numbers = raw.view(form.torch)
        out.copy_(numbers.to(out.device) if out.is_cuda else numbers)  # two bytes a number go to the GPU, not four
        if scale != 1.0:
            out.mul_(scale)


def encode(values: Tensor, form: Format, noise: Tensor | None = None) -> Tensor:
    """Round float32 ``values`` once to ``form``; with ``noise`` (from `rounding_noise`) stochastically.

    Nearest rounding is to even on ties. Stochastic rounding goes to one of the two neighbours, with
    the probability that makes the mean right (Gupta et al. 2015, arXiv:1502.02551).
    """
    if noise is None or form.name == "fp32":
        return values.to(form.torch)
    if form.name == "bf16":
        # bf16 is the upper half of a float32: add noise to the lower half and cut it off.
        raised = values.view(torch.int32) + (noise & 0xFFFF)
        cut = (raised & ~0xFFFF).view(torch.float32)
    else:
        cut = torch.empty_like(values)
        for start in range(0, values.numel(), _PIECE):
            piece = slice(start, start + _PIECE)
            cut[piece] = _floor_to_grid(values[piece], form, noise[piece])
    # Past the largest number both neighbours are not there: leave that to nearest rounding's rule.
    fits = values.abs() <= form.largest
    return torch.where(fits, cut.clamp(-form.largest, form.largest), values).to(form.torch)


def rounding_noise(seed: int, key: str, start: int, count: int, device: torch.device) -> Tensor:
    """Random int32 for elements ``start`` to ``start + count`` of tensor ``key``."""
    numbers = seeded.bits(seed, "rounding", key, start, count)
    return torch.from_numpy(numbers.view(np.int32)).to(device)


def scale_for(largest: float, form: Format = FORMATS["fp8_e4m3fn"]) -> float:
    """The scale that ComfyUI gives to a tensor whose largest magnitude is ``largest``: amax / 448 in float32."""
    return float(np.float32(largest) / np.float32(form.largest)) or 1.0


def is_finite(values: Tensor) -> bool:
    # One pass at memory speed; isfinite().all() makes a temporary and takes twenty times as long.
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low) & torch.isfinite(high))


@functools.lru_cache(maxsize=1024)
def _fp8_values(name: str, scale: float) -> np.ndarray:
    codes = torch.arange(256, dtype=torch.uint8).view(FORMATS[name].torch)
    values: np.ndarray = codes.to(torch.float32).numpy()
    return values * np.float32(scale)


def _floor_to_grid(values: Tensor, form: Format, noise: Tensor) -> Tensor:
    # In float64 every quotient and sum below is exact to 2^-32 of a step.
    wide = values.double()
    _, exponent = torch.frexp(wide)
    step = torch.ldexp(torch.ones_like(wide), (exponent - 1).clamp(min=form.min_exponent) - form.mantissa)
    fraction = (noise.to(torch.int64) & 0xFFFFFFFF).double() * 2.0**-32
    return (torch.floor(wide / step + fraction) * step).float()

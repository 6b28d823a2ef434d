from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from alkahest.errors import UnknownNameError
from alkahest.model import seeded
from alkahest.model.dtypes import FORMATS, Format, decode, encode, rounding_noise, scale_for, storage_name

NARROW = [form for form in FORMATS.values() if form.name != "fp32"]


def spread(count: int = 20_000) -> torch.Tensor:
    """Numbers of every magnitude that fp8 and fp16 can hold, subnormals included, and zeros."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.rand(count, generator=generator) * 26 - 18
    values = torch.randn(count, generator=generator).sign() * torch.exp2(exponents)
    values[::97] = 0
    return values.clamp(-440, 440)


@pytest.mark.parametrize("form", FORMATS.values(), ids=str)
def test_decode_is_torchs_conversion(form: Format) -> None:
    stored = spread().to(form.torch)
    out = torch.empty(stored.numel())
    decode(stored.view(torch.uint8), form, out)
    assert torch.equal(out, stored.float())
    decode(stored.view(torch.uint8), form, out, scale=0.37)
    assert torch.equal(out, stored.float() * np.float32(0.37).item())


def test_every_fp8_code_decodes_as_in_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for name in ("fp8_e4m3fn", "fp8_e5m2"):
        out = torch.empty(256)
        decode(codes, FORMATS[name], out)
        assert torch.equal(out, codes.view(FORMATS[name].torch).float()) or torch.equal(
            out.nan_to_num(1e9), codes.view(FORMATS[name].torch).float().nan_to_num(1e9)
        )


@pytest.mark.parametrize("form", NARROW, ids=str)
def test_nearest_rounding_is_to_the_nearest(form: Format) -> None:
    values = spread()
    rounded = encode(values, form).float()
    candidates = torch.arange(1 << (8 * form.itemsize), dtype=torch.int64)
    kind = torch.uint8 if form.itemsize == 1 else torch.uint16
    grid = candidates.to(kind).view(form.torch).double()
    grid = grid[torch.isfinite(grid)].unique()
    place = torch.searchsorted(grid, values.double()).clamp(1, len(grid) - 1)
    best = torch.minimum((grid[place] - values).abs(), (grid[place - 1] - values).abs())
    assert torch.equal((rounded.double() - values).abs(), best)


@pytest.mark.parametrize("form", NARROW, ids=str)
def test_stochastic_rounding_takes_a_neighbour_and_has_no_bias(form: Format) -> None:
    values = spread(400).repeat_interleave(2000)
    noise = rounding_noise(0, "k", 0, values.numel(), torch.device("cpu"))
    rounded = encode(values, form, noise).double()
    exponent = torch.floor(torch.log2(values.double().abs().clamp(min=1e-30)))
    step = torch.exp2(exponent.clamp(min=form.min_exponent) - form.mantissa)
    assert ((rounded - values).abs() < step * (1 + 1e-9)).all(), "not one of the two neighbours"
    exact = encode(values, form).double() == values
    assert torch.equal(rounded[exact], values.double()[exact]), "a representable number moved"
    error = ((rounded - values) / step).view(400, 2000).mean(dim=1)
    # Standard error of the mean of 2000 draws is at most 0.5 / sqrt(2000); five of them.
    assert error.abs().max() < 5 * 0.5 / math.sqrt(2000)
    assert abs(error.mean()) < 5 * 0.5 / math.sqrt(2000 * 400)


def test_stochastic_rounding_is_the_same_in_blocks() -> None:
    values, form = spread(5000), FORMATS["bf16"]
    whole = encode(values, form, rounding_noise(3, "k", 0, 5000, torch.device("cpu")))
    parts = [
        encode(values[a:b], form, rounding_noise(3, "k", a, b - a, torch.device("cpu")))
        for a, b in [(0, 17), (17, 1024), (1024, 5000)]
    ]
    assert torch.equal(torch.cat(parts), whole)
    other = encode(values, form, rounding_noise(4, "k", 0, 5000, torch.device("cpu")))
    assert not torch.equal(other, whole)


@pytest.mark.parametrize("form", NARROW, ids=str)
def test_stochastic_rounding_passes_on_what_is_not_finite_and_never_overflows(form: Format) -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, form.largest, -form.largest]).repeat(100)
    noise = rounding_noise(0, "k", 0, values.numel(), torch.device("cpu"))
    rounded = encode(values, form, noise).float().view(100, 5)
    assert rounded[:, 0].isnan().all()
    if form.name == "fp8_e4m3fn":  # has no infinity
        assert (rounded[:, 1:3].abs() == form.largest).all()
    else:
        assert rounded[:, 1:3].isinf().all()
    assert (rounded[:, 3] == form.largest).all()
    assert (rounded[:, 4] == -form.largest).all()


def test_numbers_fill_the_whole_word() -> None:
    # Sixteen bits decide a bf16 rounding: each must be used.
    numbers = seeded.bits(0, "rounding", "k", 0, 4096)
    assert all(0.4 < ((numbers >> bit) & 1).mean() < 0.6 for bit in range(32))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (torch.bfloat16, "bf16"),
        ("float16", "fp16"),
        ("fp8", "fp8_e4m3fn"),
        (torch.float8_e5m2, "fp8_e5m2"),
        ("comfy_quant", "comfy_quant"),
        ("fp8_scaled", "comfy_quant"),
        ("scaled_fp8", "scaled_fp8"),
        ("fp32", "fp32"),
    ],
)
def test_names_that_people_use(given: object, name: str) -> None:
    assert storage_name(given) == name  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["bf61", torch.int8, "nvfp4", 3])
def test_other_dtypes_are_refused(given: object) -> None:
    with pytest.raises(UnknownNameError, match="dtype"):
        storage_name(given)  # type: ignore[arg-type]


def test_scale_is_comfyuis() -> None:
    weight = torch.randn(50) * 0.02
    reference = weight.abs().max().float() / 448
    assert scale_for(float(weight.abs().max())) == float(reference)
    assert scale_for(0.0) == 1.0
    assert scale_for(1e-44) == 1.0  # its scale would be zero

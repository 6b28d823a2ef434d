"""The noise that rounding really makes, against what is said of it beforehand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import native, state, write

import alkahest as ak
from alkahest.engine.readable import Workspace
from alkahest.engine.scalars import Rules
from alkahest.lora.noise import noise_of

KEY = "layers.1.feed_forward.w1.weight"
SHAPE = (256, 96)


def files(folder: Path, base: torch.Tensor, variant: torch.Tensor, dtypes: tuple[torch.dtype, torch.dtype]) -> ak.Delta:
    paths = []
    for name, values, dtype in (("base", base, dtypes[0]), ("variant", variant, dtypes[1])):
        tensors = {key: value.to(dtype) for key, value in native({**state(), KEY: values}).items()}
        save_file(tensors, folder / f"{name}.safetensors")
        paths.append(folder / f"{name}.safetensors")
    return ak.open(paths[1]) - ak.open(paths[0])


def measured(delta: ak.Delta, squares: float, changed: float) -> tuple[float, float]:
    term = delta.at(KEY, Rules())
    assert term is not None
    found = noise_of(term, SHAPE, squares, changed, Workspace(torch.device("cpu")))
    return found.share, found.edge


@pytest.mark.parametrize("factor", [1.0, -3.0])
def test_the_noise_of_a_variant_in_bf16(factor: float, tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = (0.05 * torch.randn(SHAPE)).bfloat16().float()
    change = 0.002 * torch.randn(SHAPE)
    delta = factor * files(tmp_path, base, base + change, (torch.bfloat16, torch.bfloat16))
    noise = factor * ((base + change).bfloat16().double() - (base + change).double())
    d = factor * ((base + change).bfloat16().double() - base.double())
    share, edge = measured(delta, float(d.square().sum()), float((d != 0).float().mean()))
    assert share == pytest.approx(float(noise.square().sum() / d.square().sum()), rel=0.05)
    assert edge == pytest.approx(float(torch.linalg.matrix_norm(noise, 2)), rel=0.05)


def test_a_base_in_a_coarser_dtype_adds_its_own(tmp_path: Path) -> None:
    torch.manual_seed(2)
    base, change = 0.05 * torch.randn(SHAPE), 0.002 * torch.randn(SHAPE)
    delta = files(tmp_path, base, base + change, (torch.bfloat16, torch.float32))
    d = (base + change).double() - base.bfloat16().double()
    share, _ = measured(delta, float(d.square().sum()), 1.0)
    assert share == pytest.approx(float(((d - change) ** 2).sum() / d.square().sum()), rel=0.05)


def test_a_change_below_the_noise_of_its_base_was_made_from_the_base_as_stored(tmp_path: Path) -> None:
    torch.manual_seed(2)
    base = (0.05 * torch.randn(SHAPE)).bfloat16().float()
    delta = files(tmp_path, base, base + 1e-6 * torch.randn(SHAPE), (torch.bfloat16, torch.float32))
    share, _ = measured(delta, SHAPE[0] * SHAPE[1] * 1e-12, 1.0)
    assert share < 1e-3


def test_few_changed_elements_make_little_noise(tmp_path: Path) -> None:
    base = (0.05 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))).bfloat16().float()
    variant = base + 1e-5 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    delta = files(tmp_path, base, variant, (torch.bfloat16, torch.bfloat16))
    d = variant.bfloat16().double() - base.double()
    changed = float((d != 0).double().mean())
    assert changed < 0.08
    share, _ = measured(delta, float(d.square().sum()), changed)
    assert 0.3 < share <= 1, "nearly all of what is left is rounding"


def test_what_is_not_known_is_not_said(tmp_path: Path) -> None:
    a = ak.open(write(tmp_path / "a.safetensors", native(state())))
    delta = ak.lerp(a, ak.open(write(tmp_path / "b.safetensors", native(state(seed=5)))), 0.5) - a
    term = delta.at(KEY, Rules())
    assert term is not None
    found = noise_of(term, SHAPE, 1.0, 1.0, Workspace(torch.device("cpu")))
    assert math.isnan(found.share)
    assert math.isnan(found.edge)

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from alkahest.lora import decompose as module
from alkahest.lora.decompose import Decomposition, decompose, of_factors
from alkahest.lora.rank import RankRule


def planted(rows: int, columns: int, rank: int, noise: float) -> torch.Tensor:
    torch.manual_seed(rows)
    sizes = torch.linspace(3.0, 1.0, rank)
    return (torch.randn(rows, rank) * sizes) @ torch.randn(rank, columns) + noise * torch.randn(rows, columns)


def run(matrix: torch.Tensor, method: str, rank_max: int | None = 64, **given: float) -> Decomposition:
    rule = RankRule.of(given, rank_max, False, "test")
    return decompose(matrix, float(matrix.double().square().sum()), rule, math.nan, method, 0, "key")


@pytest.mark.parametrize("shape", [(340, 520), (520, 340)])
@pytest.mark.parametrize("method", ["exact", "randomised"])
def test_against_a_full_decomposition(shape: tuple[int, int], method: str) -> None:
    matrix = planted(*shape, rank=7, noise=0.1)
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    found = run(matrix, method, rank=7)
    assert found.complete == (method == "exact")
    assert found.s[:7] == pytest.approx(s[:7].numpy(), rel=1e-5)
    up, down = found.split(7, 1.0, torch.float32)
    assert torch.allclose(up.double() @ down.double(), (u[:, :7] * s[:7]) @ vt[:7], atol=2e-3)
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-4), "singular values are split evenly"
    lost = float((matrix.double() - up.double() @ down.double()).square().sum())
    assert found.lost(up, down, 1.0) == pytest.approx(lost, rel=1e-5)


def test_the_sketch_widens_until_the_energy_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = planted(900, 1300, rank=40, noise=0.01)
    monkeypatch.setattr(module, "_FIRST", 5)
    found = run(matrix, "randomised", None, energy=0.999)
    s = torch.linalg.svdvals(matrix.double()).numpy()
    least = int(np.searchsorted(np.cumsum(s**2), 0.999 * (s**2).sum())) + 1
    assert not found.complete
    assert RankRule.of({"energy": 0.999}, None, False, "test").choose(found.s, found.squares, False, math.nan) == least
    assert least <= len(found.s) < 110
    capped = run(matrix, "randomised", 12, energy=0.999)
    assert len(capped.s) == 12, "a cap ends the search"


def test_a_flat_spectrum_is_decomposed_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EXACT_SIDE", 10)
    noise = torch.randn(130, 210, generator=torch.Generator().manual_seed(0))
    found = run(noise, "auto", None, energy=0.995)
    assert found.complete
    assert found.s == pytest.approx(torch.linalg.svdvals(noise.double()).numpy(), rel=1e-6)
    assert run(noise, "randomised", None, sum=0.5).complete, "a rule on all singular values needs them all"


def test_rank_below_the_sides() -> None:
    matrix = planted(60, 90, rank=3, noise=0.0)
    found = run(matrix, "exact", energy=1.0)
    up, down = found.split(5, 1.0, torch.float32)
    assert torch.isfinite(up).all()
    assert torch.isfinite(down).all()
    assert found.lost(up, down, 1.0) < 1e-8 * found.squares


def test_factors_need_no_matrix() -> None:
    torch.manual_seed(0)
    up, down = torch.randn(70, 6), torch.randn(6, 110)
    found = of_factors(up, down)
    s = torch.linalg.svdvals(up.double() @ down.double())[:6]
    assert found.s == pytest.approx(s.numpy(), rel=1e-10)
    assert found.squares == pytest.approx(float((up.double() @ down.double()).square().sum()), rel=1e-12)
    for rank, scale in ((6, 1.0), (4, 0.25)):
        one, two = found.split(rank, scale, torch.float32)
        lost = float((up.double() @ down.double() - scale * one.double() @ two.double()).square().sum())
        assert found.lost(one, two, scale) == pytest.approx(lost, rel=1e-5, abs=1e-12 * found.squares)

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import alkahest as ak
from alkahest.errors import AlgebraError, NonFiniteError
from alkahest.measure.spectrum import RATIOS, SPECTRUM, effective_rank, randomised_svd, singular_values

LAYER = "layers.1.feed_forward.w2.weight"


def test_every_number_is_that_of_a_full_decomposition(trio: dict[str, Path]) -> None:
    v, b = ak.open(trio["variant"]), ak.open(trio["base"])
    table = ak.delta_spectra(v - b, values=5)
    assert list(table.columns) == ["tensor", "part", "block", "module", "shape", *SPECTRUM]
    assert set(table.tensor) == {key for key in v if len(v.shapes[key]) == 2 and min(v.shapes[key]) > 1}
    for row in table.itertuples():
        d, w = v[row.tensor].double() - b[row.tensor].double(), b[row.tensor].double()
        s = torch.linalg.svdvals(d)
        shares = s[s > 1e-12 * s[0]] / s.sum()
        m, n = d.shape
        assert row.singular_values == pytest.approx(s[:5].numpy(), rel=1e-6)
        assert row.spectral_norm == pytest.approx(float(s[0]), rel=1e-6)
        assert row.delta_norm == pytest.approx(float(d.norm()), rel=1e-6)
        assert row.stable_rank == pytest.approx(float(d.norm() ** 2 / s[0] ** 2), rel=1e-5)
        assert row.effective_rank == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-4)
        assert row.noise_edge == pytest.approx(float(d.norm()) / math.sqrt(m * n) * (math.sqrt(m) + math.sqrt(n)))
        assert row.row_norms == pytest.approx(d.norm(dim=1).numpy(), rel=1e-5)
        ratio = (d.float() / w.float()).abs()
        ratio = ratio[(ratio > 0) & torch.isfinite(ratio)]
        bins = np.clip(np.floor(np.log2(ratio.numpy())) + 24, 0, len(RATIOS) - 1).astype(int)
        assert row.ratios.tolist() == np.bincount(bins, minlength=len(RATIOS)).tolist()


def planted(rows: int = 400, columns: int = 700) -> torch.Tensor:
    torch.manual_seed(5)
    pattern = torch.randn(rows, 6) * torch.tensor([9.0, 7, 5, 4, 3, 2]) @ torch.randn(6, columns)
    return pattern + 0.05 * torch.randn(rows, columns)


def test_iteration_finds_what_the_full_decomposition_finds_and_the_seed_fixes_it() -> None:
    matrix = planted()
    u, s, v = randomised_svd(matrix, 6, 0, "a")
    exact = torch.linalg.svdvals(matrix.double())
    assert s.double().numpy() == pytest.approx(exact[:6].numpy(), rel=1e-4)
    assert float((u * s @ v.T - matrix).norm()) == pytest.approx(float(exact[6:].norm()), rel=1e-3)
    assert (u.T @ u - torch.eye(6)).abs().max() < 1e-5
    assert torch.equal(randomised_svd(matrix, 6, 0, "a")[1], s)
    assert not torch.equal(randomised_svd(matrix, 6, 0, "b")[0], u)
    assert not torch.equal(randomised_svd(matrix, 6, 1, "a")[0], u)
    assert singular_values(matrix) == pytest.approx(exact.numpy(), rel=1e-6)
    assert singular_values(matrix.T) == pytest.approx(exact.numpy(), rel=1e-6)


def test_noise_sits_at_the_edge_and_a_direction_above_it() -> None:
    torch.manual_seed(6)
    noise = torch.randn(800, 1100)
    edge = math.sqrt(800) + math.sqrt(1100)
    assert singular_values(noise)[0] == pytest.approx(edge, rel=0.03)
    assert float(randomised_svd(noise, 32, 0, "a")[1][0]) == pytest.approx(edge, rel=0.08)
    pattern = torch.sign(torch.randn(800, 1)) @ torch.sign(torch.randn(1, 1100))
    assert singular_values(pattern)[0] > 15 * edge


def test_effective_rank_of_known_spectra() -> None:
    assert effective_rank(np.full(7, 2.0), math.sqrt(28), 7) == pytest.approx(7)
    assert effective_rank(np.array([3.0, 0, 0]), 3.0, 3) == pytest.approx(1)
    # Only one of five equal values known: the rest is what is left, spread evenly.
    assert effective_rank(np.array([2.0]), math.sqrt(20), 5) == pytest.approx(5)


def test_a_pattern_of_one_ulp_moves_is_not_noise(tmp_path: Path) -> None:
    """What file_noise cannot tell apart, the spectrum does: moves by one ulp in a pattern, and at random."""
    base = tiny.state(seed=1)
    base = {key: value.to(torch.bfloat16).float() for key, value in base.items()}
    torch.manual_seed(7)
    made = {}
    for kind in ("pattern", "noise"):
        variant = dict(base)
        w = base[LAYER]
        moves = torch.sign(torch.randn(w.shape[0], 1)) @ torch.sign(torch.randn(1, w.shape[1]))
        if kind == "noise":
            moves = torch.sign(torch.randn(w.shape))
        _, exponent = torch.frexp(w)
        variant[LAYER] = w + moves * torch.ldexp(torch.ones_like(w), exponent - 8) * (w.abs() > 0.02)
        made[kind] = ak.open(tiny.write(tmp_path / f"{kind}.safetensors", tiny.native(variant)))
    start = ak.open(tiny.write(tmp_path / "base.safetensors", tiny.native(base)))
    found = {}
    for kind, variant in made.items():
        noise = ak.file_noise(ak.delta_table(variant - start)).set_index("tensor").loc[LAYER]
        spectra = ak.delta_spectra(variant - start)
        assert list(spectra.tensor) == [LAYER]  # untouched matrices are left out
        found[kind] = (noise["least"], spectra.iloc[0].above_edge)
    assert found["pattern"][0] == pytest.approx(found["noise"][0], rel=0.1)
    assert found["noise"][1] < 1.3
    assert found["pattern"][1] > 4


def test_large_matrices_are_iterated_and_exact_ones_are_not(
    trio: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from alkahest.measure import spectrum

    delta = ak.open(trio["variant"]) - ak.open(trio["base"])
    monkeypatch.setattr(spectrum, "_EXACT_SIDE", 10)
    full = ak.delta_spectra(delta, values=8, exact=True).set_index("tensor").loc[LAYER]
    fast = ak.delta_spectra(delta, values=8).set_index("tensor").loc[LAYER]
    assert fast.singular_values == pytest.approx(full.singular_values, rel=0.1)
    assert full.effective_rank <= fast.effective_rank <= min(full["shape"])
    assert len(fast.singular_values) == 8


def test_bad_input(trio: dict[str, Path], tmp_path: Path) -> None:
    v, b = ak.open(trio["variant"]), ak.open(trio["base"])
    with pytest.raises(AlgebraError, match="delta_spectra: a delta is needed"):
        ak.delta_spectra(v)
    with pytest.raises(AlgebraError, match="at least one singular value"):
        ak.delta_spectra(v - b, values=0)
    with pytest.raises(AlgebraError, match=r"(?s)exact spectra have no seed.*seed=4"):
        ak.delta_spectra(v - b, seed=4, exact=True)
    assert len(ak.delta_spectra(b - b)) == 0
    broken = tiny.near(tiny.state(seed=1), 0.02, seed=3)
    broken[LAYER][3, 4] = math.nan
    with pytest.raises(NonFiniteError, match=r"delta_spectra.*NaN"):
        ak.delta_spectra(ak.open(tiny.write(tmp_path / "nan.safetensors", tiny.native(broken))) - b)

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

import alkahest as ak
from alkahest.errors import AlgebraError, UnknownNameError
from alkahest.measure.pairs import COMPARISON

LAYER = "layers.1.feed_forward.w2.weight"
OTHER = "layers.0.attention.to_k.weight"


def opened(folder: Path, name: str, values: tiny.State) -> ak.Checkpoint:
    return ak.open(tiny.write(folder / f"{name}.safetensors", tiny.native(values), torch.float32))


def low_rank(shape: torch.Size, seed: int, rank: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.01 * torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)


def test_pairs_by_hand(tmp_path: Path) -> None:
    base = tiny.state(seed=1)
    b = opened(tmp_path, "b", base)
    learned = {name: tiny.near(base, 0.02, seed) for name, seed in (("one", 3), ("two", 4))}
    shared = low_rank(base[LAYER].shape, 9, 1)  # and leading directions that are clear of the noise
    for seed, values in enumerate(learned.values()):
        values[LAYER] += low_rank(base[LAYER].shape, seed) + shared
    one, two = (opened(tmp_path, name, values) for name, values in learned.items())
    pairs = ak.compare({"one": one - b, "two": two - b, "one again": 2 * (one - b)}, rank=4)
    assert list(pairs.columns) == ["tensor", "part", "block", "module", "shape", *COMPARISON]
    assert len(pairs) == 3 * len(b)
    row = pairs[(pairs.tensor == LAYER) & (pairs["first"] == "one") & (pairs.second == "two")].iloc[0]
    x, y = (v[LAYER].double() - b[LAYER].double() for v in (one, two))
    assert row.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-6)
    assert row.sign_agreement == pytest.approx(float((x.sign() == y.sign()).double().mean()), abs=1e-3)
    (ux, sx, vx), (uy, sy, vy) = (torch.linalg.svd(m) for m in (x, y))
    u, v = torch.cat([ux[:, :4], uy[:, :4]], 1), torch.cat([vx[:4], vy[:4]]).T
    s = torch.cat([sx[:4], sy[:4]])
    eye = torch.eye(8, dtype=torch.float64)
    meeting = (u.T @ u - eye) @ torch.diag(s) @ (v.T @ v - eye)
    assert row.left_overlap == pytest.approx(float((ux[:, :4].T @ uy[:, :4]).square().sum() / 4), rel=1e-3)
    assert row.right_overlap == pytest.approx(float((vx[:4] @ vy[:4].T).square().sum() / 4), rel=1e-3)
    assert row.interference == pytest.approx(float(meeting.abs().sum() / s.sum()), rel=1e-3)
    same = pairs[(pairs["first"] == "one") & (pairs.second == "one again") & (pairs.tensor == LAYER)].iloc[0]
    assert same.cosine == pytest.approx(1)
    assert same.sign_agreement == 1
    assert same.left_overlap == pytest.approx(1, abs=1e-4)


def test_signs_are_compared_where_both_change(tmp_path: Path) -> None:
    """A third of one delta and a half of the other is zero, each elsewhere; a quarter of the rest is against."""
    base = {name: torch.zeros_like(value) for name, value in tiny.state(seed=1).items()}
    rows, columns = base[LAYER].shape
    place = torch.arange(rows * columns).view(rows, columns)
    x = torch.where(place % 3 == 0, 0.0, 1.0 + place % 5)
    y = torch.where(place % 2 == 0, 0.0, torch.where(place % 4 == 1, -1.0, 1.0) * (1.0 + place % 7))
    y[place % 8 == 5] *= -1
    b, one, two = (opened(tmp_path, name, {**base, LAYER: v}) for name, v in (("b", base[LAYER]), ("x", x), ("y", y)))
    row = ak.compare({"x": one - b, "y": two - b}).set_index("tensor").loc[LAYER]
    both = (x != 0) & (y != 0)
    assert 0.2 < float(both.double().mean()) < 0.5
    assert row.sign_agreement == pytest.approx(float((x.sign() == y.sign())[both].double().mean()), abs=1e-9)
    assert 0.6 < row.sign_agreement < 0.9


def test_imports_that_fight_stand_out_from_those_that_do_not_meet(tmp_path: Path) -> None:
    base = tiny.state(seed=1)
    b = opened(tmp_path, "b", base)
    pattern = low_rank(base[LAYER].shape, 1)
    left = opened(tmp_path, "left", {**base, LAYER: base[LAYER] + pattern})
    against = opened(tmp_path, "against", {**base, LAYER: base[LAYER] - pattern})
    beside = opened(tmp_path, "beside", {**base, LAYER: base[LAYER] + low_rank(base[LAYER].shape, 2)})
    elsewhere = opened(tmp_path, "elsewhere", {**base, OTHER: base[OTHER] + low_rank(base[OTHER].shape, 3)})
    pairs = ak.compare(
        {"left": left - b, "against": against - b, "beside": beside - b, "elsewhere": elsewhere - b}, rank=3
    )
    cosine = ak.comparison_matrix(pairs, "cosine")
    assert cosine.loc["left", "against"] == pytest.approx(-1, abs=1e-5)
    assert abs(cosine.loc["left", "beside"]) < 0.1
    assert cosine.loc["left", "elsewhere"] == 0  # they share no tensor
    assert cosine.loc["beside", "beside"] == 1
    fight = ak.comparison_matrix(pairs, "interference")
    assert fight.loc["left", "against"] > 5 * fight.loc["left", "beside"]
    assert ak.comparison_matrix(pairs, "sign_agreement").loc["left", "against"] == 0


def test_bad_input(trio: dict[str, Path]) -> None:
    v, b = ak.open(trio["variant"]), ak.open(trio["base"])
    with pytest.raises(AlgebraError, match="two or more deltas are needed"):
        ak.compare({"one": v - b})
    with pytest.raises(AlgebraError, match="at least one singular direction"):
        ak.compare({"one": v - b, "two": v - b}, rank=0)
    with pytest.raises(AlgebraError, match="two: Checkpoint"):
        ak.compare({"one": v - b, "two": v})
    with pytest.raises(UnknownNameError, match="did you mean 'cosine'"):
        ak.comparison_matrix(ak.compare({"one": v - b, "two": v - b}), "cosin")

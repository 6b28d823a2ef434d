from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

import alkahest as ak
from alkahest.errors import AlgebraError, MismatchError


def opened(folder: Path, name: str, values: tiny.State) -> ak.Checkpoint:
    return ak.open(tiny.write(folder / f"{name}.safetensors", values, torch.float32))


def test_units_in_another_order_are_found(tmp_path: Path) -> None:
    """Hidden units of one block permuted, heads of another: the same function, other places."""
    base = tiny.state(seed=1)
    torch.manual_seed(3)
    moved = {key: value + 0.1 * value.std() * torch.randn_like(value) for key, value in base.items()}
    order = torch.randperm(256)
    for which in ("w1", "w3"):
        moved[f"layers.0.feed_forward.{which}.weight"] = moved[f"layers.0.feed_forward.{which}.weight"][order]
    moved["layers.0.feed_forward.w2.weight"] = moved["layers.0.feed_forward.w2.weight"][:, order]
    heads = torch.tensor([1, 2, 0])
    rows = (heads[:, None] * 32 + torch.arange(32)).flatten()
    for which in ("to_q", "to_k", "to_v"):
        key = f"layers.1.attention.{which}.weight"
        moved[key] = moved[key][rows]
    moved["layers.1.attention.to_out.0.weight"] = moved["layers.1.attention.to_out.0.weight"][:, rows]
    table = ak.matching_units(opened(tmp_path, "a", base), opened(tmp_path, "b", moved), looked_at=500)
    found = table.set_index(["part", "block", "kind"])
    stayed = float((order == torch.arange(256)).double().mean())
    assert found.itself["layers", 0, "hidden unit"] == pytest.approx(stayed)
    assert found.itself["layers", 1, "head"] == 0
    others = found.drop(index=[("layers", 0, "hidden unit"), ("layers", 1, "head")])
    assert (others.itself == 1).all()
    assert (others.cosine > 0.98).all()
    assert found.units["layers", 0, "hidden unit"] == found["looked at"]["layers", 0, "hidden unit"] == 256
    assert set(table.part) == {"noise_refiner", "context_refiner", "layers"}
    assert found.units["layers", 0, "head"] == 3


def test_the_cosine_by_hand(trio: dict[str, Path]) -> None:
    v, b = ak.open(trio["variant"]), ak.open(trio["bridge"])
    table = ak.matching_units(v, b, looked_at=256).set_index(["part", "block", "kind"])
    pieces = [torch.cat([one[f"layers.1.feed_forward.{w}.weight"].double() for w in ("w1", "w3")], 1) for one in (v, b)]
    out = [one["layers.1.feed_forward.w2.weight"].double().T for one in (v, b)]
    x, y = (torch.nn.functional.normalize(torch.cat(both, 1), dim=1) for both in zip(pieces, out, strict=True))
    assert table.cosine["layers", 1, "hidden unit"] == pytest.approx(float((x * y).sum(1).mean()), abs=1e-5)
    few = ak.matching_units(v, b, looked_at=10).set_index(["part", "block", "kind"])
    assert few["looked at"]["layers", 1, "hidden unit"] == 10


def test_bad_input(trio: dict[str, Path], tmp_path: Path) -> None:
    v, b = ak.open(trio["variant"]), ak.open(trio["base"])
    with pytest.raises(AlgebraError, match="two complete models"):
        ak.matching_units(v - b, b)  # type: ignore[arg-type]
    with pytest.raises(AlgebraError, match="at least one unit"):
        ak.matching_units(v, b, looked_at=0)
    with pytest.raises(MismatchError):
        ak.matching_units(v, opened(tmp_path, "deep", tiny.state(seed=1, layers=3)))

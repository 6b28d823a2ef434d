"""Maps between streams, against numpy's least squares and against models whose streams are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import alkahest as ak
from alkahest.errors import AlgebraError, MismatchError
from alkahest.pictures.stream_maps import affine_map, cka, orthogonal_map, r_squared

PROMPTS = ["a red ball at night", "a blue box", "a red box at night", "a blue ball"]
FEW: dict[str, Any] = {"prompts": PROMPTS, "count": 6, "steps": 2}


def test_the_maps_against_numpy() -> None:
    torch.manual_seed(2)
    x = torch.randn(300, 7) * torch.arange(1, 8)
    true, shift = torch.randn(7, 7), torch.randn(7)
    y = x @ true + shift + 0.1 * torch.randn(300, 7)
    given = np.c_[x.double().numpy(), np.ones(300)]
    wanted = np.linalg.lstsq(given, y.double().numpy(), rcond=None)[0]
    np.testing.assert_allclose(affine_map(x, y, 0.0).numpy(), wanted, rtol=1e-6, atol=1e-8)
    rotation = torch.linalg.qr(torch.randn(7, 7)).Q
    turned = 2.5 * (x @ rotation) - 3
    torch.testing.assert_close(orthogonal_map(x, turned)(x), turned.double(), rtol=1e-4, atol=1e-4)
    assert r_squared(orthogonal_map(x, y)(x), y) < r_squared(torch.from_numpy(given @ wanted), y) < 1
    residual = y.double().numpy() - given @ wanted
    by_hand = 1 - (residual**2).sum() / ((y.double().numpy() - y.double().numpy().mean(0)) ** 2).sum()
    assert r_squared(torch.from_numpy(given @ wanted), y) == pytest.approx(by_hand, rel=1e-9)
    assert cka(x, turned) == pytest.approx(1, abs=1e-6)
    assert cka(x, torch.randn(300, 7)) < 0.2
    assert r_squared(x, x) == 1


def test_streams_of_a_model_are_its_own(trio: dict[str, Path], parts: dict[str, Any]) -> None:
    b = ak.open(trio["base"])
    found = ak.alignment(b, b, components=parts, **FEW)
    assert found.table["as it is"].to_numpy() == pytest.approx(1)
    assert found.table.cka.to_numpy() == pytest.approx(1)
    places = list(zip(found.table.place, found.table.stream, strict=True))
    assert places[:2] == [("noise_refiner.1", "image"), ("context_refiner.1", "text")]
    assert places[2:] == [(f"layers.{n}", stream) for n in range(2) for stream in ("image", "text")]
    drawn = ak.sample(found.pipeline(mapped=False), PROMPTS[0], steps=2, seed=3).images[0]
    plain = ak.sample(ak.pipeline(b, parts), PROMPTS[0], steps=2, seed=3).images[0]
    assert np.abs(np.asarray(drawn, float) - np.asarray(plain, float)).max() <= 1


def test_scaled_streams_come_over_by_the_map(trio: dict[str, Path], parts: dict[str, Any], tmp_path: Path) -> None:
    """One model's image stream is the other's, mirrored in some directions: only a map makes them agree."""
    state = tiny.state(seed=1)
    b = ak.open(tiny.write(tmp_path / "b.safetensors", state, torch.float32))
    mirror = torch.where(torch.arange(96) % 3 == 0, -1.0, 1.0)
    other = dict(state)
    for key, value in state.items():
        if key.startswith(("noise_refiner", "all_x_embedder", "x_pad_token")):
            other[key] = mirrored(key, value, mirror)
    v = ak.open(tiny.write(tmp_path / "v.safetensors", other, torch.float32))
    found = ak.alignment(b, v, components=parts, **FEW)
    image = found.table.iloc[0]
    assert image["as it is"] < 0.5
    assert image.orthogonal == pytest.approx(1, abs=1e-3)
    assert image.linear > 0.9
    assert found.table["as it is"][1] == pytest.approx(1)  # the text stream
    diagonal = found.maps["noise_refiner"][:-1].diagonal()
    assert torch.equal(diagonal.sign(), mirror)


def mirrored(key: str, value: torch.Tensor, mirror: torch.Tensor) -> torch.Tensor:
    """A weight of the image side with the stream's directions flipped, so that the block computes the mirrored same."""
    if key.startswith("all_x_embedder") or key == "x_pad_token":
        return value * (mirror[:, None] if value.dim() == 2 and value.shape[0] == 96 else mirror)
    if key.endswith(("to_out.0.weight", "w2.weight")):
        return value * mirror[:, None]
    if key.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "w1.weight", "w3.weight")):
        return value * mirror
    return value


def test_bad_input(trio: dict[str, Path], parts: dict[str, Any]) -> None:
    v, b = ak.open(trio["variant"]), ak.open(trio["base"])
    with pytest.raises(AlgebraError, match="two complete models"):
        ak.alignment(v - b, b, prompts=PROMPTS, components=parts)  # type: ignore[arg-type]
    with pytest.raises(AlgebraError, match="pictures are needed to fit on"):
        ak.alignment(v, b, prompts=PROMPTS, count=2, steps=1, components=parts)
    with pytest.raises(AlgebraError, match="nothing is drawn where pictures are given: shift would mean nothing"):
        ak.alignment(v, b, [object()] * 3, PROMPTS, components=parts, shift=1.0)
    with pytest.raises(AlgebraError, match="prompts are a list"):
        ak.alignment(v, b, prompts="a ball", components=parts)
    with pytest.raises(MismatchError, match="of different widths"):
        ak.alignment(v, ak.made_up(layers=1, width=32), prompts=PROMPTS, components=parts)

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import alkahest as ak
from alkahest.engine.readable import Workspace
from alkahest.errors import AlkahestError
from alkahest.model.families.zimage import Architecture


def values(model: ak.Weights, key: str, start: int, stop: int) -> torch.Tensor:
    out = torch.empty(stop - start)
    model.leading.read(key, start, stop, out, Workspace(torch.device("cpu")))
    return out


def test_full_size_is_the_real_one() -> None:
    model = ak.made_up()
    assert model.shapes == Architecture().shapes()
    some = values(model, "layers.29.feed_forward.w1.weight", 10_000_000, 10_200_000)
    assert abs(float(some.std()) - 0.02) < 1e-3
    assert torch.equal(values(model, "layers.29.feed_forward.w1.weight", 10_100_000, 10_100_007), some[100_000:100_007])
    assert abs(float(values(model, "layers.0.ffn_norm1.weight", 0, 3840).mean()) - 1) < 0.02


def test_a_variant_differs_by_its_delta_and_only_where_it_should(tmp_path: Path) -> None:
    base, variant = ak.made_up(layers=2, width=96), ak.made_up(layers=2, width=96, delta=0.1, only="layers")
    base.save(tmp_path / "base.safetensors", dtype="fp32")
    variant.save(tmp_path / "variant.safetensors", dtype="fp32")
    a, v = ak.open(tmp_path / "base.safetensors"), ak.open(tmp_path / "variant.safetensors")
    for key in a:
        difference = v[key] - a[key]
        assert bool(difference.any()) == key.startswith("layers."), key
    share = float((v["layers.1.feed_forward.w1.weight"] - a["layers.1.feed_forward.w1.weight"]).std() / 0.02)
    assert abs(share - 0.1) < 0.005
    assert ak.made_up(layers=2, width=96) == base != variant
    assert not torch.equal(
        values(base, "x_pad_token", 0, 96), values(ak.made_up(layers=2, width=96, seed=1), "x_pad_token", 0, 96)
    )


def test_small_ones_are_real_models(tmp_path: Path) -> None:
    from diffusers import ZImageTransformer2DModel

    ak.made_up(layers=2, width=96).save(tmp_path / "small", layout="diffusers", dtype="fp32")
    model = ZImageTransformer2DModel.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        (out,) = model([torch.randn(16, 1, 8, 12)], torch.tensor([0.5]), [torch.randn(5, 64)], return_dict=False)[0]
    assert out.isfinite().all()


def test_a_delta_is_a_finite_number() -> None:
    for delta in (float("nan"), float("inf")):
        with pytest.raises(AlkahestError, match="not finite"):
            ak.made_up(layers=1, width=96, delta=delta)


@pytest.mark.parametrize("sizes", [{"layers": 0}, {"layers": 201}, {"width": 100}, {"width": 10**9}])
def test_impossible_sizes_are_refused(sizes: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(AlkahestError, match="impossible size"):
        ak.made_up(**sizes).save(tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == []

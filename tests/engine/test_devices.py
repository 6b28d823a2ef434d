"""What a device computes is what the CPU computes, within one rounding; on a machine without CUDA the CPU alone is
asked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

import alkahest as ak

Trio = dict[str, Path]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
MERGES: dict[str, Any] = {
    "sum": lambda bridge, variant, base: bridge.protect("refiner") + 3.7 * (variant - base),
    "lerp": lambda bridge, variant, base: ak.lerp(bridge, variant, 0.3),
    "ties": lambda bridge, variant, base: bridge + ak.ties([variant - base, bridge - base], density=0.5),
    "slerp": lambda bridge, variant, base: ak.slerp(bridge, variant, t=0.3),
}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def opened(trio: Trio) -> list[ak.Checkpoint]:
    return [ak.open(trio[name]) for name in ("bridge", "variant", "base")]


def assert_within_one_rounding(found: torch.Tensor, expected: torch.Tensor, key: str) -> None:
    """At most to the next bf16 number, which is 2**-7 of a number away or less, or where a sum cancelled."""
    near = torch.tensor(2.0**-7) * expected.float().abs() + 1e-6
    assert bool(((found.float() - expected.float()).abs() <= near).all()), key


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("merge", MERGES)
def test_a_merge(merge: str, rounding: str, trio: Trio, tmp_path: Path, device: str) -> None:
    expression = MERGES[merge](*opened(trio))
    expression.save(tmp_path / "cpu.safetensors", rounding=rounding)
    expression.save(tmp_path / "out.safetensors", rounding=rounding, device=device)
    found, expected = load_file(tmp_path / "out.safetensors"), load_file(tmp_path / "cpu.safetensors")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_within_one_rounding(found[key], value, key)


@pytest.mark.parametrize("form", ["bf16", "fp8_e4m3fn"])
def test_a_delta_table(form: str, trio: Trio, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, variant, base = opened(trio)
    stored = [
        ak.open(weights.save(tmp_path / f"{weights.name}.safetensors", dtype=form).path) for weights in (variant, base)
    ]
    expected = ak.delta_table(stored[0] - stored[1], exact=True)
    monkeypatch.setenv("ALKAHEST_CACHE", str(tmp_path))  # or the first table would be remembered
    found = ak.delta_table(stored[0] - stored[1], exact=True, device=device)
    assert list(found.tensor) == list(expected.tensor)
    for column in expected.select_dtypes("number"):
        np.testing.assert_allclose(found[column], expected[column], rtol=1e-5, atol=1e-7, err_msg=column)


@pytest.mark.parametrize("method", ["exact", "randomised"])
def test_an_extraction(method: str, trio: Trio, device: str) -> None:
    _, variant, base = opened(trio)
    expected = ak.extract_lora(variant - base, rank=4, method=method).report
    found = ak.extract_lora(variant - base, rank=4, method=method, device=device).report
    assert list(found.tensor) == list(expected.tensor)
    assert list(found["rank"]) == list(expected["rank"])
    np.testing.assert_allclose(found.energy, expected.energy, rtol=1e-3)


def test_a_live_model(trio: Trio, tmp_path: Path, device: str) -> None:
    bridge, variant, base = opened(trio)
    expression = bridge + ak.param("k", 1.0) * (variant - base)
    live = ak.LiveModel(expression, tiny.components(), device=device, dtype="fp32")
    for k in (171.1, 0.0, 2.0):
        live.set({"k": k})
        live.expression.save(tmp_path / "fresh.safetensors", dtype="fp32")
        fresh = ak.open(tmp_path / "fresh.safetensors")
        for key, value in live.pipe.transformer.state_dict().items():
            assert value.device.type == device
            assert torch.allclose(value.cpu(), fresh[key], rtol=1e-5, atol=1e-6), key

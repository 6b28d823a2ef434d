"""The compiled pass over ``a + k * (b - c)`` against torch's operations, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import alkahest as ak
from alkahest.engine import workers
from alkahest.engine.loops import Kernels, kernels
from alkahest.errors import NonFiniteError

LAYER = "layers.1.feed_forward.w2.weight"
Models = tuple[ak.Checkpoint, ak.Checkpoint, ak.Checkpoint]


@pytest.fixture
def models(trio: dict[str, Path]) -> Models:
    return tuple(ak.open(trio[name]) for name in ("bridge", "variant", "base"))  # type: ignore[return-value]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The compiled pass is used whatever the size of the work; its largest numbers, call by call."""
    found: list[float] = []
    loops = kernels()
    assert loops is not None

    def combined(*arguments: Any) -> float:
        found.append(loops.combined(*arguments))
        return found[-1]

    monkeypatch.setattr(workers, "_COMPILED", 0)
    monkeypatch.setattr(workers, "_COMPILED_OFTEN", 0)
    monkeypatch.setattr(workers, "kernels", lambda: Kernels(loops.pair, loops.sampled, combined))
    return found


def test_every_kind_of_number_is_rounded_as_torch_does() -> None:
    loops = kernels()
    assert loops is not None
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 1 << 16, (3, 300_007), dtype=np.uint16)  # NaN, infinity and subnormals among them
    bits[:, :1000] &= 0x807F  # subnormals and zeros of both signs
    a, b, c = (torch.from_numpy(row).view(torch.bfloat16) for row in bits)
    for k in (1.0, -0.7, 171.1, 1e-30, 1e30):
        out = np.empty(bits.shape[1], np.uint16)
        largest = loops.combined(*bits, k, out)
        wide = a.float() + (b.float() - c.float()) * k
        assert np.isnan(largest)  # one of them is
        expected, found = wide.to(torch.bfloat16), torch.from_numpy(out).view(torch.bfloat16)
        number = ~wide.isnan()
        assert torch.equal(found[number].view(torch.int16), expected[number].view(torch.int16))
        finite = number & (wide.abs() < 1e38) & torch.stack([a, b, c]).isfinite().all(0)
        rows = [row[finite.numpy()] for row in bits]
        assert loops.combined(*rows, k, out[: len(rows[0])]) == float(wide[finite].abs().max())


@pytest.mark.parametrize(
    "expression",
    [
        lambda bridge, variant, base: bridge + 171.1 * (variant - base),
        lambda bridge, variant, base: bridge - 0.3 * (variant - base),
        lambda bridge, variant, base: bridge.protect("refiner") + (variant - base),
        lambda bridge, variant, base: ak.lerp(base, variant, 0.37),
    ],
)
@pytest.mark.parametrize("block", [1 << 19, 997])
def test_the_bytes_are_the_same_with_and_without(
    expression: Callable[..., ak.Weights],
    block: int,
    models: Models,
    calls: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "BLOCK", block)
    expression(*models).save(tmp_path / "compiled.safetensors")
    used = len(calls)
    monkeypatch.setattr(workers, "_COMPILED", 1 << 40)
    expression(*models).save(tmp_path / "torch.safetensors")
    assert len(calls) == used > 40
    assert (tmp_path / "compiled.safetensors").read_bytes() == (tmp_path / "torch.safetensors").read_bytes()


@pytest.mark.parametrize("options", [{"dtype": "fp16"}, {"dtype": "comfy_quant"}, {"rounding": "stochastic"}])
def test_other_output_is_left_to_torch(
    options: dict[str, str], models: Models, calls: list[float], tmp_path: Path
) -> None:
    bridge, variant, base = models
    (bridge + 2 * (variant - base)).save(tmp_path / "out.safetensors", **options)
    assert (len(calls) > 0) == (options.get("dtype") == "comfy_quant")  # whose norms and embedders are bf16


def test_other_inputs_are_left_to_torch(models: Models, calls: list[float], tmp_path: Path) -> None:
    bridge, variant, _ = models
    scaled = ak.open(tiny.write_scaled(tmp_path / "fp8.safetensors", tiny.state(seed=1), "comfy_quant"))
    (bridge + 2 * (variant - scaled).only("layers.*.feed_forward")).save(tmp_path / "out.safetensors", dtype="bf16")
    assert calls == []


def with_one(path: Path, number: float) -> ak.Checkpoint:
    state = tiny.state(seed=1)
    state = {**state, LAYER: state[LAYER].clone()}
    state[LAYER][2, 3] = number
    return ak.open(tiny.write(path, tiny.native(state)))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((1e36, torch.finfo(torch.bfloat16).max, 0.0), r"too large for bf16"),  # between bf16's limit and float32's
        ((1e38, 3e38, -3e38), r"overflows float32"),
        ((0.0, torch.nan, 0.0), r"(?s)input holds NaN.*1.safetensors"),
    ],
)
def test_what_does_not_fit_is_told_as_ever(
    numbers: tuple[float, ...], message: str, calls: list[float], tmp_path: Path
) -> None:
    a, b, c = (with_one(tmp_path / f"{place}.safetensors", number) for place, number in enumerate(numbers))
    with pytest.raises(NonFiniteError, match=message):
        (a + 1.0 * (b - c)).save(tmp_path / "out.safetensors")
    assert calls
    result = (a + 1.0 * (b - c)).save(tmp_path / "out.safetensors", allow_nonfinite=True)
    assert result.overflowed | result.nonfinite == {LAYER: 1}
    assert not ak.open(tmp_path / "out.safetensors")[LAYER][2, 3].isfinite()


@pytest.mark.parametrize("memory", ["1GB", 50_000])
def test_a_live_model_is_rewritten_in_one_pass(
    memory: Any, models: Models, calls: list[float], parts: dict[str, Any]
) -> None:
    bridge, variant, base = models
    live = ak.LiveModel(
        bridge.protect("refiner") + ak.param("k", 1.0) * (variant - base), parts, memory=memory, dtype="bf16"
    )
    calls.clear()
    for k in (3.0, 171.1):
        live.set(k=k)
        fresh = ak.pipeline(
            bridge.protect("refiner") + k * (variant - base), parts, dtype="bf16"
        ).transformer.state_dict()
        for name, value in live.pipe.transformer.state_dict().items():
            assert torch.equal(value, fresh[name]), name
    assert len(calls) >= 80

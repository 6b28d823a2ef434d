"""Updates against the libraries' own optimisers, and stochastic rounding against arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from alkahest.training.config import Config, config_of
from alkahest.training.optimise import Updates, rate_at, round_stochastically


def config(**changes: Any) -> Config:
    stage = {"mix": {"x": 1.0}, "steps": 3, "lr": 0.1}
    return config_of(
        {"start": "a", "inputs": {}, "data": {"x": {"folder": "x"}}, "stage": [stage], "clip": 0.0, **changes}
    )


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 70), nn.Tanh(), nn.Linear(70, 10)).to(dtype)


def batches(count: int) -> list[torch.Tensor]:
    return list(torch.randn(count, 8, 40, generator=torch.Generator().manual_seed(1)))


def train(net: nn.Module, updates: Updates, given: list[torch.Tensor], first: int = 0) -> None:
    for number, batch in enumerate(given, first):
        updates.begin(number, 0.01 / (1 + number))
        net(batch.to(next(net.parameters()).dtype)).square().sum().backward()
        updates.finish()


def reference(kind: str, parameters: Any) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(parameters, 1.0, betas=(0.9, 0.99), weight_decay=0.1)
    if kind == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            parameters, 1.0, scale_parameter=False, relative_step=False, warmup_init=False, weight_decay=0.1
        )  # type: ignore[no-any-return]
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, 1.0, betas=(0.9, 0.99), weight_decay=0.1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "adafactor", "adamw8bit"])
def test_they_are_the_libraries(kind: str, fused: bool) -> None:
    ours, theirs = model(), model()
    train(
        ours, Updates(dict(ours.named_parameters()), config(optimiser=kind, fused=fused, weight_decay=0.1)), batches(5)
    )
    optimiser = reference(kind, list(theirs.parameters()))
    for number, batch in enumerate(batches(5)):
        optimiser.param_groups[0]["lr"] = 0.01 / (1 + number)
        theirs(batch).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
        assert one.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "adafactor", "adamw8bit"])
def test_a_state_goes_on_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    settings = config(optimiser=kind, seed=3)
    whole, first = model(dtype), model(dtype)
    train(whole, Updates(dict(whole.named_parameters()), settings), batches(7))
    before = Updates(dict(first.named_parameters()), settings)
    train(first, before, batches(7)[:4])
    second = model(dtype)
    second.load_state_dict(first.state_dict())
    after = Updates(dict(second.named_parameters()), settings)
    after.load({name: value.clone() for name, value in before.state()})
    train(second, after, batches(7)[4:], first=4)
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_rounding_keeps_small_updates_on_average() -> None:
    """100 updates of one sign at a rate of 1e-5: nearest rounding realises a sixth, stochastic rounding all."""
    torch.manual_seed(0)
    start = (0.02 * torch.randn(200, 300)).bfloat16()
    realised = {}
    for how in ("nearest", "stochastic"):
        weights = start.clone()
        for step in range(100):
            moved = weights.float() + 1e-5
            weights = moved.bfloat16() if how == "nearest" else round_stochastically(moved, 0, step, "w")
        realised[how] = float((weights.float() - start.float()).mean()) / 1e-3
    assert realised["stochastic"] == pytest.approx(1, abs=0.02)
    assert realised["nearest"] < 0.3
    assert torch.equal(round_stochastically(start.float(), 0, 1, "w"), start), "what fits is not moved"


def test_a_bf16_model_is_updated_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model(torch.bfloat16)
    before = [p.detach().clone() for p in net.parameters()]
    updates = Updates(dict(net.named_parameters()), config())
    train(net, updates, batches(2))
    assert all(
        p.dtype == torch.bfloat16 and not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True)
    )
    assert {value.dtype for name, value in updates.state() if "exp_avg" in name} == {torch.float32}
    assert all(master.numel() == 0 for master in updates._masters.values()), "float32 copies do not stay"


def test_rates() -> None:
    assert [rate_at(step, 10, 2.0, 4, "constant") for step in (0, 1, 3, 9)] == [0.5, 1.0, 2.0, 2.0]
    assert rate_at(5, 10, 2.0, 0, "cosine") == pytest.approx(1.0)
    assert rate_at(9, 10, 2.0, 0, "cosine") == pytest.approx(1 + math.cos(math.pi * 0.9))

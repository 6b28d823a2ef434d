from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

import alkahest as ak
from alkahest import methods, random
from alkahest.errors import AlgebraError, UnknownNameError
from alkahest.scalar import Rules
from alkahest.term import Workspace, evaluate

KEY = "layers.1.feed_forward.w3.weight"


@pytest.fixture(scope="module")
def models(trio: dict[str, Path]) -> list[ak.Checkpoint]:
    return [ak.open(trio[name]) for name in ("bridge", "variant", "base")]


def computed(expression: ak.Weights | ak.Delta, key: str = KEY) -> torch.Tensor:
    found = expression.at(key, Rules())
    assert found is not None
    out = torch.empty(expression.shapes[key]).view(-1)
    evaluate(found, 0, out.numel(), out, Workspace(torch.device("cpu")))
    return out


def flat(model: ak.Checkpoint) -> torch.Tensor:
    return model[KEY].double().view(-1)


def test_ties_against_the_paper(models: list[ak.Checkpoint]) -> None:
    """Algorithm 1 of arXiv:2306.01708, entry by entry in float64."""
    a, v, b = models
    deltas = [flat(v) - flat(b), flat(a) - flat(b), flat(a) - flat(v)]
    trimmed = []
    for delta in deltas:
        keep = round(0.3 * len(delta))
        order = delta.abs().argsort(descending=True, stable=True)
        kept = torch.zeros_like(delta)
        kept[order[:keep]] = delta[order[:keep]]
        threshold = delta.abs()[order[keep - 1]]
        kept[delta.abs() == threshold] = delta[delta.abs() == threshold]  # bf16 has many equal entries
        trimmed.append(kept)
    elected = sum(trimmed).sign()
    expected = torch.zeros_like(deltas[0])
    for i in range(len(expected)):
        agreeing = [t[i] for t in trimmed if t[i] != 0 and t[i].sign() == elected[i]]
        expected[i] = sum(agreeing) / len(agreeing) if agreeing else 0
    ours = computed(ak.ties([v - b, a - b, a - v], density=0.3))
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-8)
    assert 0 < (ours == 0).double().mean() < 1


def test_dare_against_the_paper(models: list[ak.Checkpoint]) -> None:
    """Equation of section 3.2 of arXiv:2311.03099: mask, then divide by 1 - p."""
    _, v, b = models
    delta = flat(v) - flat(b)
    ours = computed(ak.dare(v - b, drop=0.7, seed=5)).double()
    mask = torch.from_numpy(random.uniform(5, "dare", KEY, 0, len(delta))) < 0.7
    torch.testing.assert_close(ours, torch.where(mask, 0, delta / (1 - 0.7)), rtol=1e-6, atol=1e-9)
    assert abs(mask.double().mean() - 0.7) < 0.02
    assert not torch.equal(ours, computed(ak.dare(v - b, drop=0.7, seed=6)).double())


def test_slerp_against_the_formula(models: list[ak.Checkpoint]) -> None:
    a, _, b = models
    x, y = flat(a), flat(b)
    angle = torch.arccos(x @ y / (x.norm() * y.norm()))
    for t in (0.0, 0.25, 1.0):
        expected = torch.sin((1 - t) * angle) / torch.sin(angle) * x + torch.sin(t * angle) / torch.sin(angle) * y
        torch.testing.assert_close(computed(ak.slerp(a, b, t=t)).double(), expected, rtol=1e-5, atol=1e-7)


def test_slerp_of_nearly_parallel_tensors_is_linear(models: list[ak.Checkpoint]) -> None:
    _, v, b = models
    expected = flat(v) + 0.3 * (flat(b) - flat(v))
    torch.testing.assert_close(computed(ak.slerp(v, b, t=0.3)).double(), expected, rtol=1e-5, atol=1e-7)


def test_methods_nest_and_respect_protection_and_masks(models: list[ak.Checkpoint]) -> None:
    a, v, b = models
    merged = a.protect("refiner") + 2 * ak.ties([ak.dare(v - b, drop=0.5), (a - b).only("layers")], density=1)
    assert merged.at("noise_refiner.0.ffn_norm1.weight", Rules()) == a.at("noise_refiner.0.ffn_norm1.weight", Rules())
    assert merged.text() == (
        "bridge.protect('refiner') + 2 * ties([dare(variant - base, drop=0.5, seed=0), (bridge - base).only('layers')], density=1)"
    )


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        (lambda a, v, b: ak.ties([a, b]), AlgebraError, "must be deltas"),
        (lambda a, v, b: ak.slerp(a, v - b), AlgebraError, "must be weights"),
        (lambda a, v, b: ak.slerp(a), AlgebraError, "number of operands"),
        (lambda a, v, b: ak.ties([]), AlgebraError, "number of operands"),
        (lambda a, v, b: ak.ties([v - b], densty=0.5), UnknownNameError, "did you mean 'density'"),
        (lambda a, v, b: computed(ak.ties([v - b], density=0)), AlgebraError, "out of range"),
        (lambda a, v, b: computed(ak.dare(v - b, drop=1)), AlgebraError, "out of range"),
        (lambda a, v, b: ak.dare(v - b, drop="x"), AlgebraError, "number is needed"),
    ],
)
def test_misuse_is_told(attempt, error: type[Exception], message: str, models: list[ak.Checkpoint]) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        attempt(*models)


def test_the_next_method_is_one_decorated_function(
    models: list[ak.Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "REGISTRY", dict(methods.REGISTRY))

    @ak.method(elementwise=True)
    def clipped(delta: torch.Tensor, *, most: float = 0.01) -> torch.Tensor:
        return delta.clamp(-most, most)

    assert str(inspect.signature(ak.dare)) == "(delta, *, drop=0.9, seed=0)"
    assert "Drop entries at random" in (ak.dare.__doc__ or "")
    a, v, b = models
    expected = (flat(v) - flat(b)).clamp(-0.002, 0.002)
    torch.testing.assert_close(computed(clipped(v - b, most=0.002)).double(), expected, rtol=1e-6, atol=1e-9)
    assert (a + clipped(v - b)).text() == "bridge + clipped(variant - base, most=0.01)"
    with pytest.raises(AlgebraError, match="registered already"):
        ak.method()(methods.REGISTRY["clipped"].function)
    with pytest.raises(AlgebraError, match="needs a default"):

        @ak.method()
        def careless(delta: torch.Tensor, *, most: float) -> torch.Tensor:
            return delta

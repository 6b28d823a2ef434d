from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import alkahest as ak
from alkahest.engine import terms
from alkahest.engine.evaluate import evaluate
from alkahest.engine.readable import Workspace
from alkahest.engine.scalars import Rules
from alkahest.errors import AlgebraError, MismatchError, UnknownNameError

LAYER = "layers.0.attention.to_q.weight"
REFINER = "noise_refiner.1.feed_forward.w2.weight"


@pytest.fixture(scope="module")
def models(trio: dict[str, Path]) -> tuple[ak.Checkpoint, ak.Checkpoint, ak.Checkpoint]:
    return tuple(ak.open(trio[name]) for name in ("bridge", "variant", "base"))  # type: ignore[return-value]


def test_types_of_the_algebra(models: tuple[ak.Checkpoint, ...]) -> None:
    bridge, variant, base = models
    delta = variant - base
    assert isinstance(delta, ak.Delta)
    for made in (
        2 * delta,
        delta * 2,
        -delta,
        delta / 3,
        delta + delta,
        delta - delta,
        sum([delta, delta]),
        delta.only("layers"),
    ):
        assert isinstance(made, ak.Delta)
    for made in (bridge + delta, delta + bridge, bridge - delta, bridge.protect("refiner"), ak.lerp(base, bridge, 0.5)):
        assert isinstance(made, ak.Weights)
    for number in (np.float64(2), np.float32(2), torch.tensor(2.0), 2):
        assert (number * delta if not isinstance(number, torch.Tensor) else delta * number) == 2.0 * delta


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda a, v, b: a + b, "twice a model.*ak.lerp"),
        (lambda a, v, b: 2 * a, "only a difference can"),
        (lambda a, v, b: a / 2, "only a difference can"),
        (lambda a, v, b: (v - b) * (v - b), "no meaning"),
        (lambda a, v, b: (v - b) + 1, "no meaning"),
        (lambda a, v, b: (v - b) - a, "no meaning"),
        (lambda a, v, b: a + 1, "no meaning"),
        (lambda a, v, b: a - "b", "no meaning"),
        (lambda a, v, b: True * (v - b), "a number is needed"),
        (lambda a, v, b: "2" * (v - b), "a number is needed"),
        (lambda a, v, b: float("nan") * (v - b), "not finite"),
        (lambda a, v, b: float("inf") * (v - b), "not finite"),
        (lambda a, v, b: 1e200 * (1e200 * (v - b)), "not finite"),
        (lambda a, v, b: (v - b) / 0, "division by zero"),
        (lambda a, v, b: (v - b) * torch.ones(2), "single number"),
        (lambda a, v, b: ak.lerp(a, v - b, 0.5), "delta was given"),
        (lambda a, v, b: ak.lerp(a, 3, 0.5), "weights are needed"),
        (lambda a, v, b: ak.weighted_sum([a, b], [0.5, 0.6]), "do not add up"),
        (lambda a, v, b: ak.weighted_sum([a, b], [1]), "one share per model"),
        (lambda a, v, b: ak.weighted_sum(a, b), "go in a list"),
        (lambda a, v, b: sum([a, b]), "twice a model"),
        (lambda a, v, b: ak.lerp(a, b.protect("refiner"), 0.5), "mixed away"),
        (lambda a, v, b: ak.param("not a name", 1), "plain name"),
        (lambda a, v, b: (a + ak.param("k", 1) * (v - b) + ak.param("k", 2) * (v - b)).params, "two values"),
    ],
)
def test_what_has_no_meaning_is_an_error_that_teaches(attempt, message: str, models: tuple[ak.Checkpoint, ...]) -> None:
    with pytest.raises(AlgebraError, match=f"(?s){message}"):
        attempt(*models)


def test_unknown_names_offer_the_nearest(models: tuple[ak.Checkpoint, ...]) -> None:
    bridge, variant, base = models
    delta = variant - base
    for attempt in (
        lambda: bridge.protect("refinr"),
        lambda: delta.only("refinr"),
        lambda: delta.without("refinr"),
        lambda: delta.scaled({"refinr": 2}),
        lambda: bridge.part("refinr"),
    ):
        with pytest.raises(UnknownNameError, match="did you mean 'refiner'"):
            attempt()
    with pytest.raises(UnknownNameError, match="no such parameter"):
        (ak.param("k", 1) * delta).bind(m=2)


def test_names_of_the_other_kind_say_what_to_do(models: tuple[ak.Checkpoint, ...]) -> None:
    bridge, variant, base = models
    for attempt, message in [
        (lambda: (variant - base).save("x.safetensors"), "a delta is no model"),
        (lambda: (variant - base).protect("refiner"), "protection belongs to the weights"),
        (lambda: bridge.only("layers"), "that is for deltas"),
        (lambda: bridge.nonsense, "no 'nonsense'$"),
    ]:
        with pytest.raises(AttributeError, match=message):
            attempt()
    assert not hasattr(bridge, "nonsense")


def test_partners_must_fit(tmp_path: Path, models: tuple[ak.Checkpoint, ...]) -> None:
    base = models[2]
    deeper = ak.open(tiny.write(tmp_path / "deeper.safetensors", tiny.native(tiny.state(0, layers=3))))
    with pytest.raises(MismatchError, match=r"(?s)different depths.*base: 2 layers"):
        deeper - base
    with pytest.raises(MismatchError, match="different depths"):
        ak.lerp(base, deeper, 0.5)
    extra = ak.open(
        tiny.write(
            tmp_path / "extra.safetensors", {**tiny.native(tiny.state(1)), "layers.0.extra.weight": torch.ones(3)}
        )
    )
    assert list(extra.extras) == ["layers.0.extra.weight"]
    assert (extra - base).shapes == base.shapes  # what is no part of the family is in no difference
    wider = dict(tiny.model(0, cap_feat_dim=48).state_dict())
    other = ak.open(tiny.write(tmp_path / "wider.safetensors", tiny.native(wider)))
    with pytest.raises(MismatchError, match=r"(?s)different shapes.*cap_embedder.0.weight"):
        base + (other - other)


def at(expression: ak.Weights, key: str) -> terms.Term | None:
    return expression.at(key, Rules())


def test_unchanged_tensors_come_down_to_their_source(models: tuple[ak.Checkpoint, ...]) -> None:
    bridge, variant, base = models
    delta = variant - base
    own = terms.Source(bridge, REFINER)
    protected = bridge.protect("refiner")
    assert at(protected + 171.1 * delta, REFINER) == own
    assert at(protected + delta + 3 * delta.scaled({"layers": 2}), REFINER) == own
    assert at(bridge + delta.without("refiner"), REFINER) == own
    assert at(bridge + delta.only("layers"), REFINER) == own
    assert at(bridge + 0 * delta, REFINER) == own
    assert at(bridge + (base - base), REFINER) == own
    assert at(ak.lerp(protected + delta, bridge + 8 * delta.only("layers"), 0.3), REFINER) == own
    assert at(ak.lerp(protected, base, 0.5), REFINER) == own
    assert at(ak.lerp(bridge, base, 0), REFINER) == own
    assert at(ak.slerp(protected, base), REFINER) == own
    # base + (variant - base) is the variant, and nothing is protected unless .protect() says so.
    assert at(base + (variant - base), REFINER) == terms.Source(variant, REFINER)
    # Everywhere overrides protection, and only its own delta does.
    lifted = at(protected + 5 * delta + 2 * delta.everywhere(), REFINER)
    assert lifted == terms.Plus(
        own, terms.Times(2.0, terms.Minus(terms.Source(variant, REFINER), terms.Source(base, REFINER)))
    )
    # Protection reaches what is added later, not what was added before.
    assert at((bridge + delta).protect("refiner") + delta, REFINER) == at(bridge + delta, REFINER)


def test_the_file_opened_twice_is_the_same_checkpoint(trio: dict[str, Path]) -> None:
    again = ak.open(trio["base"])
    assert again == ak.open(trio["base"])
    assert at(ak.open(trio["bridge"]) + (again - ak.open(trio["base"])), LAYER) == terms.Source(
        ak.open(trio["bridge"]), LAYER
    )


def test_text_is_canonical_and_shows_protection(models: tuple[ak.Checkpoint, ...]) -> None:
    bridge, variant, base = models
    merged = bridge.protect("refiner") + 10 * (17.11 * (variant - base)).scaled(
        {"layers.0": 2, "layers": ak.param("m", 1)}
    )
    assert merged.text() == (
        "bridge.protect('refiner') + 10 * (17.11 * (variant - base)).scaled({'layers.0': 2, 'layers': param('m', 1)})"
    )
    assert "protected: refiner (56 tensors stay bridge's, bit for bit)" in repr(merged)
    assert "protected: refiner" in merged._repr_html_()
    assert (10 * (17.11 * (variant - base))).text() == "171.1 * (variant - base)"
    assert (bridge - 0.5 * (variant - base)).text() == "bridge - 0.5 * (variant - base)"


def test_two_files_of_one_name_are_told_apart(tmp_path: Path, trio: dict[str, Path]) -> None:
    (tmp_path / "base.safetensors").write_bytes(trio["variant"].read_bytes())
    delta = ak.open(tmp_path / "base.safetensors") - ak.open(trio["base"])
    assert delta.text() == "base - base_2"


def test_named_scalars(models: tuple[ak.Checkpoint, ...]) -> None:
    bridge, variant, base = models
    merged = ak.lerp(bridge + ak.param("k", 2) * (variant - base), base, ak.param("t", 0.5))
    assert merged.params == {"t": 0.5, "k": 2.0}
    bound = merged.bind(k=171.1)
    assert bound.params == {"t": 0.5, "k": 171.1}
    assert bound.text() == "lerp(bridge + param('k', 171.1) * (variant - base), base, param('t', 0.5))"
    assert merged.at(LAYER, Rules({"k": 171.1})) == bound.at(LAYER, Rules())


def test_depth_is_limited_and_the_deepest_still_works(models: tuple[ak.Checkpoint, ...]) -> None:
    bridge, variant, base = models
    merged: ak.Weights = bridge
    with pytest.raises(AlgebraError, match="too deeply"):
        for _ in range(1000):
            merged = (merged.protect("refiner") + ak.param("k", 1) * (variant - base)).protect("final")
    assert merged.depth > 100
    assert merged.bind(k=2).text().count("param('k', 2)") == repr(merged).count("param('k', 1)") > 40
    assert merged == merged.bind(k=1)
    assert hash(merged) == hash(merged.bind(k=1))
    assert at(merged, REFINER) == terms.Source(bridge, REFINER)
    assert len(list(terms.sources(at(merged, LAYER)))) > 80


def test_html_escapes_names_from_strangers(tmp_path: Path, trio: dict[str, Path]) -> None:
    path = tmp_path / "<img src=x onerror=alert(1)>.safetensors"
    path.write_bytes(trio["base"].read_bytes())
    assert "<img" not in ak.open(path)._repr_html_()


def numbers(expression: ak.Weights | ak.Delta, key: str) -> torch.Tensor:
    found = expression.at(key, Rules())
    assert found is not None
    out = torch.empty(expression.shapes[key]).view(-1)
    evaluate(found, 0, out.numel(), out, Workspace(torch.device("cpu")))
    return out.view(expression.shapes[key]).double()


def test_of_several_factors_the_last_that_fits_counts(models: tuple[ak.Checkpoint, ...]) -> None:
    _, variant, base = models
    delta = (variant - base).scaled({"layers": 2, "attention": 5, "layers.1": 7})
    other = (variant - base).scaled({"layers.1": 7, "attention": 5, "layers": 2})
    for scaled, factors in ((delta, (5.0, 2.0, 7.0, 7.0, 5.0, 1.0)), (other, (2.0, 2.0, 2.0, 2.0, 5.0, 1.0))):
        keys = (
            "layers.0.attention.to_q.weight",
            "layers.0.feed_forward.w1.weight",
            "layers.1.attention.to_q.weight",
            "layers.1.feed_forward.w1.weight",
            "noise_refiner.0.attention.to_q.weight",
            "cap_embedder.1.weight",
        )
        for key, factor in zip(keys, factors, strict=True):
            exact = factor * (variant[key].double() - base[key].double())
            torch.testing.assert_close(numbers(scaled, key), exact, rtol=1e-6, atol=1e-9, msg=key)


@pytest.mark.parametrize("t", [0.3, -0.7, 1.9, 0.5, 1.0])
def test_a_change_from_the_left_goes_its_share_of_the_way(t: float, models: tuple[ak.Checkpoint, ...]) -> None:
    bridge, variant, base = models
    a, v, b = (model[LAYER].double() for model in models)
    for expression, exact in (
        (ak.lerp(bridge, variant, t), a + t * (v - a)),
        (bridge + t * (variant - bridge), a + t * (v - a)),
        (bridge - t * (variant - bridge), a - t * (v - a)),
        (bridge + t * (bridge - variant), a + t * (a - v)),
        (bridge + t * (variant - base), a + t * (v - b)),
        (ak.weighted_sum([bridge, variant, base], [1 - t - 0.2, t, 0.2]), (0.8 - t) * a + t * v + 0.2 * b),
    ):
        torch.testing.assert_close(numbers(expression, LAYER), exact, rtol=1e-5, atol=1e-6, msg=expression.text())

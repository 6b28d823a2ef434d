"""Numbers that differ from tensor to tensor, against formulas written out here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import alkahest as ak
from alkahest.engine.evaluate import evaluate
from alkahest.engine.readable import Workspace
from alkahest.engine.scalars import Rules
from alkahest.errors import AlgebraError, UnknownNameError
from alkahest.recipes.inputs import build
from alkahest.recipes.text import names_in, parse

BEFORE, AFTER = "t_embedder.mlp.0.weight", "all_final_layer.2-1.linear.weight"


def block(number: int) -> str:
    return f"layers.{number}.feed_forward.w3.weight"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ak.Weights]:
    """Models of six blocks."""
    folder = tmp_path_factory.mktemp("six")
    states = {name: tiny.native(tiny.state(seed=seed, layers=6)) for seed, name in enumerate("abv", start=1)}
    return {name: ak.open(tiny.write(folder / f"{name}.safetensors", state)) for name, state in states.items()}


def computed(expression: ak.Weights | ak.Delta, key: str) -> torch.Tensor:
    found = expression.at(key, Rules())
    out = torch.zeros(expression.shapes[key]).view(-1)
    if found is not None:
        evaluate(found, 0, out.numel(), out, Workspace(torch.device("cpu")))
    return out.double()


def along(values: list[float], number: int, blocks: int = 6) -> float:
    """mergekit's reading of a gradient: the place of a block times the gaps, linear between the two next to it."""
    place = number / (blocks - 1) * (len(values) - 1)
    low = int(place)
    high = min(len(values) - 1, low + 1)
    return (1 - (place - low)) * values[low] + (place - low) * values[high]


@pytest.mark.parametrize("values", [[0, 1], [0, 0.5, 1], [1, 0.2, 0.9, 0.4], [0.3]])
def test_a_list_goes_along_the_blocks(values: list[float], family: dict[str, ak.Weights]) -> None:
    a, b = family["a"], family["b"]
    for number in range(6):
        key = block(number)
        x, y, t = computed(a, key), computed(b, key), along(values, number)
        torch.testing.assert_close(computed(ak.lerp(a, b, values), key), x + t * (y - x), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(computed((b - a).scaled(values), key), t * (y - x), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(
            computed(ak.slerp(a, b, t=values), key), computed(ak.slerp(a, b, t=t), key), rtol=1e-5, atol=1e-7
        )
    for key, t in ((BEFORE, values[0]), (AFTER, values[-1])):
        x, y = computed(a, key), computed(b, key)
        torch.testing.assert_close(computed(ak.lerp(a, b, values), key), x + t * (y - x), rtol=1e-5, atol=1e-7)


def test_the_last_pattern_that_selects_a_tensor_counts(family: dict[str, ak.Weights]) -> None:
    a, b = family["a"], family["b"]
    mixed = ak.lerp(a, b, {"*": 0.1, "layers": [0, 1], "attention": 0.7})
    at = {
        BEFORE: 0.1,
        block(0): 0.0,
        block(3): 0.6,
        "layers.3.attention.to_out.0.weight": 0.7,
        "noise_refiner.0.attention.to_out.0.weight": 0.7,
        AFTER: 0.1,
    }
    for key, t in at.items():
        x, y = computed(a, key), computed(b, key)
        torch.testing.assert_close(computed(mixed, key), x + t * (y - x), rtol=1e-5, atol=1e-7)


def test_shares_of_models(family: dict[str, ak.Weights]) -> None:
    a, b, v = (family[name] for name in "abv")
    summed = ak.weighted_sum([a, b, v], [[0.5, 0.2], [0.3, 0.6], 0.2])
    divided = ak.weighted_sum([a, b, v], [[1, 4], 2, {"*": 1, "layers.0-2": 5}], normalise=True)
    for number in range(6):
        x, y, z = (computed(one, block(number)) for one in (a, b, v))
        first = along([0.5, 0.2], number)
        expected = first * x + along([0.3, 0.6], number) * y + 0.2 * z
        torch.testing.assert_close(computed(summed, block(number)), expected, rtol=1e-5, atol=1e-7)
        w = [along([1, 4], number), 2.0, 5.0 if number <= 2 else 1.0]
        expected = (w[0] * x + w[1] * y + w[2] * z) / sum(w)
        torch.testing.assert_close(computed(divided, block(number)), expected, rtol=1e-5, atol=1e-7)
    plain = ak.weighted_sum([a, b], [3, 1], normalise=True)
    assert plain.text() == ak.weighted_sum([a, b], [0.75, 0.25]).text()


def test_ties_with_weights_divides_by_those_that_agree(family: dict[str, ak.Weights]) -> None:
    a, b, v = (family[name] for name in "abv")
    key, densities, weights = block(2), [0.5, 0.25], [0.7, 0.4]
    deltas = [computed(one, key) - computed(a, key) for one in (b, v)]
    expected, parts = torch.zeros_like(deltas[0]), []
    for delta, density in zip(deltas, densities, strict=True):
        least = delta.abs().sort(descending=True).values[round(density * len(delta)) - 1]
        parts.append(torch.where(delta.abs() >= least, delta, 0))
    sums = weights[0] * parts[0] + weights[1] * parts[1]
    divisor = torch.zeros_like(expected)
    for part, weight in zip(parts, weights, strict=True):
        agrees = (part != 0) & ((part * weight).sign() == sums.sign())
        expected += torch.where(agrees, weight * part, 0)
        divisor += torch.where(agrees, weight, 0.0)
    ours = ak.ties([b - a, v - a], density=densities, weights=weights)
    mean = torch.where(divisor > 0, expected / divisor.clamp(min=1e-9), 0)
    torch.testing.assert_close(computed(ours, key), mean, rtol=1e-4, atol=1e-6)
    whole = ak.ties([b - a, v - a], density=densities, weights=weights, normalise=False)
    torch.testing.assert_close(computed(whole, key), expected, rtol=1e-4, atol=1e-6)
    by_hand = computed(ak.ties([0.7 * (b - a), 0.4 * (v - a)], density=0.5), key)  # the other sum, told apart
    assert not torch.allclose(by_hand, computed(ak.ties([b - a, v - a], density=0.5, weights=weights), key))


def test_each_operand_keeps_its_own_number_where_another_has_no_tensor(family: dict[str, ak.Weights]) -> None:
    a, b, v = (family[name] for name in "abv")
    made = ak.ties([(b - a).only("layers.0"), v - a], density=[1, 0.5], weights=[0.7, {"*": 0.4, "layers": [0.1, 1]}])
    alone = ak.ties([v - a], density=0.5, weights=along([0.1, 1], 3), normalise=False)
    whole = ak.ties([v - a], density=0.5)
    torch.testing.assert_close(computed(made, block(3)), computed(whole, block(3)))  # the mean of one is itself
    assert not torch.allclose(computed(alone, block(3)), computed(whole, block(3)))


@pytest.mark.parametrize(
    "text",
    [
        "lerp(a, b, [0, 0.5, 1])",
        "lerp(a, b, {'*': 0.1, 'layers': [0, 1], 'attention': 0.7})",
        "lerp(a, b, [0, param('top', 0.4)])",
        "a + (b - v).scaled([0.5, 1])",
        "a + (b - v).scaled({'layers': [0, 1], 'refiner': 2})",
        "weighted_sum([a, b], [[0.5, 0.2], [0.5, 0.8]])",
        "weighted_sum([a, b], [[1, 4], 2], normalise=1)",
        "slerp(a, b, t=[0, 1])",
        "a + ties([b - v, a - v], density=[0.5, 0.25], weights=[0.7, {'*': [0, 1], 'refiner': 0}])",
        "a + ties([b - v], density=0.5, normalise=0)",
        "a + dare(b - v, drop=[0.1, 0.9], seed=3)",
    ],
)
def test_a_recipe_says_it_and_reads_it_back(text: str, family: dict[str, ak.Weights], tmp_path: Path) -> None:
    made = parse(text, dict(family))
    assert made.text() == text
    one = made.save(tmp_path / "one.safetensors")
    assert ak.read_recipe(one.path)[1].text == text
    files = {name: model.path for name, model in family.items() if name in names_in(text)}
    again = build(ak.read_recipe(one.path)[1], files).save(tmp_path / "two.safetensors", threads=2)
    assert again.path.read_bytes() == one.path.read_bytes()


def test_a_named_number_moves(family: dict[str, ak.Weights]) -> None:
    a, b = family["a"], family["b"]
    mixed = ak.lerp(a, b, [0, ak.param("top", 0.4)])
    assert mixed.params == {"top": 0.4}
    assert torch.equal(computed(mixed.bind(top=1), block(4)), computed(ak.lerp(a, b, [0, 1]), block(4)))


def test_a_named_whole_number_is_not_cut(family: dict[str, ak.Weights]) -> None:
    mean = ak.karcher([family["a"], family["b"]], iterations=ak.param("n", 10))
    computed(mean.bind(n=2), block(0))
    with pytest.raises(AlgebraError, match="whole number"):
        computed(mean.bind(n=2.5), block(0))


def refusals() -> list[tuple[Callable[..., Any], type[Exception], str]]:
    return [
        (lambda a, b, v: ak.lerp(a, b, []), AlgebraError, "empty"),
        (lambda a, b, v: ak.lerp(a, b, [0, "x"]), AlgebraError, "number"),
        (lambda a, b, v: ak.lerp(a, b, [0, float("nan")]), AlgebraError, "finite"),
        (lambda a, b, v: ak.lerp(a, b, {"layers": 0.5}), AlgebraError, "given no value"),
        (lambda a, b, v: ak.lerp(a, b, {"*": 0.5, "layer": 1}), UnknownNameError, "did you mean"),
        (lambda a, b, v: ak.lerp(a, b, {"*": 0.5, "refiner": [0, 1]}), AlgebraError, "selects none"),
        (lambda a, b, v: (a - b).scaled(2), AlgebraError, r"number \* delta"),
        (lambda a, b, v: (a - b).scaled({"refiner": [0, 1]}), AlgebraError, "selects none"),
        (lambda a, b, v: ak.ties([a - b, v - b], weights=[1, 2, 3]), AlgebraError, "3 for 2"),
        (lambda a, b, v: ak.ties([a - b], weights=["1"]), AlgebraError, "number"),
        (lambda a, b, v: ak.dare(a - b, seed=[1, 2]), AlgebraError, "number"),
        (lambda a, b, v: ak.dare(a - b, seed=1.5), AlgebraError, "whole number"),
        (lambda a, b, v: ak.karcher([a, b], iterations=2.5), AlgebraError, "whole number"),
        (lambda a, b, v: ak.nuslerp(a - b, v - b, rows=0.3), AlgebraError, "on or off"),
        (lambda a, b, v: ak.weighted_sum([a, b], [[0.5, 0.2], 0.5]), AlgebraError, "do not add up"),
        (lambda a, b, v: ak.weighted_sum([a, b], [1, -1], normalise=True), AlgebraError, "add up to 0"),
        (lambda a, b, v: ak.weighted_sum([a, b], [[1, -1], [-1, -1]], normalise=True), AlgebraError, "add up to 0"),
        (lambda a, b, v: ak.weighted_sum([a, b], [ak.param("s", 0.5), 0.5]), AlgebraError, "one by one"),
        (lambda a, b, v: ak.weighted_sum([a, b], [1, 1], normalise=2), AlgebraError, "on or off"),
    ]


@pytest.mark.parametrize("case", range(len(refusals())))
def test_what_is_no_such_number_is_refused(case: int, family: dict[str, ak.Weights]) -> None:
    make, error, match = refusals()[case]
    with pytest.raises(error, match=match):
        make(*(family[name] for name in "abv"))


def test_comfyui_has_no_node_for_it(family: dict[str, ak.Weights], tmp_path: Path) -> None:
    a, b = family["a"], family["b"]
    for made in (ak.lerp(a, b, [0, 1]), ak.weighted_sum([a, b], [[1, 4], 2], normalise=True)):
        with pytest.raises(AlgebraError, match="no ComfyUI node"):
            ak.write_workflow(made, tmp_path / "graph.json")
        assert not (tmp_path / "graph.json").exists()

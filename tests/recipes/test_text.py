from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import alkahest as ak
from alkahest.engine.record import MAX_TEXT, Recipe
from alkahest.errors import AlkahestError, RecipeError
from alkahest.recipes.text import names_in, parse


@pytest.fixture(scope="module")
def names(trio: dict[str, Path]) -> dict[str, Any]:
    return {name: ak.open(path) for name, path in trio.items()}


CANONICAL = [
    "bridge",
    "bridge + (variant - base)",
    "bridge - 0.5 * (variant - base)",
    "bridge.protect('refiner') + 171.1 * (variant - base)",
    "(bridge + (variant - base)).protect('refiner, embedders') + 2 * (variant - base).everywhere()",
    "bridge + (variant - base + 3 * (variant - base).only('layers.0-1'))",
    "bridge + 2 * ((variant - base).without('qkv') - (variant - base))",
    "bridge + (variant - base).scaled({'layers': 1.5, 'layers.0': param('k', 2)})",
    "bridge + param('k', 171.1) * (variant - base)",
    "lerp(bridge.protect('refiner') + (variant - base), base, 0.5)",
    "lerp(bridge, base, param('t', 0.25))",
    "weighted_sum([bridge, variant, base], [0.5, 0.3, 0.2])",
    "slerp(bridge, base, t=0.5)",
    "bridge + ties([variant - base, 0.5 * (bridge - base)], density=0.2)",
    "bridge + dare(variant - base, drop=0.9, seed=3)",
    "bridge + (lerp(variant, base, 0.5) - base)",
    "bridge + 1e-07 * (variant - base)",
    "made_up(layers=2, seed=0, delta=0.1, width=96, only='layers')",
]


@pytest.mark.parametrize("text", CANONICAL)
def test_canonical_text_reads_back_as_itself(text: str, names: dict[str, Any]) -> None:

    once = parse(text, names)
    assert once.text() == text
    assert parse(once.text(), names) == once


def test_the_package_name_may_stand_before_functions(names: dict[str, Any]) -> None:
    merged = parse("ak.lerp(bridge, base, 0.5) + ak.ties([variant - base])", names)
    assert merged.text() == "lerp(bridge, base, 0.5) + ties([variant - base], density=0.2)"
    assert names_in("ak.lerp(ak.protect('refiner'), base, 0.5)") == ["ak", "base"]
    with pytest.raises(RecipeError, match="unknown function 'open'"):
        parse("ak.open('x')", names)
    with pytest.raises(RecipeError, match=r"is a \* missing"):
        parse("bridge + 2 (variant - base)", names)


def test_names_bound_to_numbers_become_scalars(names: dict[str, Any]) -> None:
    merged = parse("bridge + k * (variant - base)", {**names, "k": 171.1})
    assert merged.params == {"k": 171.1}
    assert names_in("b.protect('refiner') + k * lerp(v, b, 0.5)") == ["b", "k", "v"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bridge +",
        "__import__('os').system('true')",
        "bridge.__class__",
        "bridge.__class__.__mro__",
        "bridge.save('x.safetensors')",
        "bridge.path",
        "(lambda: bridge)()",
        "[bridge for x in (1, 2)]",
        "bridge if 1 else base",
        "bridge and base",
        "bridge < base",
        "bridge ** 2",
        "bridge // 2",
        "bridge @ base",
        "bridge[0]",
        "f'{bridge}'",
        "bridge.protect(*['refiner'])",
        "bridge.protect(**{'pattern': 'refiner'})",
        "(x := bridge)",
        "open('/etc/passwd')",
        "eval('1')",
        "getattr(bridge, 'path')",
        "'a' * 1000",
        "'a' + 'b'",
        "[1] * 1000000000",
        "2 ** 2 ** 2 ** 30",
        "True * (variant - base)",
        "bridge; base",
        "import os",
        "...",
        "None",
        "b'x'",
        "1j * (variant - base)",
        "bridge.protect('refiner', 'more')",
        "bridge.protect(3)",
        "lerp(bridge)",
        "lerp.__globals__",
        "param('k', 'x')",
        "(variant - base).scaled(2)",
        "(variant - base).scaled({variant: 2})",
        "weighted_sum(bridge, 1)",
        "(variant - base).protect('refiner')",
        "bridge.only('refiner')",
        "ties",
        "bridgee",
        "-bridge",
        "\0",
        "(" * 5000 + "bridge" + ")" * 5000,
        "-" * 50_000 + "1",
        "bridge" + " + (variant - base)" * 5000,
        "a" * (MAX_TEXT + 1),
        "1" * 5000 + " * (variant - base)",
        "1e999 * (variant - base)",
        "made_up(layers=1000000000)",
    ],
)
def test_anything_outside_the_whitelist_is_refused(text: str, names: dict[str, Any]) -> None:
    with pytest.raises(AlkahestError):
        parse(text, names)


def test_refusals_point_at_the_place_and_the_nearest_name(names: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"(?s)unknown name 'varient'.*column 18.*did you mean 'variant'"):
        parse("bridge + 171.1 * varient", names)
    with pytest.raises(RecipeError, match=r"(?s)unknown function 'lrep'.*did you mean 'lerp'"):
        parse("lrep(bridge, base, 0.5)", names)
    with pytest.raises(RecipeError, match=r"(?s)unknown method 'protectt'.*did you mean 'protect'"):
        parse("bridge.protectt('refiner')", names)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="bridge vants+-*/().,'[]{}:=0123_", max_size=60))
def test_random_text_never_escapes(text: str, names: dict[str, Any]) -> None:
    try:
        result = parse(text, names)
    except AlkahestError:
        return
    assert isinstance(result, (ak.Weights, ak.Delta, int, float, str, list, dict))


def test_json_round_trip() -> None:
    recipe = Recipe(
        "a - b", {"a": [{"file": "ä.safetensors", "bytes": 3, "blake3": "00" * 32}]}, {"dtype": "bf16"}, "1"
    )
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"recipe": 3, "inputs": {}, "output": {}}',
        '{"recipe": "a", "inputs": [], "output": {}}',
        '{"recipe": "a", "inputs": {}, "output": []}',
        '{"recipe": "a", "inputs": {"a": [{}]}, "output": {}}',
        '{"recipe": "a", "inputs": {"a": [{"file": "x", "bytes": 1, "blake3": "zz"}]}, "output": {}}',
        '{"recipe": "a", "inputs": {"a": [{"file": 1, "bytes": 1, "blake3": "' + "00" * 32 + '"}]}, "output": {}}',
        "[" * 100_000,
    ],
)
def test_damaged_recipes_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="damaged"):
        Recipe.from_json(text)

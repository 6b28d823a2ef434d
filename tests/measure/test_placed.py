from __future__ import annotations

from pathlib import Path

import pytest

import alkahest as ak
from alkahest.engine.scalars import Rules
from alkahest.errors import AlgebraError
from alkahest.measure.placed import auto_multiplied
from alkahest.measure.table import without_factor


def test_the_place_of_k_in_an_expression(trio: dict[str, Path]) -> None:
    v, b, w = (ak.open(trio[name]) for name in ("variant", "base", "bridge"))
    r = ak.open(trio["bridge"])
    k = ak.param("k", 1.0)
    for expression, expected in (
        (w + k * (v - b), v - b),
        (ak.lerp(w + k * (v - b).only("layers"), w + 3 * (r - b), 0.5), (v - b).only("layers")),
        (w + ((r - b) - k * (2 * (v - b))), -2 * (v - b)),
    ):
        delta, on = auto_multiplied(expression)
        assert on is w
        for key in delta.shapes:
            assert without_factor(delta.at(key, Rules())) == without_factor(expected.at(key, Rules()))
    for expression in (w + (v - b), ak.lerp(w, v, k), (w + k * (v - b)) + k * (r - b)):
        with pytest.raises(AlgebraError, match="must multiply one delta that is added to a model"):
            auto_multiplied(expression)

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from alkahest.errors import AlgebraError
from alkahest.lora.rank import RankRule

S = np.array([8.0, 4.0, 2.0, 1.0, 0.5])
SQUARES = float((S**2).sum())


def rule(rank_max: int | None = 64, noise_edge: bool = False, **given: Any) -> RankRule:
    return RankRule.of(given, rank_max, noise_edge, "test")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rank": 3}, 3),
        ({"rank": 9}, 5),
        ({"energy": 64 / SQUARES - 1e-9}, 1),
        ({"energy": 64 / SQUARES + 1e-9}, 2),
        ({"energy": 0.99}, 4),
        ({"energy": 1.0}, 5),
        ({"sum": 12 / 15.5 - 1e-9}, 2),
        ({"sum": 12 / 15.5 + 1e-9}, 3),
        ({"ratio": 0.25}, 3),
        ({"ratio": 0.26}, 2),
        ({"ratio": 1.0}, 1),
        ({}, 4),
    ],
)
def test_rules_by_hand(given: dict[str, float], expected: int) -> None:
    assert rule(**given).choose(S, SQUARES, True, math.nan) == expected


def test_what_the_leading_values_cannot_answer_is_not_answered() -> None:
    assert rule(energy=0.7).choose(S[:2], SQUARES, False, math.nan) == 1
    assert rule(energy=0.999).choose(S[:2], SQUARES, False, math.nan) is None
    assert rule(ratio=0.1).choose(S[:2], SQUARES, False, math.nan) is None
    assert rule(ratio=0.6).choose(S[:2], SQUARES, False, math.nan) == 1
    assert rule(rank=3).choose(S[:2], SQUARES, False, math.nan) is None
    assert rule(sum=0.5).choose(S[:2], SQUARES, False, math.nan) is None
    assert rule(sum=0.5).needs_all


def test_zeros_are_no_rank() -> None:
    values = np.array([3.0, 1.0, 1e-9, 0.0])
    assert rule(energy=1.0).choose(values, 10.0, True, math.nan) == 2
    assert rule(rank=4).choose(values, 10.0, True, math.nan) == 2
    assert rule(energy=1.0).choose(values, 10.0, False, math.nan) == 2, "what follows zeros is zero"


def test_the_noise_edge_stops_any_rule() -> None:
    assert rule(noise_edge=True).choose(S, SQUARES, True, 1.5) == 3
    assert rule(noise_edge=True, energy=0.9999).choose(S, SQUARES, True, 1.5) == 3
    assert rule(noise_edge=True, energy=0.5).choose(S, SQUARES, True, 1.5) == 1
    assert rule(noise_edge=True).choose(S, SQUARES, True, 99.0) == 0
    assert rule(noise_edge=True).choose(S[:2], SQUARES, False, 1.5) is None
    assert rule(noise_edge=True).text == "noise_edge=True, rank_max=64"


def test_caps() -> None:
    assert rule().cap(96) == 64
    assert rule().cap(20) == 20
    assert rule(rank_max=None).cap(96) == 96
    assert rule(rank=80).cap(96) == 80, "a rank that is asked for is not capped"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"energy": 0.0}, "energy is a share"),
        ({"energy": 1.5}, "energy=0.995 means 99.5 %"),
        ({"energy": 99}, "a share"),
        ({"ratio": -1}, "a share"),
        ({"sum": math.nan}, "a share"),
        ({"energy": True}, "a share"),
        ({"energy": "x"}, "a share"),
        ({"rank": 0}, "1 or more"),
        ({"rank": 2.5}, "whole number"),
        ({"rank": True}, "whole number"),
        ({"rank": 4, "energy": 0.9}, "several rank rules"),
        ({"rank_max": 0}, "rank_max"),
        ({"rank_max": 1.5}, "rank_max"),
        ({"rank": 4, "rank_max": 2}, "larger than rank_max"),
    ],
)
def test_out_of_range(given: dict[str, Any], words: str) -> None:
    with pytest.raises(AlgebraError, match=words):
        rule(**given)

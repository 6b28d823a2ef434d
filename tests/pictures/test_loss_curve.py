from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from alkahest.engine.events import Event, result_of
from alkahest.pictures.loss_curve import LossCurve, walk_over_k


def curve(best: float = 3.0, ks: Any = (0, 1, 2, 4, 8), spread: float = 0.2, count: int = 12) -> LossCurve:
    """Pictures whose losses are parabolas over k, each with its own minimum round ``best``."""
    rng = np.random.default_rng(3)
    places = np.array(ks, float)
    own = best + spread * (rng.standard_normal(count) - 0.0)
    new = 1 + 0.01 * (places[:, None] - own) ** 2
    rest = 0.5 + 0.02 * places[:, None] ** 2 + np.zeros(5)
    variant = np.full(count, 1.0)
    return LossCurve(places, new, rest, places / 4, variant, variant + 0.1, variant + 0.2)


def test_the_minimum_of_parabolas_is_theirs() -> None:
    found = curve()
    own = 3.0 + 0.2 * np.random.default_rng(3).standard_normal(12)
    mean = float(own.mean())
    assert found.minimum == pytest.approx(mean, rel=1e-9)
    low, high = found.interval
    assert low < mean < high
    # Student's t of 11 degrees at 95 % is 1.796.
    assert high - low == pytest.approx(2 * 1.796 * float(own.std(ddof=1)) / math.sqrt(12), rel=0.1)
    # Not spread evenly, and the minimum beside a measured one.
    assert curve(5.0, (0, 0.5, 4.5, 6, 20), 0.0).minimum == pytest.approx(5.0, rel=1e-9)


def test_gain_gap_and_what_everything_else_loses() -> None:
    found = curve(3.0, spread=0.0)
    table = found.table
    assert table.gained.tolist() == pytest.approx([0, 0.05, 0.08, 0.08, -0.16])
    assert table.lost.tolist() == pytest.approx([0, 0.02, 0.08, 0.32, 1.28])
    assert found.gain[0] == pytest.approx(0.08 / 1.09)
    assert found.gap == pytest.approx(0.09)
    assert found.closed == pytest.approx(0.08 / 0.09)
    assert found.at("lost", 3) == pytest.approx(0.2)
    assert found.surely_less(found.variant, found.base)
    assert not found.surely_less(found.base, found.variant)
    assert not found.surely_less(found.base, found.base)
    assert replace(found, variant=found.new[0] + 1).closed == math.inf


def test_a_curve_that_only_rises_has_its_minimum_at_zero() -> None:
    found = curve(-1.0)
    assert found.minimum == 0
    assert found.interval == (0, 0)
    assert found.gain[0] == 0
    assert curve(30.0).minimum == 8  # the largest that was looked at


@pytest.mark.parametrize("best", [0.02, 0.9, 5.0, 330.0])
@pytest.mark.parametrize("start", [0.353, 185.0])
def test_the_walk_finds_a_minimum_wherever_it_lies(best: float, start: float) -> None:
    asked: list[float] = []

    def evaluate(k: float) -> Iterator[Event]:
        asked.append(k)
        yield Event(1, 1, "", (np.full(3, 1 + (k / best - 1) ** 2 / 10), "rest"))

    found = result_of(walk_over_k(evaluate, start, start / 1e5, 24))
    assert list(found) == sorted(asked)
    assert len(asked) == len(set(asked)) < 24
    losses = np.array([found[k][0] for k in found])
    one = curve()
    where = LossCurve(np.array(list(found)), losses, losses, losses[:, 0], one.variant, one.variant, one.variant)
    assert where.minimum == pytest.approx(best, rel=1e-3)


def test_the_walk_stops_where_nothing_helps() -> None:
    def evaluate(k: float) -> Iterator[Event]:
        yield Event(1, 1, "", (np.full(3, 1 + k), "rest"))

    found = result_of(walk_over_k(evaluate, 1.0, 1 / 64, 24))
    assert min(found) == 0
    assert min(k for k in found if k > 0) <= 1 / 64
    assert len(found) < 14

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

import alkahest as ak
from alkahest.errors import AlgebraError, UnknownNameError
from alkahest.pictures.preferences import next_pair, posterior, wins_of


def table(*answers: tuple[str, str, str]) -> pd.DataFrame:
    return pd.DataFrame(answers, columns=["left", "right", "answer"])


TWELVE = table(
    *[("a", "b", "left")] * 3,
    *[("b", "a", "alike")] * 2,
    *[("c", "b", "right")] * 3,
    ("b", "c", "right"),
    *[("a", "c", "left")] * 2,
    ("c", "a", "left"),
)


def by_grid(answers: pd.DataFrame, names: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean strengths and chances of being best, by adding up the whole posterior on a grid: slow and exact."""
    axis, wins = np.linspace(-6, 6, 97), wins_of(answers, list(names))
    grid = np.stack(np.meshgrid(*[axis] * len(names), indexing="ij"), -1).reshape(-1, len(names))
    density = -(grid**2).sum(1) / (2 * 1.5**2)
    for one, other in itertools.permutations(range(len(names)), 2):
        density -= wins[one, other] * np.log1p(np.exp(grid[:, other] - grid[:, one]))
    density = np.exp(density)
    means = (density[:, None] * (grid - grid.mean(1, keepdims=True))).sum(0)
    tops = grid == grid.max(1, keepdims=True)
    best = (density[:, None] * tops / tops.sum(1, keepdims=True)).sum(0)
    return means / density.sum(), best / density.sum()


def test_the_order_is_that_of_the_whole_posterior() -> None:
    order = ak.preference_order(TWELVE)
    found = order.table.set_index("recipe").loc[list("abc")]
    means, best = by_grid(TWELVE, "abc")
    assert found.strength.to_numpy() == pytest.approx(means, abs=0.1)
    assert found.best.to_numpy() == pytest.approx(best, abs=0.03)
    assert order.table.recipe.tolist() == ["a", "b", "c"]
    assert (found.won.tolist(), found.lost.tolist(), found.alike.tolist()) == ([5, 3, 2], [1, 4, 5], [2, 2, 0])
    assert found.asked.tolist() == [8, 9, 7]
    assert (found.low < found.strength).all()
    assert (found.strength < found.high).all()


def test_few_answers_decide_nothing_and_many_do() -> None:
    few = ak.preference_order(TWELVE)
    assert not few.is_decided
    assert repr(few).startswith("undecided: a is the best with a probability of")
    many = ak.preference_order(pd.concat([TWELVE] * 4))
    assert many.is_decided
    assert many.best == "a"
    assert repr(many).startswith("a is the best, with a probability of 9")
    assert "<table" in many._repr_html_()


def test_alike_brings_together_and_contradiction_does_too() -> None:
    apart, alike, torn = (
        ak.preference_order(table(*rows))
        for rows in (
            [("a", "b", "left")] * 8,
            [("a", "b", "alike")] * 8,
            [("a", "b", "left"), ("b", "a", "left")] * 4,
        )
    )
    assert apart.table.strength[0] > 1
    assert alike.table.strength.abs().max() < 1e-9
    assert torn.table.strength.abs().max() < 1e-9
    assert alike.table.best.to_numpy() == pytest.approx([0.5, 0.5], abs=0.02)


def test_a_side_that_always_wins_is_said() -> None:
    sided = ak.preference_order(table(*[("a", "b", "left"), ("b", "a", "left")] * 6))
    assert "12 of 12 times the left one was taken: the side, more than the picture, decided" in repr(sided)
    assert "the side" not in repr(ak.preference_order(TWELVE))


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        (table(), AlgebraError),
        (table(("a", "b", "both")), UnknownNameError),
        (table(("a", "a", "left")), AlgebraError),
        (table(("a", "b", "left")).drop(columns="right"), UnknownNameError),
    ],
)
def test_other_tables_are_refused(answers: pd.DataFrame, error: type[Exception]) -> None:
    with pytest.raises(error):
        ak.preference_order(answers)


def test_pairs_are_chosen_where_they_tell_most() -> None:
    rng = np.random.default_rng(0)
    fresh = {frozenset(next_pair(np.zeros((4, 4)), rng)) for _ in range(60)}
    assert len(fresh) == 6  # all alike at first
    wins = np.zeros((4, 4))
    wins[0, 1] = wins[1, 0] = 3.0  # two that are close, far above two others that lost much
    wins[0, 2] = wins[0, 3] = wins[1, 2] = wins[1, 3] = 8.0
    assert {frozenset(next_pair(wins, rng)) for _ in range(20)} == {frozenset((0, 1))}
    sides = [next_pair(wins, rng) for _ in range(40)]
    assert {(0, 1), (1, 0)} == set(sides)  # neither is always on the left


def test_chosen_pairs_find_the_best_sooner() -> None:
    """By a simulated person whose strengths are known: fewer misses than by pairs that go round."""
    rounds = list(itertools.combinations(range(5), 2))
    hits = {"chosen": 0, "round": 0}
    for trial, way in itertools.product(range(60), hits):
        rng = np.random.default_rng(trial)
        strength, wins = rng.normal(0, 1.5, 5), np.zeros((5, 5))
        for number in range(12):
            one, other = next_pair(wins, rng) if way == "chosen" else rounds[number % len(rounds)]
            won = rng.random() < 1 / (1 + np.exp(strength[other] - strength[one]))
            wins[(one, other) if won else (other, one)] += 1
        hits[way] += int(posterior(wins)[0].argmax() == strength.argmax())
    assert hits["chosen"] > hits["round"]

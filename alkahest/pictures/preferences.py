"""An order of recipes from a person's answers to pairs of pictures, and how sure it is."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from alkahest.errors import AlgebraError, refuse_unknown_options, unknown
from alkahest.measure.text import lines_under, lines_under_html, percent

Array = npt.NDArray[np.float64]
ANSWERS = ("left", "right", "alike")
_SPREAD = 1.5  # standard deviation of strengths before anything was answered: one in 20 pairs is won 50 to 1
_DRAWS = 20_000
_INTERVAL = (5.0, 95.0)  # per cent of them
_SURE = 0.95  # of being the best, from which an order is decided
FEW = 12  # answers, below which no order is shown


@dataclass(frozen=True, repr=False)
class PreferenceOrder:
    """Recipes in a person's order: ``table`` with a row for each, ``answers`` how many, ``left`` how many times left.

    Columns of the table: ``recipe``, ``asked``, ``won``, ``lost``, ``alike``, ``strength`` (log odds against the mean)
    with its interval ``low`` to ``high`` (nine in ten), and ``best``, the probability of being the best.
    """

    table: pd.DataFrame  # a row for each recipe
    answers: int  # how many were given
    left: int  # how often the left picture won

    @property
    def best(self) -> str:
        """The recipe that is most probably the best."""
        return str(self.table.recipe[self.table.best.idxmax()])

    @property
    def is_decided(self) -> bool:
        """Whether one of them is the best with 95 %."""
        return bool(self.table.best.max() >= _SURE)

    def __repr__(self) -> str:
        lines = [
            f"{row.recipe}: won {row.won}, lost {row.lost}, alike {row.alike}; strength {row.strength:+.2f} "
            f"({row.low:+.2f} to {row.high:+.2f}), best with {percent(float(row.best), 0)}"
            for row in self.table.itertuples()
        ]
        return lines_under(self._title(), [*lines, *self._notes()])

    def _repr_html_(self) -> str:
        from alkahest.measure.measured_table import small_html

        title = f"<b>{html.escape(self._title())}</b>"
        return lines_under_html(title, self._notes()) + small_html(self.table, 3)

    def _title(self) -> str:
        sure = percent(float(self.table.best.max()), 0)
        if self.is_decided:
            return f"{self.best} is the best, with a probability of {sure} by {self.answers} answers"
        return f"undecided: {self.best} is the best with a probability of {sure} only, by {self.answers} answers"

    def _notes(self) -> list[str]:
        told = self.answers - int(self.table.alike.sum()) // 2
        if told >= FEW and not 0.2 <= self.left / told <= 0.8:
            return [f"{self.left} of {told} times the left one was taken: the side, more than the picture, decided"]
        return []


@refuse_unknown_options
def preference_order(answers: pd.DataFrame) -> PreferenceOrder:
    """An order of recipes from answers to pairs: who was preferred, how often, and how probably each is the best.

    Strengths are those of Bradley and Terry (1952), in which one is preferred to another with the odds exp(s - t);
    alike counts as half a win each (Glickman 1999). Before the first answer a strength is normal with a standard
    deviation of 1.5; after it the posterior is taken as normal around its mode (Laplace), and intervals and
    probabilities are of 20,000 draws of it.

    Parameters
    ----------
    answers : pandas.DataFrame
        A row a pair: ``left`` and ``right`` name the recipes, ``answer`` is ``left``, ``right`` or ``alike``.

    Returns
    -------
    PreferenceOrder

    Raises
    ------
    UnknownNameError
        For another answer or a missing column.
    AlgebraError
        For no answers, or a pair of one recipe.

    Examples
    --------
    >>> import pandas as pd
    >>> rows = [("k = 5", "k = 10", "left"), ("k = 5", "k = 20", "left"), ("k = 10", "k = 20", "alike")]
    >>> order = ak.preference_order(pd.DataFrame(rows, columns=["left", "right", "answer"]))
    """
    for name in ("left", "right", "answer"):
        if name not in answers.columns:
            raise unknown("preference_order", "no such column", name, list(answers.columns))
    if not len(answers):
        raise AlgebraError("preference_order", "there are no answers yet", expected="a row a pair")
    for answer in answers.answer:
        if answer not in ANSWERS:
            raise unknown("preference_order", "no such answer", str(answer), ANSWERS)
    if (same := answers.left == answers.right).any():
        raise AlgebraError("preference_order", "a pair is of two recipes", found=str(answers.left[same].iloc[0]))
    names = list(dict.fromkeys([*answers.left, *answers.right]))
    wins = wins_of(answers, names)
    strength, spread = posterior(wins)
    draws = draws_of(strength, spread)
    low, high = np.percentile(draws, _INTERVAL, axis=0)
    rows = pd.DataFrame({"recipe": names})
    rows["asked"] = [int(((answers.left == name) | (answers.right == name)).sum()) for name in names]
    for column, lefts, rights in (("won", "left", "right"), ("lost", "right", "left"), ("alike", "alike", "alike")):
        rows[column] = [
            int(((answers.left == name) & (answers.answer == lefts)).sum())
            + int(((answers.right == name) & (answers.answer == rights)).sum())
            for name in names
        ]
    rows = rows.assign(strength=strength, low=low, high=high, best=chances_of(draws))
    order = rows.sort_values("strength", ascending=False, ignore_index=True)
    return PreferenceOrder(order, len(answers), int((answers.answer == "left").sum()))


def wins_of(answers: pd.DataFrame, names: Sequence[str]) -> Array:
    """How often each of ``names`` (rows) was preferred to each other (columns); alike is half a win each."""
    number = {name: place for place, name in enumerate(names)}
    wins = np.zeros((len(names), len(names)))
    for left, right, answer in zip(answers.left, answers.right, answers.answer, strict=True):
        share = {"left": 1.0, "right": 0.0, "alike": 0.5}[answer]
        wins[number[left], number[right]] += share
        wins[number[right], number[left]] += 1 - share
    return wins


def posterior(wins: Array) -> tuple[Array, Array]:
    """Mode and covariance of the strengths after these wins, less their mean."""
    count = len(wins)
    games = wins + wins.T
    strength, precision = np.zeros(count), np.eye(count) / _SPREAD**2
    for _ in range(100):  # Newton on a concave function: a handful of steps
        chance = 1 / (1 + np.exp(strength[None, :] - strength[:, None]))
        slope = (wins - games * chance).sum(1) - strength / _SPREAD**2
        weight = games * chance * (1 - chance)
        precision = np.diag(weight.sum(1)) - weight + np.eye(count) / _SPREAD**2
        step = np.linalg.solve(precision, slope)
        strength = strength + step
        if np.abs(step).max() < 1e-10:
            break
    centred = np.eye(count) - 1 / count
    return centred @ strength, centred @ np.linalg.inv(precision) @ centred


def draws_of(strength: Array, spread: Array) -> Array:
    """Draws of the strengths [draws, recipes], the same for the same posterior."""
    values, vectors = np.linalg.eigh(spread)
    noise = np.random.default_rng(17).standard_normal((_DRAWS, len(strength)))
    found: Array = strength + (noise * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return found


def chances_of(draws: Array) -> Array:
    """How probably each recipe is the best, by draws of the strengths."""
    found: Array = np.bincount(draws.argmax(1), minlength=draws.shape[1]) / len(draws)
    return found


def next_pair(wins: Array, rng: np.random.Generator) -> tuple[int, int]:
    """The pair whose answer would tell most: uncertain in itself, of recipes that may be the best.

    Expected information about a pair's difference is about p (1 - p) times its variance; it counts as much as one of
    the two is likely to be the best. Among those within 5 % of the most, chance decides.
    """
    strength, spread = posterior(wins)
    best = chances_of(draws_of(strength, spread))
    worth: dict[tuple[int, int], float] = {}
    for one in range(len(wins)):
        for other in range(one):
            chance = 1 / (1 + math.exp(strength[other] - strength[one]))
            variance = spread[one, one] + spread[other, other] - 2 * spread[one, other]
            worth[one, other] = chance * (1 - chance) * variance * (0.05 + best[one] + best[other])
    most = max(worth.values())
    pairs = [pair for pair, value in worth.items() if value >= 0.95 * most]
    one, other = pairs[rng.integers(len(pairs))]
    return (one, other) if rng.random() < 0.5 else (other, one)


def strengths(answers: pd.DataFrame, names: Sequence[str]) -> Mapping[str, float]:
    """The strength of each of ``names``, 0 for one that was never shown."""
    strength, _ = posterior(wins_of(answers, names))
    return dict(zip(names, strength.tolist(), strict=True))

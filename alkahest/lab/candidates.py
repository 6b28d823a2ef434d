"""What a blind comparison compares: recipes that are given, or points that a search proposes from the answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pandas as pd

from alkahest.algebra.weights import Weights
from alkahest.engine.scalars import text_of
from alkahest.errors import AlgebraError, AlkahestError
from alkahest.lab.figure import strip
from alkahest.pictures.live import LiveModel
from alkahest.pictures.preferences import strengths
from alkahest.pictures.sampler import sample
from alkahest.pictures.search_space import Axis, Point, proposed_after, space_of, start_of
from alkahest.pictures.sweeps import SETTINGS, require_names

_BEGUN = 4  # candidates that a search starts with
_A_NEW_ONE = 3  # answers for each further one
_NOT = "panels.blind_comparison"


@dataclass(frozen=True)
class Candidate:
    """Something that draws: under a name, what it is made of, and the point or the expression that makes it so."""

    name: str
    recipe: str
    point: Point = field(default_factory=dict)
    expression: Weights | None = None


class Candidates:
    """Candidates of a live model; with ranges to search, more of them as answers come."""

    def __init__(
        self, live: LiveModel, made: Sequence[Candidate], space: Mapping[str, Axis], most: int, seed: int
    ) -> None:
        self.live, self._space, self._most, self._seed = live, space, most, seed
        self._known = {one.name: one for one in made}
        self._tries = 0
        self._dropped: dict[str, str] = {}  # name -> why

    def __getitem__(self, name: str) -> Candidate:
        return self._known[name]

    @property
    def names(self) -> list[str]:
        return list(self._known)

    @property
    def is_open(self) -> bool:
        """Whether more may come."""
        return bool(self._space)

    def grow(self, answers: pd.DataFrame) -> None:
        """As many candidates as these answers are worth, where there are ranges to search.

        AlkahestError where less than two are left to compare.
        """
        wanted = min(self._most, _BEGUN + len(answers) // _A_NEW_ONE) if self._space else 0
        for _ in range(4 * self._most):  # a proposal that is there already is no new candidate
            if len(self._known) >= wanted:
                break
            known = strengths(answers, self.names) if self._known else {}
            told = [(one.point, known[one.name]) for one in self._known.values()]
            self.add(self._rounded(proposed_after(self._space, told, self._seed + self._tries, self._most)))
            self._tries += 1
        if len(self._known) < 2:
            found = "; ".join(f"{name}: {why}" for name, why in self._dropped.items()) or "too narrow a range"
            raise AlkahestError(_NOT, "less than two can be drawn", found=found, fix="other values in over=")

    def add(self, point: Point) -> None:
        """A candidate at a point, unless it is there."""
        one = candidate_at(self.live, point)
        if one.name not in self._dropped:
            self._known.setdefault(one.name, one)

    def drop(self, name: str, why: str) -> None:
        """Leave out a candidate that cannot be drawn."""
        self._dropped[name] = why
        del self._known[name]

    def _rounded(self, point: Point) -> Point:
        """Four digits are enough, and then a name says exactly what is drawn."""
        found = dict(point)
        for name, value in point.items():
            if isinstance(value, float) and not self._space[name].choices:
                axis = self._space[name]
                found[name] = min(max(float(f"{value:.4g}"), axis.low), axis.high)
        return found

    def draw(self, name: str, prompt: str, seed: int, sampling: Mapping[str, Any]) -> bytes:
        """A picture of a candidate as a PNG file. The live model is left there."""
        one = self._known[name]
        settings = {**sampling, **{key: value for key, value in one.point.items() if key in SETTINGS}}
        if one.expression is not None:
            self.live.become(one.expression)
        else:
            self.live.set({key: value for key, value in one.point.items() if key not in SETTINGS})
        return strip(sample(self.live, [prompt], seed=seed, **settings).images)


def candidate_at(live: LiveModel, point: Point) -> Candidate:
    """A point of a live model as a candidate."""
    point = {name: _plain(value) for name, value in point.items()}
    scalars = {name: value for name, value in point.items() if name in live.expression.params}
    rest = {name: value for name, value in point.items() if name not in scalars}
    recipe = live.expression.bind(**scalars).text() + (f" with {json.dumps(rest, sort_keys=True)}" if rest else "")
    name = ", ".join(f"{key} = {text_of(value) if isinstance(value, float) else value}" for key, value in point.items())
    return Candidate(name, recipe, point)


def candidates_of(
    what: LiveModel | Mapping[str, Weights],
    over: Mapping[str, Any] | None,
    most: int,
    seed: int,
    live: LiveModel,
) -> Candidates:
    """Candidates of recipes by name, or of a live model's points: every combination of lists, or what a search says.

    Lists beside a range are choices of the search. Raises AlkahestError for less than two.
    """
    if isinstance(what, Mapping):
        _require_two(what)
        return Candidates(live, [Candidate(name, one.text(), {}, one) for name, one in what.items()], {}, 0, seed)
    given = over or {}
    ranges = [name for name, values in given.items() if isinstance(values, tuple)]
    if not ranges:
        require_names(given, live.params, _NOT)
        points = [dict(zip(given, values, strict=True)) for values in product(*(list(one) for one in given.values()))]
        made = [candidate_at(live, point) for point in points]
        _require_two({one.name: one for one in made})
        return Candidates(live, made, {}, 0, seed)
    space = space_of(given, live.params, _NOT)
    start = start_of(space, live.params)
    return Candidates(live, [candidate_at(live, start)] if start else [], space, most, seed)


def _require_two(found: Mapping[str, Any]) -> None:
    if len(found) < 2:
        fix = "{'a': bridge + 1 * delta, 'b': bridge + 4 * delta}, or a LiveModel and over={'k': [1, 4]}"
        raise AlkahestError(_NOT, "at least two are compared", found=len(found), fix=fix)


def _plain(value: Any) -> Any:
    """A number of Python, where numpy gave one of its own."""
    return value.item() if hasattr(value, "item") else value


def require_weights_of(what: Mapping[str, Any]) -> None:
    """AlgebraError for what is no model."""
    for name, one in what.items():
        if not isinstance(one, Weights):
            raise AlgebraError(_NOT, f"{name} is no model", expected="bridge + k * delta", found=type(one).__name__)

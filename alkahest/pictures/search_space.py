"""What a search may move: ranges and choices for scalars and settings, and optuna's proposals for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alkahest.errors import AlkahestError, UnsupportedError
from alkahest.pictures.sweeps import require_names

_WHOLE = ("steps", "width", "height")
_STARTED = 5  # trials by chance before a model of the scores is asked; fewer, if few are wanted
_EXPECTED = "(low, high), (low, high, 'log') or a list of values"

Point = dict[str, Any]  # a value for every name


@dataclass(frozen=True)
class Axis:
    """The values that one name may take: a range, or some values."""

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    choices: tuple[Any, ...] = ()

    def holds(self, value: Any) -> bool:
        """Whether a search could propose this value."""
        return value in self.choices if self.choices else self.low <= float(value) <= self.high

    def distribution(self) -> Any:
        """The same for optuna."""
        from optuna import distributions as kinds

        if self.choices:
            return kinds.CategoricalDistribution(self.choices)
        if self.whole:
            return kinds.IntDistribution(int(self.low), int(self.high), log=self.log)
        return kinds.FloatDistribution(self.low, self.high, log=self.log)


def space_of(over: Mapping[str, Any], known: Mapping[str, float], operation: str) -> dict[str, Axis]:
    """The axes of ``over``: ``(low, high)``, ``(low, high, "log")``, or a list of values, by name.

    Raises UnknownNameError for what is neither in ``known`` nor a sampling setting, AlkahestError for what is no range.
    """
    if not over:
        raise AlkahestError(operation, "nothing to search over", expected=_EXPECTED, fix="over={'k': (0, 400)}")
    require_names(over, known, operation)
    return {name: _axis(name, given, operation) for name, given in over.items()}


def start_of(space: Mapping[str, Axis], params: Mapping[str, float]) -> Point:
    """The point where a model with these scalars stands; empty if a name is none of them, or it lies outside."""
    if all(name in params and axis.holds(params[name]) for name, axis in space.items()):
        return {name: params[name] for name in space}
    return {}


def _axis(name: str, given: Any, operation: str) -> Axis:
    if isinstance(given, list) and given:
        return Axis(choices=tuple(given))
    if isinstance(given, tuple) and len(given) in (2, 3) and all(_is_number(end) for end in given[:2]):
        low, high, *kind = given
        if low < high and kind in ([], ["log"]) and (low > 0 or not kind):
            return Axis(float(low), float(high), bool(kind), name in _WHOLE)
    raise AlkahestError(operation, f"the range of {name} is none", expected=_EXPECTED, found=repr(given))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def study_of(space: Mapping[str, Axis], most: bool, seed: int, trials: int, at_once: int = 1) -> Any:
    """An optuna study in memory whose proposals follow from the seed and from what it is told.

    The sampler is a tree-structured Parzen estimator over all names together (Bergstra et al. 2011; Falkner et al.
    2018), after a fifth of the trials, and five at most, by chance.
    """
    try:
        import optuna
    except ImportError:
        raise UnsupportedError("search", "optuna is not installed", fix="pip install optuna") from None
    by_chance = max(1, min(_STARTED, trials // 5))
    sampler = optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=by_chance, multivariate=len(space) > 1, constant_liar=at_once > 1
    )
    talkative = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells of every study that it makes
    try:
        return optuna.create_study(direction="maximize" if most else "minimize", sampler=sampler)
    finally:
        optuna.logging.set_verbosity(talkative)


def propose(study: Any, space: Mapping[str, Axis]) -> tuple[Any, Point]:
    """A trial, to be told its score, and its point."""
    trial = study.ask({name: axis.distribution() for name, axis in space.items()})
    return trial, dict(trial.params)


def proposed_after(space: Mapping[str, Axis], told: Sequence[tuple[Point, float]], seed: int, trials: int) -> Point:
    """The next point once these points have these scores, more being better; scores may change from call to call."""
    import optuna

    study = study_of(space, True, seed + len(told), trials)
    kinds = {name: axis.distribution() for name, axis in space.items()}
    for point, score in told:
        study.add_trial(optuna.trial.create_trial(params=dict(point), distributions=kinds, value=score))
    return propose(study, space)[1]


def point_text(point: Mapping[str, Any]) -> str:
    """A point in words, as titles and progress name it."""
    return ", ".join(
        f"{name} = {value:.4g}" if isinstance(value, float) else f"{name} = {value}" for name, value in point.items()
    )

"""A search over named scalars and sampling settings for the best score: seeded, resumable, on any executor."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from alkahest.engine.events import Event, result_of
from alkahest.errors import AlkahestError, refuse_unknown_options
from alkahest.files.cache import cache_folder
from alkahest.measure.text import lines_under, lines_under_html
from alkahest.pictures.evidence import PictureOptions, batch_of, given_set
from alkahest.pictures.live import LiveModel
from alkahest.pictures.scores import FLOW_LOSS, Drawn, FlowLoss, Outcome, Score, mean_of, require_goal, require_settings
from alkahest.pictures.search_space import Axis, Point, point_text, propose, space_of, start_of, study_of
from alkahest.pictures.sweeps import require_live, settings_given

_SURE = 2.0  # standard errors of a paired difference, beyond which a point is worse than the best


@dataclass(frozen=True)
class Trial:
    """A point, and a number for each picture there, or why there is none."""

    point: Point
    outcome: Outcome

    @property
    def score(self) -> float:
        return mean_of(self.outcome)


@dataclass(frozen=True)
class TrialEvent(Event):
    """A trial that is done, as a search goes on."""

    trial: Trial | None = None


@dataclass(frozen=True, repr=False)
class Search:
    """What a search found: ``best``, a value for each name, and a ``table`` with a row a trial, best first.

    Its columns: the names, ``score``, ``behind`` (how much worse than the best, by the same pictures),
    ``behind_error`` (the standard error of that) and ``error`` (why there is no score).
    """

    table: pd.DataFrame  # a row for each trial, best first
    names: tuple[str, ...]  # what was searched over
    best: Point  # name -> value, for ``live.set``
    score: str  # what was compared
    goal: str  # least or most
    pictures: int  # looked at in each trial
    start: float  # the score where the model stood; NaN if it lay outside
    notes: tuple[str, ...] = ()  # what was odd about the pictures

    def __repr__(self) -> str:
        return lines_under(self._title(), self._lines())

    def _repr_html_(self) -> str:
        from alkahest.measure.measured_table import small_html

        title = f"<b>{html.escape(self._title())}</b>"
        return lines_under_html(title, self._lines()) + small_html(self.table.head(12))

    @property
    def as_good(self) -> pd.DataFrame:
        """The other trials that these pictures do not tell from the best."""
        rest = self.table.iloc[1:]
        return rest[rest.behind <= _SURE * rest.behind_error]

    def _title(self) -> str:
        known = int(self.table.score.notna().sum())
        best = self.table.score.iloc[0]
        return f"{point_text(self.best)}: {self.score} {best:.4g}, the {self.goal} of {known} trials"

    def _lines(self) -> list[str]:
        lines = [] if math.isnan(self.start) else [f"where the model stood: {self.start:.4g}"]
        if self.pictures < 2:
            lines.append("by one number a trial: nothing says how sure this is")
        elif len(alike := self.as_good):
            spans = [_span(name, [self.best[name], *alike[name]]) for name in self.names]
            lines.append(
                f"undecided: {len(alike)} others are as good by these {self.pictures} pictures: {', '.join(spans)}"
            )
        else:
            lines.append(
                f"every other trial is worse by more than {_SURE:g} standard errors ({self.pictures} pictures)"
            )
        lines.append("the best of many by the same pictures flatters itself: look at it with other prompts and seeds")
        if self.score == FLOW_LOSS:
            lines.append("a loss is least before a sampler has enough: with guidance, up to twice that k draws best")
        if failed := int(self.table.score.isna().sum()):
            lines.append(f"{failed} trials gave no number, such as: {self.table.error.dropna().iloc[0]}")
        return [*lines, *self.notes]


@refuse_unknown_options
def search(
    live: LiveModel,
    prompts: str | Sequence[str] | None = None,
    *,
    over: Mapping[str, Any],
    score: str | Callable[[list[Any]], Any] = FLOW_LOSS,
    goal: str | None = None,
    trials: int = 24,
    at_once: int | None = None,
    seed: int = 0,
    pictures: Any = None,
    seeds: Sequence[int] = (0,),
    executor: Executor | None = None,
    folder: str | Path | None = None,
    batch: int = 4,
    steps: int | None = None,
    cfg: float | None = None,
    shift: float | None = None,
    schedule: str | None = None,
    cfg_normalization: float | None = None,
    negative_prompt: str | None = None,
    width: int | None = None,
    height: int | None = None,
) -> Search:
    """The best values that a search finds for named scalars and sampling settings, and how sure that is.

    The first trial is where the model stands, if that lies inside; the others are optuna's. The same call proposes the
    same, whichever executor; what was drawn or measured before is remembered, so that a search that was stopped goes
    on. The live model is left as it was. For answers of a person to pairs of pictures see `panels.blind_comparison`.

    Parameters
    ----------
    live : LiveModel
        The model, with the named scalars that are moved.
    prompts : str or list of str, optional
        What each trial draws, or the captions of ``pictures``.
    over : mapping of str to tuple or list
        A range ``(low, high)`` or ``(low, high, "log")``, or a list of values, for each name.
    score : str or callable, default "flow_loss"
        The loss of ``pictures``; a measure of `picture_measures`, whose means over drawn pictures are compared; or a
        function of the list of pictures of a trial: a number, or one for each picture.
    goal : str, optional
        ``"least"`` or ``"most"``.
    trials : int, default 24
        How many settings are tried, the first included.
    at_once : int, optional
        How many are asked for together: 1, or 4 with an ``executor``.
    seed : int, default 0
        Of the search.
    pictures : list of pictures or folder, optional
        For ``flow_loss``: a folder with captions, or pictures whose captions are the prompts.
    seeds : list of int, default (0,)
        Of the pictures: each prompt is drawn once with each.
    executor : concurrent.futures.Executor, optional
        Where pictures are drawn, by default here, one after the other.
    folder : str or path, optional
        For the pictures, by default in the user's cache.
    batch : int, default 4
        As in `sweep`.
    steps : int, optional
        Steps of each picture, by default those of `sample`, as for the rest.
    cfg : float, optional
        Guidance; 1 is none.
    shift : float, optional
        Of the noise levels.
    schedule : str, optional
        ``diffusers`` or ComfyUI's ``simple``.
    cfg_normalization : float, optional
        Most that guidance may make a prediction's norm, in norms of the unguided one; 0 is no limit.
    negative_prompt : str, optional
        Works above cfg 1 only.
    width, height : int, optional
        Settings that stay, by default those of `sample`.

    Returns
    -------
    Search
        ``best`` is for ``live.set``.

    Raises
    ------
    UnknownNameError
        For other names.
    AlkahestError
        For a score without a goal or a range that is none.
    UnsupportedError
        Without optuna.

    Examples
    --------
    >>> found = ak.search(live, prompts, over={"k": (0, 10)}, pictures=pictures, trials=3)
    >>> found = ak.search(live, prompts[0], over={"k": (1, 10, "log")}, score="grid", goal="least", trials=2, steps=4)
    >>> report = live.set(found.best)
    """
    settings = settings_given(steps, cfg, shift, schedule, cfg_normalization, negative_prompt, width, height)
    events = stream_search(
        live,
        prompts,
        over,
        score,
        goal,
        trials=trials,
        at_once=at_once,
        seed=seed,
        pictures=pictures,
        seeds=seeds,
        executor=executor,
        folder=folder,
        batch=batch,
        settings=settings,
    )
    found: Search = result_of(events, "search")
    return found


def stream_search(
    live: LiveModel,
    prompts: str | Sequence[str] | None,
    over: Mapping[str, Any],
    score: str | Callable[[list[Any]], Any] = FLOW_LOSS,
    goal: str | None = None,
    *,
    trials: int = 24,
    at_once: int | None = None,
    seed: int = 0,
    pictures: Any = None,
    seeds: Sequence[int] = (0,),
    executor: Executor | None = None,
    folder: str | Path | None = None,
    batch: int = 4,
    settings: Mapping[str, Any] | None = None,
) -> Iterator[Event]:
    """`search` as a generator of events, one for each trial."""
    require_live(live, "search")
    together = (1 if executor is None else 4) if at_once is None else at_once
    for name, number in (("trials", trials), ("at_once", together), ("batch", batch)):
        if number < 1:
            raise AlkahestError("search", f"{name} must be at least 1", found=number)
    most = require_goal(score, goal)
    space = space_of(over, live.params, "search")
    require_settings(score, settings or {}, list(over))
    texts = [prompts] if isinstance(prompts, str) else list(prompts or ())
    scored: Score
    notes: list[str] = []
    if isinstance(score, str) and score == FLOW_LOSS:
        if folder is not None or tuple(seeds) != (0,):
            fix = "leave out seeds= and folder=, or another score"
            raise AlkahestError("search", "flow loss draws nothing: seeds and folder would mean nothing", fix=fix)
        scored, notes = _flow_loss(live, texts, pictures, batch, seed, settings or {})
    else:
        if not texts or not len(seeds) or pictures is not None:
            fix = "prompts, and no pictures=, which flow_loss is for"
            raise AlkahestError("search", "this score is of pictures that are drawn by prompts", fix=fix)
        place = Path(folder) if folder is not None else cache_folder() / "sweeps"
        scored = Drawn(score, tuple(texts), tuple(map(int, seeds)), settings or {}, place, batch)
    return _events(live, scored, space, most, (trials, together, seed), executor, tuple(notes))


def _flow_loss(
    live: LiveModel, texts: list[str], pictures: Any, batch: int, seed: int, size: Mapping[str, Any]
) -> tuple[FlowLoss, list[str]]:
    if pictures is None:
        fix = "pictures='folder with captions', or pictures=[...] with prompts=[...] in their order"
        raise AlkahestError("search", "flow loss is of pictures that are there", fix=fix)
    options = PictureOptions(prompts=texts or None, pictures=pictures, seed=seed, batch=batch, **size)
    examples, _, notes = given_set(live.pipe, "pictures", options, "search")
    return FlowLoss(examples, batch_of(live.pipe, options)), notes


def _events(
    live: LiveModel,
    score: Score,
    space: Mapping[str, Axis],
    most: bool,
    how: tuple[int, int, int],
    executor: Executor | None,
    notes: tuple[str, ...],
) -> Iterator[Event]:
    trials, together, seed = how
    study, before = study_of(space, most, seed, trials, together), live.params
    done: list[Trial] = []
    if start := start_of(space, before):
        study.enqueue_trial(start)
    try:
        while len(done) < trials:
            asked = [propose(study, space) for _ in range(min(together, trials - len(done)))]
            outcomes = score.of(live, [point for _, point in asked], executor)
            for (told, point), outcome in zip(asked, outcomes, strict=True):
                one = Trial(point, _finite(outcome))
                _tell(study, told, one.score)
                done.append(one)
                yield TrialEvent(len(done), trials, f"{point_text(point)}: {one.score:.4g}", trial=one)
    finally:
        live.set(before)
    yield Event(trials, trials, "done", _found(done, score.name, most, bool(start), notes))


def _finite(outcome: Outcome) -> Outcome:
    """Why there is no number, where one of them is none."""
    if isinstance(outcome, str) or math.isfinite(mean_of(outcome)):
        return outcome
    return f"the score is {mean_of(outcome):g}"


def _tell(study: Any, told: Any, value: float) -> None:
    from optuna.trial import TrialState

    if math.isfinite(value):
        study.tell(told, value)
    else:
        study.tell(told, state=TrialState.FAIL)


def _found(done: Sequence[Trial], score: str, most: bool, started: bool, notes: tuple[str, ...]) -> Search:
    order = sorted(done, key=lambda one: _rank(one.score, most))
    best = order[0]
    if isinstance(best.outcome, str):
        raise AlkahestError("search", f"none of {len(done)} trials gave a number", found=best.outcome)
    rows = []
    for one in order:
        behind, error = _behind(one.outcome, best.outcome, most)
        why = one.outcome if isinstance(one.outcome, str) else None
        rows.append({**one.point, "score": one.score, "behind": behind, "behind_error": error, "error": why})
    return Search(
        pd.DataFrame(rows),
        tuple(best.point),
        best.point,
        score,
        "most" if most else "least",
        len(best.outcome),
        done[0].score if started else math.nan,
        notes,
    )


def _rank(score: float, most: bool) -> float:
    return (-score if most else score) if math.isfinite(score) else math.inf


def _behind(outcome: Outcome, best: Outcome, most: bool) -> tuple[float, float]:
    """How much worse than the best, picture by picture, and the standard error of that mean."""
    if isinstance(outcome, str) or isinstance(best, str):
        return math.nan, math.nan
    worse = (best - outcome) if most else (outcome - best)
    count = len(worse)
    return float(worse.mean()), float(worse.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan


def _span(name: str, values: Sequence[Any]) -> str:
    if all(isinstance(value, (int, float)) for value in values):
        return f"{name} from {min(values):.4g} to {max(values):.4g}"
    return f"{name} in {', '.join(dict.fromkeys(map(str, values)))}"

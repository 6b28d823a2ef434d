"""What a search goes by: flow loss, a measure of pictures, or a function of them; a number for each picture."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from alkahest.engine.workers import spread
from alkahest.errors import AlkahestError, unknown
from alkahest.files import cache
from alkahest.pictures.evaluation import EvaluationSet, errors, predictions
from alkahest.pictures.live import LiveModel
from alkahest.pictures.search_space import Point
from alkahest.pictures.sweeps import SETTINGS, Cell, cells_of, draw_cells, identity_of

if TYPE_CHECKING:
    from PIL.Image import Image

Array = npt.NDArray[np.float64]
FLOW_LOSS = "flow_loss"
# Measures of `ak.picture_measures`; a person says which way is better.
MEASURES = ("lag1", "high_freq", "grid", "contrast")
Outcome = Array | str  # a number for each picture, or why there is none


class Score(Protocol):
    """Numbers of points, each by the same pictures; the name stands in tables."""

    @property
    def name(self) -> str: ...

    def of(self, live: LiveModel, points: Sequence[Point], executor: Executor | None) -> Iterator[Outcome]:
        """An outcome for each point, in their order."""


@dataclass(frozen=True)
class FlowLoss:
    """The mean square error of what a model says of given pictures with captions, mixed with noise."""

    examples: EvaluationSet
    batch: int
    name: str = FLOW_LOSS

    def of(self, live: LiveModel, points: Sequence[Point], executor: Executor | None) -> Iterator[Outcome]:
        made_of = [cache.KINDS["scores"].format(), identity_of(live), str(live.pipe.transformer.dtype)]
        keys = [self._key(made_of, {**live.params, **point}) for point in points]
        known = {number: _recall(key, len(self.examples)) for number, key in enumerate(keys)}
        todo = {number: (live, points[number], self.examples, self.batch) for number in known if known[number] is None}
        found: dict[int, Outcome] = {number: one for number, one in known.items() if one is not None}
        calls = ((number, losses(*call)) for number, call in todo.items())
        for number, outcome in calls if executor is None else spread(executor, losses, todo):
            found[number] = outcome
            if not isinstance(outcome, str):  # what failed is tried again
                cache.store("scores", keys[number], outcome.tolist())
        yield from (found[number] for number in range(len(points)))

    def _key(self, made_of: Sequence[Any], params: Mapping[str, float]) -> str:
        asked = [params, self.examples.seed, self.examples.levels, self.examples.name]
        digest = self._pictures.copy()
        digest.update(json.dumps([made_of, asked], sort_keys=True).encode())
        return str(digest.hexdigest())

    @cached_property
    def _pictures(self) -> Any:
        """A hash of the pictures and captions, which are the same at every point."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.examples.latents, *self.examples.captions):
            digest.update(part.float().cpu().contiguous().numpy().tobytes())
        return digest


def losses(live: LiveModel, point: Point, examples: EvaluationSet, batch: int) -> Outcome:
    """Mean square errors of a model at a point, one a picture. Runs in any process."""
    with live.lock:
        try:
            live.set(point)
            return errors(predictions(live.pipe, examples, batch, "search"), examples.target())
        except (AlkahestError, ValueError, RuntimeError) as error:
            return str(error).replace("\n", "; ")


def _recall(key: str, count: int) -> Array | None:
    known = cache.load("scores", key)
    if not isinstance(known, list) or len(known) != count:
        return None
    try:
        found = np.array(known, np.float64)
    except (TypeError, ValueError):
        return None
    return found if found.shape == (count,) else None


@dataclass(frozen=True)
class Drawn:
    """A number for each drawn picture: one of its measures, or what a function of all pictures of a point says."""

    judge: str | Callable[[list[Image]], Any]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    folder: Path
    batch: int

    @property
    def name(self) -> str:
        return self.judge if isinstance(self.judge, str) else getattr(self.judge, "__name__", "score")

    def of(self, live: LiveModel, points: Sequence[Point], executor: Executor | None) -> Iterator[Outcome]:
        places = [self._cells(live, point) for point in points]
        every = {cell.path: cell for cells in places for cell in cells}
        records = {cell.path: record for cell, record in draw_cells(live, list(every.values()), executor, self.batch)}
        yield from (self._outcome([records[cell.path] for cell in cells]) for cells in places)

    def _cells(self, live: LiveModel, point: Point) -> list[Cell]:
        fixed = {**self.settings, **point}
        return cells_of(live, list(self.prompts), {}, self.seeds, fixed, self.folder, "search")

    def _outcome(self, records: Sequence[Mapping[str, Any]]) -> Outcome:
        if failed := [record["error"] for record in records if record["error"]]:
            return f"{len(failed)} of {len(records)} pictures failed: {failed[0]}"
        if isinstance(self.judge, str):
            return np.array([record[self.judge] for record in records], np.float64)
        said = np.atleast_1d(np.asarray(self.judge([_opened(record["path"]) for record in records]), np.float64))
        if said.shape not in ((1,), (len(records),)):
            raise AlkahestError(
                "search",
                "a score is one number, or one for each picture",
                expected=f"a number, or {len(records)} of them",
                found=f"an array of shape {said.shape}",
            )
        return said


def _opened(path: str) -> Image:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def require_goal(score: Any, goal: str | None) -> bool:
    """Whether more is better. AlkahestError where nobody can know it, or for another word than least and most."""
    if score == FLOW_LOSS:
        if goal not in (None, "least"):
            raise AlkahestError("search", "of a loss less is better", found=f"goal={goal!r}", fix="leave goal out")
        return False
    if not callable(score) and score not in MEASURES:
        raise unknown("search", "no such score", str(score), [FLOW_LOSS, *MEASURES])
    if goal not in ("least", "most"):
        raise AlkahestError(
            "search",
            "which is better of this score?",
            expected="'least' or 'most'",
            found=repr(goal),
            fix="goal='most'",
        )
    return goal == "most"


def require_settings(score: Any, given: Mapping[str, Any], over: Sequence[str]) -> None:
    """AlkahestError for what would mean nothing to a loss, which draws no pictures; they have a size, though."""
    idle = sorted(({*given, *over} & set(SETTINGS)) - ({"width", "height"} & set(given)))
    if score == FLOW_LOSS and idle:
        raise AlkahestError(
            "search",
            f"flow loss draws nothing: {', '.join(idle)} would mean nothing",
            fix="leave out, or another score",
        )


def mean_of(outcome: Outcome) -> float:
    """The score of a point; NaN if it has none."""
    return math.nan if isinstance(outcome, str) else float(np.mean(outcome))

"""The loss of a bridge over k, on pictures of the new thing and on ordinary ones: its minimum, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from alkahest.engine.events import Event

if TYPE_CHECKING:
    import pandas

Array = npt.NDArray[np.float64]
_RESAMPLED = 1000  # bootstrap samples of the pictures
_INTERVAL = (5.0, 95.0)  # per cent of them
_LEAST = 4  # pictures below which resampling says nothing
_OCTAVES = 14  # how far the grid goes up before it says that there is no minimum within reach


@dataclass(frozen=True)
class LossCurve:
    """Losses by k and picture: ``new`` [k, pictures] of the new thing, ``rest`` [k, pictures] of everything else.

    ``along`` is how much of what the delta does to predictions on its own base it does here, at each k: 1 is as much.
    ``variant``, ``uncaptioned`` and ``base`` are the new thing's losses [pictures] by the variant, by the variant
    without captions, and by its base.
    """

    ks: Array
    new: Array
    rest: Array
    along: Array
    variant: Array
    uncaptioned: Array
    base: Array
    seed: int = 0

    @cached_property
    def table(self) -> pandas.DataFrame:
        """A row for each k: mean losses of both sets, what the new one gained and the rest lost since k = 0."""
        import pandas as pd

        new, rest = self.new.mean(1), self.rest.mean(1)
        columns = {"k": self.ks, "new": new, "rest": rest, "gained": new[0] - new, "lost": rest - rest[0]}
        return pd.DataFrame({**columns, "along": self.along})

    @cached_property
    def minimum(self) -> float:
        """The k at which the new thing's loss is least; 0 if nothing is less than without the delta."""
        return float(_minima(self.ks, self.new.mean(1)[None])[0])

    @cached_property
    def resampled(self) -> tuple[Array, Array]:
        """Minima, and the share of the loss gained there, over resamples of the pictures."""
        rng = np.random.default_rng([self.seed, 17])
        count = self.new.shape[1]
        means = self.new[:, rng.integers(count, size=(_RESAMPLED, count))].mean(2).T
        return _minima(self.ks, means), 1 - means.min(1) / means[:, 0]

    @property
    def interval(self) -> tuple[float, float]:
        """Where nine of ten resamples have their minimum, widened for few pictures; no limit below four."""
        count = self.new.shape[1]
        if count < _LEAST:
            return 0.0, math.inf
        low, high = np.percentile(self.resampled[0], _INTERVAL)
        # A bootstrap of few is too narrow: by the spread's own bias, and by what Student's t has over the normal.
        wider = math.sqrt(count / (count - 1)) * (1 + 1 / (count - 1))
        return max(0.0, self.minimum - wider * (self.minimum - float(low))), self.minimum + wider * (
            float(high) - self.minimum
        )

    @property
    def gain(self) -> tuple[float, float, float]:
        """The share of the new thing's loss that the delta takes away at the minimum, and its interval."""
        means = self.new.mean(1)
        low, high = np.percentile(self.resampled[1], _INTERVAL)
        return float(1 - means.min() / means[0]), float(low), float(high)

    @property
    def gap(self) -> float:
        """How much more the new thing's loss is without the delta than by the variant."""
        return float(self.new[0].mean() - self.variant.mean())

    @property
    def closed(self) -> float:
        """How much of `gap` the delta closes at the minimum; infinite where the variant is no better to begin with."""
        return float(self.new[0].mean() - self.new.mean(1).min()) / self.gap if self.gap > 0 else math.inf

    def surely_less(self, one: Array, other: Array) -> bool:
        """Whether nine of ten resamples have a lower mean of ``one`` than of ``other``, picture by picture."""
        rng = np.random.default_rng([self.seed, 19])
        difference = (one - other)[rng.integers(len(one), size=(_RESAMPLED, len(one)))].mean(1)
        return float(np.percentile(difference, _INTERVAL[1])) < 0

    def at(self, column: str, k: float) -> float:
        """A column of `table` between the k that were measured."""
        return float(np.interp(k, self.ks, self.table[column]))


def _minima(ks: Array, means: Array) -> Array:
    """Where each row of losses is least: by a parabola through the least and its neighbours, in k."""
    found = np.empty(len(means))
    for number, losses in enumerate(means):
        n = int(losses.argmin())
        if n in (0, len(ks) - 1):
            found[number] = ks[n]
            continue
        (a, b, c), (x, y, z) = ks[n - 1 : n + 2], losses[n - 1 : n + 2]
        left, right = (b - a) * (y - z), (b - c) * (y - x)
        down = left - right
        k = b if down == 0 else b - ((b - a) * left - (b - c) * right) / (2 * down)
        found[number] = min(max(k, a), c)
    return found


def walk_over_k(
    evaluate: Callable[[float], Iterator[Event]], start: float, least: float, total: int
) -> Iterator[Event]:
    """Evaluate at 0, then upward from ``start`` by doubling until the loss rises again, then round the minimum.

    ``evaluate(k)`` is a generator whose result is (losses of the new thing, anything else by name); the result is a
    dict of k to that. ``least`` is the smallest k that is looked at.
    """
    known: dict[float, Any] = {}

    def loss(k: float) -> float:
        return float(known[k][0].mean())

    def visit(k: float) -> Iterator[Event]:
        if k not in known:
            for event in evaluate(k):
                known[k] = event.result
                yield Event(min(total - 1, len(known)), total, f"k = {k:.4g}")

    yield from visit(0.0)
    yield from visit(start)
    yield from visit(2 * start)
    k = 2 * start
    for _ in range(_OCTAVES):
        if loss(k) > min(map(loss, known)) * 1.02 and min(known, key=loss) <= k / 2:
            break
        k *= 2
        yield from visit(k)
    k = start
    while min(known, key=loss) <= k and k > least and loss(k) > loss(0.0) * 0.999:
        k /= 4
        yield from visit(k)
    for _ in range(2):
        yield from _refine(visit, known, loss)
    yield Event(total, total, "done", dict(sorted(known.items())))


def _refine(
    visit: Callable[[float], Iterator[Event]], known: dict[float, Any], loss: Callable[[float], float]
) -> Iterator[Event]:
    """Halve the steps to both sides of the least loss."""
    ks: Sequence[float] = sorted(known)
    n = ks.index(min(ks, key=loss))
    for a, b in ((n - 1, n), (n, n + 1)):
        if a >= 0 and b < len(ks):
            low, high = ks[a], ks[b]
            yield from visit(math.sqrt(low * high) if low > 0 else high / 2)

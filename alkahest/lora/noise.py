"""How much of a delta is rounding of the file it was taken from, and how far the singular values of that reach."""

from __future__ import annotations

import math
from dataclasses import dataclass

from alkahest.engine.evaluate import evaluate
from alkahest.engine.readable import Workspace
from alkahest.engine.terms import Minus, Source, Term
from alkahest.measure.rounding import ulp
from alkahest.measure.table import unit_of, without_factor
from alkahest.measure.tally import sum_of_squares

_MARGIN = 1.02  # the largest singular value of a finite matrix of noise strays by about this
_SAMPLES, _SAMPLE = 16, 1 << 16  # stretches of a tensor from which its mean ulp squared is taken, and their length


@dataclass(frozen=True)
class Noise:
    """``share`` of a delta's energy, at most 1, and ``edge``, the largest singular value that it makes; NaN if
    unknown.
    """

    share: float = math.nan
    edge: float = math.nan


def noise_of(term: Term, shape: tuple[int, int], squares: float, changed: float, workspace: Workspace) -> Noise:
    """The rounding noise in ``factor * (variant - base)``, where both are stored numbers.

    An entry of the variant is off by ulp squared / 12 in the mean, or by no more than what is there, the share
    ``changed`` of ulp squared; a base in a coarser format may add its own, as in `file_noise`. Noise of that
    variance has no singular value much above ``sqrt(variance) * (sqrt(m) + sqrt(n))`` (Marchenko and Pastur 1967).
    """
    factor, inner = without_factor(term)
    if not (isinstance(inner, Minus) and isinstance(inner.left, Source) and isinstance(inner.right, Source)):
        return Noise()
    steps = [_mean_square_ulp(side, math.prod(shape), workspace) for side in (inner.left, inner.right)]
    if None in steps:
        return Noise()
    least, hidden = (factor**2 * (step or 0.0) * min(1 / 12, changed) for step in steps)
    rows, columns = shape
    # A change smaller than that noise was made from the base as it is stored.
    coarser = hidden > 4 * least and hidden * rows * columns < 1.5 * squares
    variance = least + (hidden if coarser else 0.0)
    share = min(1.0, variance * rows * columns / squares)
    return Noise(share, _MARGIN * math.sqrt(variance) * (math.sqrt(rows) + math.sqrt(columns)))


def _mean_square_ulp(source: Source, elements: int, workspace: Workspace) -> float | None:
    unit = unit_of(source)
    if unit is None:
        return None
    count = min(elements, _SAMPLE)
    starts = {(elements - count) * number // (_SAMPLES - 1) for number in range(_SAMPLES)}
    total = 0.0
    for start in starts:
        with workspace.block(count) as values:
            evaluate(source, start, start + count, values, workspace)
            total += sum_of_squares(ulp(values, *unit).flatten())
    return total / (len(starts) * count)

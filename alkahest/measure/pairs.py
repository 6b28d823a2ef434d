"""Several deltas side by side: do they push the same weights the same way, and will they fight when both are added?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alkahest.algebra.deltas import Delta
from alkahest.algebra.expression import require_same
from alkahest.engine.evaluate import why_nonfinite
from alkahest.engine.events import Event, result_of
from alkahest.engine.options import Options
from alkahest.engine.readable import Workspace
from alkahest.engine.scalars import Rules
from alkahest.engine.terms import Term
from alkahest.engine.workers import BLOCK, Run
from alkahest.errors import AlgebraError, refuse_unknown_options, unknown
from alkahest.measure.remembered import Kind, stream_table
from alkahest.measure.spectrum import matrix_of, randomised_svd
from alkahest.measure.table import names_of
from alkahest.measure.tally import sum_of_squares
from alkahest.model.families import Family

if TYPE_CHECKING:
    import pandas

# Column -> what it is, for two deltas a and b of one tensor, U and V their leading singular vectors, s their values.
COMPARISON = {
    "first": "name of a",
    "second": "name of b",
    "first_norm": "|a|",
    "second_norm": "|b|",
    "cosine": "of the angle between a and b: 1 the same direction, 0 independent, -1 opposite",
    "sign_agreement": "share of elements that both change in the same direction, of those that both change; "
    "0.5 is chance",
    "left_overlap": "|Ua^T Ub|^2 / rank: how much of one's output directions the other uses too, 0 to 1",
    "right_overlap": "|Va^T Vb|^2 / rank: the same of input directions",
    "interference": "|(U^T U - I) S (V^T V - I)|_1 / sum(S) with U = [Ua Ub] and so on: 0 if the two do not meet. The "
    "singular task interference of Gargiulo et al. 2025 (arXiv:2412.00081), here relative to the singular values",
}

KIND = Kind("compare", 1, COMPARISON, words=("first", "second"), packages=("torch",))


@refuse_unknown_options
def compare(
    deltas: Mapping[str, Delta], rank: int = 16, seed: int = 0, *, device: str = "cpu", threads: int | None = None
) -> pandas.DataFrame:
    """Compare deltas two by two: a DataFrame with a row for each tensor and pair.

    Parameters
    ----------
    deltas : mapping of str to Delta
        At least two, by the names that the table gives them.
    rank : int, default 16
        How many singular directions of each delta are compared; tensors that are no matrices have norms, cosine and
        signs only.
    seed : int, default 0
        Of the randomised decomposition.
    device : str, default "cpu"
        What works on it.
    threads : int, optional
        How many, by default all cores.

    Returns
    -------
    pandas.DataFrame
        `COMPARISON` of `alkahest.measure.pairs` says what its columns are.

    Raises
    ------
    AlgebraError
        For fewer than two deltas, or a rank below 1.
    MismatchError
        If tensors do not fit.
    NonFiniteError
        For NaN and infinity.

    Notes
    -----
    Every delta of one tensor is in memory at once, 160 MB each in the 6-billion model.

    Examples
    --------
    >>> pairs = ak.compare({"variant": variant - base, "other": other - base})
    >>> cosines = ak.comparison_matrix(pairs, "cosine")
    """
    table: pandas.DataFrame = result_of(stream_compare(deltas, rank, seed, device=device, threads=threads), "compare")
    return table


@refuse_unknown_options
def stream_compare(
    deltas: Mapping[str, Delta], rank: int = 16, seed: int = 0, *, device: str = "cpu", threads: int | None = None
) -> Iterator[Event]:
    """`compare` as a generator of events."""
    run = Run(Options(device=device, threads=threads).require("compare"))
    wrong = next((name for name, delta in deltas.items() if not isinstance(delta, Delta)), None)
    if wrong is not None or len(deltas) < 2:
        raise AlgebraError(
            "compare",
            "two or more deltas are needed",
            found=f"{len(deltas)}" if wrong is None else f"{wrong}: {type(deltas[wrong]).__name__}",
            fix='ak.compare({"a": variant_a - base_a, "b": variant_b - base_b})',
        )
    if rank < 1:
        raise AlgebraError("compare", "at least one singular direction", found=rank)
    first = next(iter(deltas.values()))
    for other in deltas.values():
        require_same("compare", first, other)
    settings = [list(deltas), rank, seed]
    return stream_table(KIND, list(deltas.values()), settings, run, lambda: _tasks(deltas, rank, seed), about=None)


def _tasks(deltas: Mapping[str, Delta], rank: int, seed: int) -> list[_Task]:
    rules, first = Rules(), next(iter(deltas.values()))
    return [
        _Task(
            key, first.family, shape, {name: delta.at(key, rules) for name, delta in deltas.items()}, rank, seed, number
        )
        for number, (key, shape) in enumerate(first.shapes.items())
    ]


@refuse_unknown_options
def comparison_matrix(pairs: pandas.DataFrame, statistic: str = "cosine") -> pandas.DataFrame:
    """One number for every two deltas of a comparison, as a square table: all tensors together.

    Parameters
    ----------
    pairs : pandas.DataFrame
        Of `compare`.
    statistic : str, default "cosine"
        A column of it. Cosines are those of whole deltas; the others are means over tensors, weighted by the norms of
        both.

    Returns
    -------
    pandas.DataFrame

    Raises
    ------
    UnknownNameError
        If there is no such column.

    Examples
    --------
    >>> fights = ak.comparison_matrix(ak.compare({"v": variant - base, "o": other - base}), "interference")
    """
    import pandas as pd

    known = [name for name in COMPARISON if name not in ("first", "second", "first_norm", "second_norm")]
    if statistic not in known:
        raise unknown("comparison_matrix", "no such statistic", statistic, known)
    names = list(dict.fromkeys([*pairs["first"], *pairs["second"]]))
    itself = 1.0 if statistic != "interference" else math.nan
    square = pd.DataFrame(math.nan, index=names, columns=names)
    square.attrs |= pairs.attrs
    for name in names:
        square.loc[name, name] = itself
    for (first, second), found in pairs.groupby(["first", "second"], sort=False):
        weight = found.first_norm * found.second_norm
        if statistic == "cosine":
            whole = math.sqrt((found.first_norm**2).sum() * (found.second_norm**2).sum())
        else:
            whole = weight[found[statistic].notna()].sum()
        value = (found[statistic] * weight).sum() / whole if whole > 0 else math.nan
        square.loc[first, second] = square.loc[second, first] = value
    return square


@dataclass(frozen=True)
class _Task:
    key: str
    family: Family
    shape: tuple[int, ...]
    deltas: dict[str, Term | None]
    rank: int
    seed: int
    number: int
    nbytes = 1  # of one delta of several, whichever there are

    @property
    def place(self) -> tuple[int, int]:
        return 0, self.number

    def rows(self, run: Run, workspace: Workspace) -> list[dict[str, Any]]:
        with run.alone():
            known = {name: _measure(term, self, workspace) for name, term in self.deltas.items() if term is not None}
        names = {**names_of(self.key, self.family), "shape": self.shape}
        return [
            {**names, "first": a, "second": b, **_pair(known.get(a), known.get(b))}
            for a, b in combinations(self.deltas, 2)
        ]


@dataclass(frozen=True)
class _Known:
    """One delta of one tensor: its numbers, norm and leading directions."""

    numbers: Tensor
    norm: float
    directions: tuple[Tensor, Tensor, Tensor] | None


def _measure(term: Term, task: _Task, workspace: Workspace) -> _Known:
    numbers = matrix_of(term, task.shape, workspace)
    squares = sum_of_squares(numbers.flatten())
    if not math.isfinite(squares):
        raise why_nonfinite(term, task.key, "compare")
    is_matrix = len(task.shape) == 2 and min(task.shape) > 1 and squares > 0
    rank = min(task.rank, *task.shape) if is_matrix else 0
    return _Known(
        numbers, math.sqrt(squares), randomised_svd(numbers, rank, task.seed, task.key) if is_matrix else None
    )


def _pair(a: _Known | None, b: _Known | None) -> dict[str, float]:
    norms = {"first_norm": a.norm if a else 0.0, "second_norm": b.norm if b else 0.0}
    if a is None or b is None or a.norm == 0 or b.norm == 0:
        return norms
    x, y = a.numbers.flatten(), b.numbers.flatten()
    pieces = [slice(start, start + BLOCK) for start in range(0, x.numel(), BLOCK)]
    dot = sum(float(torch.dot(x[piece].double(), y[piece].double())) for piece in pieces)
    both = int(((x != 0) & (y != 0)).sum())
    same = int(((x > 0) & (y > 0)).sum() + ((x < 0) & (y < 0)).sum())
    found = {**norms, "cosine": dot / (a.norm * b.norm), "sign_agreement": same / both if both else math.nan}
    if a.directions is None or b.directions is None:
        return found
    (ua, sa, va), (ub, sb, vb) = a.directions, b.directions
    u, s, v = torch.cat([ua, ub], 1), torch.cat([sa, sb]), torch.cat([va, vb], 1)
    eye = torch.eye(len(s), device=s.device)
    meeting = (u.T @ u - eye) @ torch.diag(s) @ (v.T @ v - eye)
    rank = min(len(sa), len(sb))
    return {
        **found,
        "left_overlap": float((ua.T @ ub).square().sum()) / rank,
        "right_overlap": float((va.T @ vb).square().sum()) / rank,
        "interference": float(meeting.abs().sum() / s.sum()),
    }

"""Whether hidden units and attention heads of two models match themselves: what permutations could have to give."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from alkahest.algebra.weights import Weights
from alkahest.engine.events import Event, result_of
from alkahest.engine.options import Options
from alkahest.engine.readable import Workspace
from alkahest.engine.scalars import Rules
from alkahest.engine.terms import Term
from alkahest.engine.workers import Run, place_of
from alkahest.errors import AlgebraError, refuse_unknown_options
from alkahest.measure.remembered import Kind, stream_table
from alkahest.measure.spectrum import matrix_of
from alkahest.measure.table import names_of
from alkahest.model import seeded

if TYPE_CHECKING:
    import pandas

# Column -> what it is. A unit's vector is everything that reads into it and out of it, in one block.
UNITS = {
    "kind": "hidden unit or head",
    "units": "how many there are",
    "looked at": "how many were compared with all",
    "itself": "share of those whose nearest unit in the other model, by cosine, is the one in the same place",
    "cosine": "with the one in the same place, mean",
    "second": "with the nearest other one, mean",
}
KIND = Kind("matching_units", 1, UNITS, whole=("units", "looked at"), words=("kind",))


@refuse_unknown_options
def matching_units(
    a: Weights, b: Weights, looked_at: int = 256, seed: int = 0, *, device: str = "cpu", threads: int | None = None
) -> pandas.DataFrame:
    """Compare hidden units and heads of two models, block by block.

    Models that were trained apart may hold the same units in another order (Ainsworth et al. 2022, arXiv:2209.04836);
    where every unit is nearest to itself, as after training from one start, permuting has nothing to give. Needs no
    pictures.

    Parameters
    ----------
    a, b : Weights
        Models of one architecture.
    looked_at : int, default 256
        How many units of each kind and block are compared with all of the other's.
    seed : int, default 0
        Of their choice.
    device : str, default "cpu"
        What works on it.
    threads : int, optional
        How many, by default all cores.

    Returns
    -------
    pandas.DataFrame
        `UNITS` of `alkahest.measure.units` says what its columns are.

    Raises
    ------
    MismatchError
        If tensors do not fit.

    Examples
    --------
    >>> least = ak.matching_units(base, turbo).groupby("kind").itself.min()
    """
    table: pandas.DataFrame = result_of(
        stream_matching_units(a, b, looked_at, seed, device=device, threads=threads), "matching_units"
    )
    return table


@refuse_unknown_options
def stream_matching_units(
    a: Weights, b: Weights, looked_at: int = 256, seed: int = 0, *, device: str = "cpu", threads: int | None = None
) -> Iterator[Event]:
    """`matching_units` as a generator of events."""
    run = Run(Options(device=device, threads=threads).require("matching_units"))
    for one in (a, b):
        if not isinstance(one, Weights):
            raise AlgebraError("matching_units", "two complete models are needed", found=type(one).__name__)
    if looked_at < 1:
        raise AlgebraError("matching_units", "at least one unit", found=looked_at)
    _ = a - b  # MismatchError unless they are about the same tensors
    return stream_table(KIND, [a, b], [looked_at, seed], run, lambda: list(_tasks(a, b, looked_at, seed)), about=2)


def _tasks(a: Weights, b: Weights, looked_at: int, seed: int) -> Iterator[_Task]:
    family, rules = a.family, Rules()
    for kind, (size, names) in family.units.items():
        rows = int(getattr(a.leading.architecture, size)) if size else 1
        for first in (key for key in a.shapes if family.block_of(key)[1] == names[0]):
            keys = [first.removesuffix(names[0]) + name for name in names]
            terms = [[term for key in keys if (term := one.at(key, rules)) is not None] for one in (a, b)]
            if all(len(some) == len(keys) for some in terms):
                yield _Task(kind, keys, a, [a.shapes[key] for key in keys], terms, rows, looked_at, seed)


@dataclass(frozen=True)
class _Task:
    kind: str
    keys: list[str]
    of: Weights
    shapes: list[tuple[int, ...]]
    terms: list[list[Term]]  # of both models
    size: int  # rows a unit has
    looked_at: int
    seed: int

    @property
    def key(self) -> str:
        return f"{self.keys[0]} {self.kind}"

    @property
    def nbytes(self) -> int:
        return 2 * sum(math.prod(shape) for shape in self.shapes)

    @property
    def place(self) -> tuple[int, int]:
        return place_of(self.terms[0][0])

    def rows(self, run: Run, workspace: Workspace) -> list[dict[str, Any]]:
        with run.alone():
            mine, others = (self._units(terms, workspace) for terms in self.terms)
            count = len(mine)
            order = np.argsort(seeded.uniform(self.seed, "units", self.key, 0, count))
            chosen = torch.from_numpy(np.sort(order[: self.looked_at]).copy())
            cosines = mine[chosen] @ others.T
            same = cosines[torch.arange(len(chosen)), chosen].clone()
            cosines[torch.arange(len(chosen)), chosen] = -2.0
            second = cosines.max(1).values if count > 1 else torch.full_like(same, math.nan)
        names = names_of(self.keys[0], self.of.family)
        return [
            {
                **names,
                "module": self.kind,
                "shape": self.shapes[0],
                "kind": self.kind,
                "units": count,
                "looked at": len(chosen),
                "itself": float((same > second).double().mean()) if count > 1 else 1.0,
                "cosine": float(same.mean()),
                "second": float(second.mean()),
            }
        ]

    def _units(self, terms: list[Term], workspace: Workspace) -> Tensor:
        """[units, everything that reads into one and out of it], of length 1."""
        pieces = [matrix_of(term, shape, workspace) for term, shape in zip(terms, self.shapes, strict=True)]
        into, out = pieces[:-1], pieces[-1].T  # the last matrix reads from the units
        # Keys and values that several heads share have fewer rows than there are heads: they are left out.
        both = torch.cat([one for one in (*into, out) if len(one) == len(out)], dim=1)
        rows: Tensor = both.reshape(-1, self.size * both.shape[1])
        found: Tensor = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
        return found

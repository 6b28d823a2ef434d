"""What one tensor of a delta becomes in a LoRA: thin factors, itself, or nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alkahest.algebra.deltas import Delta
from alkahest.engine.evaluate import evaluate, why_nonfinite
from alkahest.engine.readable import Workspace
from alkahest.engine.scalars import Rules
from alkahest.engine.terms import Minus, Term
from alkahest.engine.workers import Run, blocks
from alkahest.errors import AlgebraError, NonFiniteError
from alkahest.lora.decompose import Decomposition, decompose, of_loras
from alkahest.lora.noise import Noise, noise_of
from alkahest.lora.rank import MIN_DIM, RankRule
from alkahest.lora.write import Pair
from alkahest.measure.rounding import is_rounding
from alkahest.measure.spectrum import matrix_of
from alkahest.measure.table import names_of, unit_of, without_factor
from alkahest.measure.tally import count_changed, sum_of_squares
from alkahest.model.dtypes import FORMATS
from alkahest.model.families import Family
from alkahest.model.keys import Pattern

Row = dict[str, Any]


class Done(NamedTuple):
    """One tensor's row of the report, empty if nothing changed, and what is stored of it."""

    row: Row
    pair: Pair | None = None
    whole: Tensor | None = None


@dataclass(frozen=True)
class Choice:
    """Which tensors become a LoRA, which are kept whole, and why the others are left out."""

    include: str | None
    exclude: str | None
    full: str | None
    min_dim: int
    from_loras: bool
    family: Family

    def of(self, key: str, shape: tuple[int, ...]) -> str:
        if self.full and Pattern(self.full, self.family).matches(key):
            return "full"
        if (self.exclude and Pattern(self.exclude, self.family).matches(key)) or (
            self.include and not Pattern(self.include, self.family).matches(key)
        ):
            return "excluded"
        if len(shape) != 2 or min(shape) < 2 or not key.endswith(".weight"):
            return "full" if self.from_loras else "no matrix"
        return "too small" if min(shape) < self.min_dim else "LoRA"

    @property
    def text(self) -> str:
        """As keyword arguments."""
        given: dict[str, Any] = {"include": self.include, "exclude": self.exclude, "full": self.full}
        given |= {"min_dim": self.min_dim} if self.min_dim not in (1, MIN_DIM) else {}
        return "".join(f", {name}={value!r}" for name, value in given.items() if value)


@dataclass(frozen=True)
class Extraction:
    """What is asked for, of any tensor of a delta."""

    delta: Delta
    rule: RankRule
    choice: Choice
    alpha: float | None
    dtype: str
    method: str
    seed: int
    rounding: bool = False  # whether what is nothing but rounding of the variant's file is extracted too

    def of(self, key: str, run: Run, workspace: Workspace) -> Done:
        """One tensor's share."""
        term = self.delta.at(key, Rules())
        assert term is not None, "a tensor that the delta leaves alone"
        kept = self.choice.of(key, self.delta.shapes[key])
        if kept == "LoRA" and not self.rounding and is_only_rounding(term, self.delta.shapes[key], workspace):
            kept = "rounding"
        if kept == "LoRA":
            with run.alone():
                done = self._thin(key, term, workspace)
        elif kept == "full":
            done = self._kept_whole(key, term, workspace)
        else:
            done = Done(self._left_out(key, term, kept, workspace))
        about = {**names_of(key, self.delta.family), "shape": self.delta.shapes[key]}
        return done._replace(row={**about, **done.row}) if done.row else done

    def _left_out(self, key: str, term: Term, why: str, workspace: Workspace) -> Row:
        squares = 0.0
        for start, stop in blocks(term, math.prod(self.delta.shapes[key])):
            with workspace.block(stop - start) as values:
                evaluate(term, start, stop, values, workspace)
                squares += self._squares(values, key, term)
        return _row(why, 0, 0.0, squares, Noise(), math.nan, False, 0) if squares else {}

    def _kept_whole(self, key: str, term: Term, workspace: Workspace) -> Done:
        values = matrix_of(term, self.delta.shapes[key], workspace).cpu()
        squares = self._squares(values, key, term)
        if squares == 0:
            return Done({})
        stored = values.to(FORMATS[self.dtype].torch)
        energy = 1 - sum_of_squares((values - stored.float()).flatten()) / squares
        return Done(_row("full", 0, energy, squares, Noise(), math.nan, False, stored.nbytes), whole=stored)

    def _thin(self, key: str, term: Term, workspace: Workspace) -> Done:
        """A matrix as its leading part."""
        shape = (self.delta.shapes[key][0], self.delta.shapes[key][1])
        noise, found = Noise(), of_loras(term, key, shape)
        if found is None:
            matrix = matrix_of(term, shape, workspace)
            squares = self._squares(matrix, key, term)
            if squares > 0:
                noise = noise_of(term, shape, squares, count_changed(matrix) / matrix.numel(), workspace)
                self._require_noise(noise, key)
                found = decompose(matrix, squares, self.rule, noise.edge, self.method, self.seed, key)
        if found is None or found.squares == 0:
            return Done({})
        self._require_noise(noise, key)
        edge_rank = float((found.s > noise.edge).sum()) if math.isfinite(noise.edge) else math.nan
        pair, energy, capped = self._pair(found, noise.edge, min(shape), key)
        if pair is None:
            return Done(_row("noise", 0, 0.0, found.squares, noise, edge_rank, False, 0))
        size = pair.up.nbytes + pair.down.nbytes
        return Done(_row("LoRA", pair.rank, energy, found.squares, noise, edge_rank, capped, size), pair)

    def _pair(self, found: Decomposition, edge: float, side: int, key: str) -> tuple[Pair | None, float, bool]:
        asked = self.rule.choose(found.s, found.squares, found.complete, edge)
        most = min(self.rule.cap(side), len(found.s))
        rank = most if asked is None else min(asked, most)
        if rank == 0:
            return None, 0.0, False
        capped = asked is None or asked > rank
        # Rounding the factors takes a little energy again: one direction more makes up for it.
        wanted = self.rule.value if self.rule.name == "energy" and not (capped or self.rule.noise_edge) else 0.0
        for tried in range(rank, min(rank + 2, most) + 1):
            scale = 1.0 if self.alpha is None else self.alpha / tried
            up, down = (half.cpu() for half in found.split(tried, scale, FORMATS[self.dtype].torch))
            if not (torch.isfinite(up).all() and torch.isfinite(down).all()):
                raise NonFiniteError(
                    "extract_lora", f"the factors are too large for {self.dtype}", key=key, fix="dtype='bf16'"
                )
            energy = 1 - found.lost(up, down, scale) / found.squares
            if energy >= wanted or wanted == 1.0:
                break
        return Pair(up, down, scale), energy, capped

    def _squares(self, values: Tensor, key: str, term: Term) -> float:
        squares = sum_of_squares(values.flatten())
        if not math.isfinite(squares):
            raise why_nonfinite(term, key, "extract_lora")
        return squares

    def _require_noise(self, noise: Noise, key: str) -> None:
        if self.rule.noise_edge and not math.isfinite(noise.edge):
            raise AlgebraError(
                "extract_lora",
                "the rounding noise of this delta is not known",
                key=key,
                expected="number * (checkpoint - checkpoint)",
                found=self.delta.text(),
                fix="leave noise_edge out, and choose energy= or rank=",
            )


def is_only_rounding(term: Term, shape: tuple[int, ...], workspace: Workspace) -> bool:
    """Whether a delta's variant is its base rounded to the variant's format, at every element, and differs."""
    _, difference = without_factor(term)
    if not isinstance(difference, Minus):
        return False
    variant, base = unit_of(difference.left), unit_of(difference.right)
    if variant is None or base is None or variant == base:
        return False
    differs = False
    for start, stop in blocks(difference, math.prod(shape)):
        with workspace.block(stop - start) as v, workspace.block(stop - start) as b:
            evaluate(difference.left, start, stop, v, workspace)
            evaluate(difference.right, start, stop, b, workspace)
            if not (torch.isfinite(v).all() and is_rounding(v, b, variant)):
                return False
            differs = differs or not torch.equal(v, b)
    return differs


def _row(
    kept: str, rank: int, energy: float, squares: float, noise: Noise, edge_rank: float, capped: bool, nbytes: int
) -> Row:
    return {
        "kept": kept,
        "rank": rank,
        "energy": energy,
        "delta_norm": math.sqrt(squares),
        "noise": noise.share,
        "edge_rank": edge_rank,
        "capped": capped,
        "nbytes": nbytes,
    }

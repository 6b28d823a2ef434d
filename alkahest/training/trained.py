"""The result of a run as weights in an expression: what was trained, in what it started from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from alkahest.algebra.expression import ATOM, Names
from alkahest.algebra.weights import OfWeights, Weights
from alkahest.engine.readable import Readable, Shapes, Workspace
from alkahest.engine.scalars import Rules
from alkahest.engine.terms import Source, Term
from alkahest.training import parallel


class Tensors(Readable):
    """Trained tensors by canonical name, read block by block."""

    name = "trained"
    is_reproducible = False

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    @property
    def shapes(self) -> Shapes:
        return {key: tuple(value.shape) for key, value in self.tensors.items()}

    def read(self, key: str, start: int, stop: int, out: Tensor, workspace: Workspace) -> None:
        out.copy_(self.tensors[key].reshape(-1)[start:stop])


@dataclass(frozen=True, repr=False)
class Finetuned(OfWeights):
    """Weights of which some tensors were trained; all others are the start's, byte for byte when saved.

    >>> result.weights.protect("refiner") + 2 * (variant - base)
    """

    weights: Weights
    run: str  # what the recipe calls it: a digest of its configuration and the steps done
    tensors: Any  # Tensors; compared by identity

    def leaves(self) -> tuple[Readable, ...]:
        return (*self.weights.leaves(), self.tensors)

    def at(self, key: str, rules: Rules) -> Term | None:
        return Source(self.tensors, key) if key in self.tensors.tensors else self.weights.at(key, rules)

    def _text(self, names: Names) -> tuple[str, int]:
        return f"finetuned({self.weights._text(names)[0]}, {self.run!r})", ATOM

    def _notes(self) -> list[str]:
        trained = self.tensors.tensors
        count = sum(math.prod(value.shape) for value in trained.values())
        return [f"trained: {len(trained)} tensors, {count:,} parameters", *super()._notes()]


def snapshot(parameters: Mapping[str, Tensor]) -> Tensors | None:
    """What is trained as it stands, in float32 or its own dtype, on the CPU; of several processes, on the first."""
    found = {}
    for name, value in parameters.items():
        values = parallel.whole(value.detach())
        if parallel.rank() == 0:
            found[name] = values.cpu().clone()
    return Tensors(found) if parallel.rank() == 0 else None

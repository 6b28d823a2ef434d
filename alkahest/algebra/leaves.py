"""The leaves of an expression, which are read rather than computed: checkpoints and LoRAs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from alkahest.algebra.deltas import Delta
from alkahest.algebra.expression import ATOM, Expression, Names
from alkahest.algebra.weights import Weights
from alkahest.engine import terms
from alkahest.engine.readable import Leading, Readable
from alkahest.engine.scalars import Rules
from alkahest.engine.terms import Term
from alkahest.model.families import Family


class _Read(Readable, Expression):
    """What both kinds of leaves have in common."""

    family: Family

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def _text(self, names: Names) -> tuple[str, int]:
        return names[self], ATOM

    def _bound(self, values: Mapping[str, float]) -> Self:
        return self  # it holds no scalars, and a copy would reopen its files


class Leaf(Leading, _Read, Weights):
    """Weights that are read rather than computed."""

    @property
    def leading(self) -> Leaf:
        return self

    @property
    def merges(self) -> bool:
        return False

    def leaves(self) -> tuple[Readable, ...]:
        return (self,)

    def at(self, key: str, rules: Rules) -> Term | None:
        return terms.Source(self, key) if key in self.shapes else None


class PartLeaf(_Read):
    """Some tensors of a model, which are neither weights nor a difference: to be laid over weights."""

    _kind = "part"

    def leaves(self) -> tuple[Readable, ...]:
        return (self,)


class DeltaLeaf(_Read, Delta):
    """A delta that is read rather than computed: a LoRA."""

    @property
    def is_partial(self) -> bool:
        return True

    def leaves(self) -> tuple[Readable, ...]:
        return (self,)

    def at(self, key: str, rules: Rules, protected: bool = False) -> Term | None:
        return None if protected or key not in self.shapes else terms.Source(self, key)

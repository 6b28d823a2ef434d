"""The leaves of an expression, which are read rather than computed: checkpoints and LoRAs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self, cast

from alkahest import term
from alkahest.algebra import Delta, Weights
from alkahest.architecture import Architecture
from alkahest.expr import ATOM, Expression, Names
from alkahest.scalar import Rules
from alkahest.term import Term

if TYPE_CHECKING:
    from alkahest.files import Reader


class _Read(Expression):
    """What both kinds of leaves have in common."""

    name: str
    files: tuple[Reader, ...] = ()
    file_names: Mapping[Reader, str]  # as recipes record them
    config: dict[str, Any] | None = None  # diffusers' config.json, where the files have one

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @abstractmethod
    def read(self, key: str, start: int, stop: int, out: Any, workspace: Any) -> None:
        """Fill ``out`` (float32) with elements ``start`` to ``stop`` of a tensor, flat and row-major."""

    def _text(self, names: Names) -> tuple[str, int]:
        return names[cast("AnyLeaf", self)], ATOM

    def _bound(self, values: Mapping[str, float]) -> Self:
        return self  # it holds no scalars, and a copy would reopen its files


class Leaf(_Read, Weights):
    """Weights that are read rather than computed."""

    architecture: Architecture
    is_reproducible = True  # whether a recipe can name it

    @property
    @abstractmethod
    def storage(self) -> Mapping[str, str]:
        """Canonical name -> storage form, as `alkahest.dtypes.STORAGES` names it."""

    @property
    def leading(self) -> Leaf:
        return self

    def leaves(self) -> tuple[Leaf, ...]:
        return (self,)

    def at(self, key: str, rules: Rules) -> Term | None:
        return term.Source(self, key) if key in self.shapes else None


class DeltaLeaf(_Read, Delta):
    """A delta that is read rather than computed: a LoRA."""

    @property
    def is_partial(self) -> bool:
        return True

    def leaves(self) -> tuple[AnyLeaf, ...]:
        return (self,)

    def at(self, key: str, rules: Rules, protected: bool = False) -> Term | None:
        return None if protected or key not in self.shapes else term.Source(self, key)

    @abstractmethod
    def check_finite(self, key: str, operation: str) -> None:
        """Raise NonFiniteError if what the file holds for this tensor is not finite."""


AnyLeaf = Leaf | DeltaLeaf

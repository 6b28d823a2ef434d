"""What an expression comes down to for one tensor, and what the engine asks of an expression.

A term is built by the functions below, which drop everything that changes nothing, so that a tensor
that an expression leaves alone ends up as a bare `Source` and can be copied byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from alkahest.engine.readable import Leading, Readable, Shapes
from alkahest.engine.scalars import Rules

Tensor = torch.Tensor


@dataclass(frozen=True)
class Source:
    """A tensor as some checkpoint stores it."""

    leaf: Readable
    key: str


@dataclass(frozen=True)
class Times:
    factor: float
    term: Term


@dataclass(frozen=True)
class Plus:
    left: Term
    right: Term


@dataclass(frozen=True)
class Minus:
    left: Term
    right: Term


@dataclass(frozen=True)
class Apply:
    """A merge method on whole tensors, or on blocks if it is elementwise."""

    function: Callable[..., Tensor]
    operands: tuple[Term, ...]
    many: bool
    elementwise: bool
    settings: tuple[tuple[str, Any], ...]
    key: str


Term = Source | Times | Plus | Minus | Apply


def times(factor: float, term: Term | None) -> Term | None:
    if term is None or factor == 0.0:
        return None
    return term if factor == 1.0 else Times(factor, term)


def plus(left: Term | None, right: Term | None) -> Term | None:
    """``left + right``; ``b + (v - b)`` is ``v``, exactly."""
    if left is None or right is None:
        return left if right is None else right
    if isinstance(right, Minus) and right.right == left:
        return right.left
    return Plus(left, right)


def minus(left: Term | None, right: Term | None) -> Term | None:
    """``left - right``, or None (zero) if they are the same or either is absent."""
    if left is None or right is None or left == right:
        return None
    return Minus(left, right)


def sources(term: Term | None) -> Iterator[Source]:
    """Every stored tensor that a term reads."""
    match term:
        case Source():
            yield term
        case Times():
            yield from sources(term.term)
        case Plus() | Minus():
            yield from sources(term.left)
            yield from sources(term.right)
        case Apply():
            for operand in term.operands:
                yield from sources(operand)


def needs_whole_tensor(term: Term) -> bool:
    """Whether some method in the term must see the whole tensor at once."""
    match term:
        case Source():
            return False
        case Times():
            return needs_whole_tensor(term.term)
        case Plus() | Minus():
            return needs_whole_tensor(term.left) or needs_whole_tensor(term.right)
        case Apply():
            return not term.elementwise or any(map(needs_whole_tensor, term.operands))


class Computable(Protocol):
    """What can be computed into a file, or into a model in memory: a checkpoint, or an expression of some."""

    @property
    def shapes(self) -> Shapes: ...

    @property
    def leading(self) -> Leading: ...

    def at(self, key: str, rules: Rules) -> Term | None:
        """The term for one tensor; None if this model does not have it."""
        ...

    def leaves(self) -> Sequence[Readable]:
        """What it reads, each once, in order of appearance."""
        ...

    def text(self, names: Mapping[Any, str] | None = None) -> str:
        """Canonical recipe text."""
        ...

    @property
    def merges(self) -> bool:
        """Whether it does anything to its leading checkpoint but keep it."""
        ...

    def is_protected(self, key: str) -> bool: ...

    def protection_notes(self) -> list[str]:
        """What protection leaves out of LoRAs, in words."""
        ...


class HasLeaves(Protocol):
    """Weights and deltas alike."""

    def leaves(self) -> Sequence[Readable]: ...


def name_leaves(*expressions: HasLeaves) -> dict[Readable, str]:
    """A distinct identifier for everything that expressions read, from its own name."""
    names: dict[Readable, str] = {}
    for leaf in dict.fromkeys(leaf for expression in expressions for leaf in expression.leaves()):
        name, number = leaf.name, 2
        while name in names.values():
            name, number = f"{leaf.name}_{number}", number + 1
        names[leaf] = name
    return names

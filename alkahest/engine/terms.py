"""What an expression comes down to for one tensor, and what the engine asks of an expression.

A term is built by the functions below, which drop everything that changes nothing, so that a tensor
that an expression leaves alone ends up as a bare `Source` and can be copied byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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


def parts_of(term: Term | None) -> tuple[Term, ...]:
    """The terms that a term is made of."""
    match term:
        case Times():
            return (term.term,)
        case Plus() | Minus():
            return (term.left, term.right)
        case Apply():
            return term.operands
        case _:
            return ()


def subterms(term: Term | None) -> Iterator[Term]:
    """A term and all that it is made of, each object once, left to right: however often it stands there."""
    waiting, seen = [] if term is None else [term], set[int]()
    while waiting:
        one = waiting.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting.extend(reversed(parts_of(one)))


def is_same(one: Term | None, other: Term | None, known: set[tuple[int, int]] | None = None) -> bool:
    """Whether two terms are equal, each pair of their parts compared once, however often it stands there."""
    known = set() if known is None else known
    if one is other or (id(one), id(other)) in known:
        return True
    if type(one) is not type(other) or len(parts_of(one)) != len(parts_of(other)):
        return False
    match one, other:
        case Times(), Times():
            alike = one.factor == other.factor
        case Apply(), Apply():
            alike = replace(one, operands=()) == replace(other, operands=())
        case (Plus(), _) | (Minus(), _):
            alike = True
        case _:
            alike = one == other
    if not (alike and all(is_same(a, b, known) for a, b in zip(parts_of(one), parts_of(other), strict=True))):
        return False
    known.add((id(one), id(other)))
    return True


def sources(term: Term | None) -> Iterator[Source]:
    """Every stored tensor that a term reads."""
    return (one for one in subterms(term) if isinstance(one, Source))


def needs_whole_tensor(term: Term) -> bool:
    """Whether some method in the term must see the whole tensor at once."""
    return any(isinstance(one, Apply) and not one.elementwise for one in subterms(term))


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

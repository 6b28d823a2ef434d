"""What an expression comes down to for one tensor, and its evaluation block by block in float32.

A term is built by the functions below, which drop everything that changes nothing, so that a tensor
that an expression leaves alone ends up as a bare `Source` and can be copied byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from alkahest.files import LINE

Tensor = torch.Tensor


class Readable(Protocol):
    """A source of numbers: a checkpoint, or anything that can fill a block."""

    name: str

    def read(self, key: str, start: int, stop: int, out: Tensor, workspace: Workspace) -> None: ...


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


class Workspace:
    """One worker's reusable buffers; they grow to the largest block asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: list[Tensor] = []
        self._raw: list[Tensor] = []

    @contextmanager
    def raw(self, nbytes: int, offset: int) -> Iterator[Tensor]:
        """``nbytes`` bytes on the CPU, for the length of the with block, to be read from or written to ``offset`` of a file."""
        buffer = self._raw.pop() if self._raw else torch.empty(0, dtype=torch.uint8)
        if buffer.numel() < nbytes + LINE:
            buffer = torch.empty(nbytes + LINE, dtype=torch.uint8)
        first = offset % LINE // 8 * 8  # torch's memory begins a line; a view as numbers needs 8
        try:
            yield buffer[first : first + nbytes]
        finally:
            self._raw.append(buffer)

    @contextmanager
    def block(self, count: int) -> Iterator[Tensor]:
        """``count`` float32 numbers on the device, for the length of the with block."""
        buffer = self._free.pop() if self._free else torch.empty(0, device=self.device)
        if buffer.numel() < count:
            buffer = torch.empty(count, dtype=torch.float32, device=self.device)
        try:
            yield buffer[:count]
        finally:
            self._free.append(buffer)


def evaluate(term: Term, start: int, stop: int, out: Tensor, workspace: Workspace) -> None:
    """Compute elements ``start`` to ``stop`` (flat, row-major) of a term into ``out`` (float32).

    Each operation is rounded by itself: no fused multiply-add, whose use would depend on the
    processor and on where a block ends.
    """
    match term:
        case Source():
            term.leaf.read(term.key, start, stop, out, workspace)
        case Times():
            evaluate(term.term, start, stop, out, workspace)
            out.mul_(term.factor)
        case Plus() | Minus():
            evaluate(term.left, start, stop, out, workspace)
            with workspace.block(stop - start) as right:
                if towards := _change_from_left(term):
                    # left + k * (x - left): the left side is there already, read it once.
                    factor, other = towards
                    evaluate(other, start, stop, right, workspace)
                    right.sub_(out).mul_(factor)
                else:
                    evaluate(term.right, start, stop, right, workspace)
                if isinstance(term, Plus):
                    out.add_(right)
                else:
                    out.sub_(right)
        case Apply():
            _apply(term, start, stop, out, workspace)


def _change_from_left(term: Plus | Minus) -> tuple[float, Term] | None:
    match term.right:
        case Times(factor, Minus(other, subtracted)) if subtracted == term.left:
            return factor, other
        case _:
            return None


def _apply(term: Apply, start: int, stop: int, out: Tensor, workspace: Workspace) -> None:
    operands = []
    for operand in term.operands:
        values = torch.empty(stop - start, dtype=torch.float32, device=out.device)
        evaluate(operand, start, stop, values, workspace)
        operands.append(values)
    arguments = [operands] if term.many else operands
    settings = {name: value(term.key, start, stop) if callable(value) else value for name, value in term.settings}
    out.copy_(term.function(*arguments, **settings))

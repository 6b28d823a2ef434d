"""Terms -> numbers, block by block in float32."""

from __future__ import annotations

import torch

from alkahest.engine.readable import Workspace
from alkahest.engine.terms import Apply, Minus, Plus, Source, Tensor, Term, Times


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

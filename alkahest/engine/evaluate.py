"""Terms -> numbers, block by block in float32."""

from __future__ import annotations

from collections import Counter

import torch

from alkahest.engine.readable import Workspace
from alkahest.engine.terms import Apply, Minus, Plus, Source, Tensor, Term, Times, parts_of, sources, subterms
from alkahest.errors import NonFiniteError
from alkahest.model.dtypes import is_finite


def evaluate(term: Term, start: int, stop: int, out: Tensor, workspace: Workspace) -> None:
    """Compute elements ``start`` to ``stop`` (flat, row-major) of a term into ``out`` (float32).

    Each operation is rounded by itself: no fused multiply-add, whose use would depend on the
    processor and on where a block ends. What stands in the term more than once is computed once.
    """
    _evaluate(term, start, stop, out, workspace, dict.fromkeys(_repeated(term, workspace)))


def _evaluate(
    term: Term, start: int, stop: int, out: Tensor, workspace: Workspace, known: dict[int, Tensor | None]
) -> None:
    """`evaluate`; ``known`` has an entry for each term that stands there more than once, by its id."""
    if (found := known.get(id(term))) is not None:
        out.copy_(found)
        return
    match term:
        case Source():
            term.leaf.read(term.key, start, stop, out, workspace)
        case Times():
            _evaluate(term.term, start, stop, out, workspace, known)
            out.mul_(term.factor)
        case Plus() | Minus():
            _evaluate(term.left, start, stop, out, workspace, known)
            with workspace.block(stop - start) as right:
                if towards := _change_from_left(term):
                    # left + k * (x - left): the left side is there already, read it once.
                    factor, other = towards
                    _evaluate(other, start, stop, right, workspace, known)
                    right.sub_(out).mul_(factor)
                else:
                    _evaluate(term.right, start, stop, right, workspace, known)
                if isinstance(term, Plus):
                    out.add_(right)
                else:
                    out.sub_(right)
        case Apply():
            _apply(term, start, stop, out, workspace, known)
    if id(term) in known:
        known[id(term)] = out.clone()


def _repeated(term: Term, workspace: Workspace) -> tuple[int, ...]:
    """The ids of composite terms that are needed more than once."""
    if isinstance(term, Source):
        return ()
    remembered = workspace.repeated.get(id(term))
    if remembered is None or remembered[0] is not term:
        counts: Counter[int] = Counter()
        for one in subterms(term):
            parts = parts_of(one)
            if isinstance(one, Plus | Minus) and (towards := _change_from_left(one)):
                parts = (one.left, towards[1])
            counts.update(id(part) for part in parts if not isinstance(part, Source))
        if len(workspace.repeated) > 256:
            workspace.repeated.clear()
        remembered = workspace.repeated[id(term)] = term, tuple(one for one, count in counts.items() if count > 1)
    return remembered[1]


def _change_from_left(term: Plus | Minus) -> tuple[float, Term] | None:
    match term.right:
        case Times(factor, Minus(other, subtracted)) if subtracted == term.left:
            return factor, other
        case _:
            return None


def _apply(
    term: Apply, start: int, stop: int, out: Tensor, workspace: Workspace, known: dict[int, Tensor | None]
) -> None:
    operands = []
    for operand in term.operands:
        values = torch.empty(stop - start, dtype=torch.float32, device=out.device)
        _evaluate(operand, start, stop, values, workspace, known)
        _require_finite(values, operand, term.key, workspace)
        operands.append(values)
    arguments = [operands] if term.many else operands
    settings = {name: value(term.key, start, stop) if callable(value) else value for name, value in term.settings}
    out.copy_(term.function(*arguments, **settings))


def _require_finite(values: Tensor, operand: Term, key: str, workspace: Workspace) -> None:
    """A method may select, and so hide what is NaN in what it reads: finiteness is of what is read."""
    if values.numel() == 0 or is_finite(values):
        return
    if workspace.watch is None:
        raise why_nonfinite(operand, key)
    workspace.watch(key, int((~torch.isfinite(values)).sum()))


def why_nonfinite(term: Term, key: str, operation: str = "save") -> NonFiniteError:
    """The error for a term with NaN or infinity: the input that holds it, or the arithmetic."""
    for source in sources(term):
        source.leaf.check_finite(source.key, operation)
    return NonFiniteError(operation, "the result overflows float32", key=key, fix="use a smaller multiplier")

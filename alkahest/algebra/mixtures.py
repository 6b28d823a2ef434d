"""Averages of models: ``lerp``, ``weighted_sum``, and what merge methods on weights share with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

from alkahest.algebra.deltas import Delta
from alkahest.algebra.expression import ATOM, Expression, Names, require_same
from alkahest.algebra.weights import Weights
from alkahest.engine import terms
from alkahest.engine.readable import Leading
from alkahest.engine.scalars import Param, Rules, Scalar, Varied, named_in, text_of, varied
from alkahest.engine.terms import Term
from alkahest.errors import AlgebraError

# A number, a list of numbers along the blocks of the main stack, or either for patterns.
Share = SupportsFloat | Param | Sequence[Any] | Mapping[str, Any]


class OfModels(Weights):
    """Weights made from several models, of which the first leads."""

    operands: tuple[Weights, ...]

    @property
    def leading(self) -> Leading:
        return self.operands[0].leading

    @property
    def protection(self) -> tuple[str, ...]:
        return self.operands[0].protection

    def keeps_first(self, key: str, rules: Rules) -> bool:
        """Whether a tensor stays the first model's: protected, or a pad token as ComfyUI treats it."""
        return self.is_protected(key) or (rules.comfy_compatible and key in self.family.pads)


@dataclass(frozen=True, repr=False)
class Mixture(OfModels):
    """First weights plus shares of what the others differ by; `lerp` and `weighted_sum` make it."""

    operands: tuple[Weights, ...]
    shares: tuple[Scalar, ...]  # of all but the first
    is_lerp: bool
    first_share: Scalar = 0.0  # what it was called with, where that matters
    normalise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_mixable("lerp" if self.is_lerp else "weighted_sum", self.operands)

    def at(self, key: str, rules: Rules) -> Term | None:
        first, *others = [operand.at(key, rules) for operand in self.operands]
        if self.keeps_first(key, rules):
            return first
        shares = [rules.value(share, key) for share in self.shares]
        if self.normalise:
            total = sum(shares, rules.value(self.first_share, key))
            shares = [share / total for share in shares]
        if rules.comfy_compatible and first is not None:
            return _comfy_mixture(first, others, shares)
        if self.is_lerp and shares == [1.0]:
            return others[0] or first
        mixed = first
        for share, other in zip(shares, others, strict=True):
            mixed = terms.plus(mixed, terms.times(share, terms.minus(other, first)))
        return mixed

    def _scalars(self) -> Iterator[Any]:
        yield from (self.first_share, *self.shares)
        yield from super()._scalars()

    def _text(self, names: Names) -> tuple[str, int]:
        operands = [operand._text(names)[0] for operand in self.operands]
        shares = [text_of(share) for share in self.shares]
        if self.is_lerp:
            return f"lerp({operands[0]}, {operands[1]}, {shares[0]})", ATOM
        first = text_of(self.first_share)
        normalise = ", normalise=1" if self.normalise else ""
        return f"weighted_sum([{', '.join(operands)}], [{', '.join([first, *shares])}]{normalise})", ATOM


def lerp(a: Weights, b: Weights, t: Share) -> Weights:
    """Mix two models: ``a + t * (b - a)``.

    Parameters
    ----------
    a, b : Weights
        Complete models; ``a`` leads: its storage, its pad tokens under ``comfy_compatible``, its protection.
    t : float, Param, list or mapping
        Share of ``b``, 0 to 1 or beyond. A list goes along the blocks of the main stack, evenly spread and linear in
        between, its first value before the stack and its last after it. A mapping gives patterns a number or a list;
        the last pattern that selects a tensor counts, and every tensor must be selected by one.

    Returns
    -------
    Weights

    Raises
    ------
    AlgebraError
        If a delta is given, ``b`` protects tensors that ``a`` does not, a number is not finite, or a tensor is left
        without one.
    UnknownNameError
        If a pattern selects nothing.
    MismatchError
        If the two have different tensors.

    Examples
    --------
    >>> merged = ak.lerp(base, variant, 0.5)
    >>> deeper_more = ak.lerp(base, variant, [0, 0.5, 1])
    >>> by_part = ak.lerp(base, variant, {"*": 0.5, "refiner": 0, "layers": [0, 1], "attention": 0.7})
    """
    _require_weights("lerp", a, b)
    return Mixture((a, b), (varied(t, "lerp", a.shapes, a.family),), True)


def weighted_sum(models: Sequence[Weights], shares: Sequence[Share], *, normalise: bool = False) -> Weights:
    """A weighted average of models.

    Parameters
    ----------
    models : list of Weights
        Complete models; the first leads, as in `lerp`.
    shares : list of float, list or mapping
        One for each model; each may vary over the tensors as in `lerp`. They add up to 1 at every tensor.
    normalise : bool, default False
        Divide the shares by their sum instead of refusing those that do not add up to 1.

    Returns
    -------
    Weights

    Raises
    ------
    AlgebraError
        If shares do not add up to 1 (to 0, with ``normalise``), or are named scalars, which could be moved one by one.

    Examples
    --------
    >>> merged = ak.weighted_sum([base, variant, other], [0.5, 0.3, 0.2])
    >>> divided = ak.weighted_sum([base, variant], [3, {"*": 1, "layers.0-1": 0}], normalise=True)
    """
    if isinstance(models, Expression):
        raise AlgebraError("weighted_sum", "the models go in a list", fix="ak.weighted_sum([a, b], [0.7, 0.3])")
    if normalise not in (True, False):
        raise AlgebraError("weighted_sum", "normalise is on or off", expected="True or False", found=repr(normalise))
    models = tuple(models)
    _require_weights("weighted_sum", *models)
    if len(models) != len(shares) or not models:
        found = f"{len(models)} models, {len(shares)} shares"
        raise AlgebraError("weighted_sum", "one share per model is needed", found=found)
    first = models[0]
    given = [varied(share, "weighted_sum", first.shapes, first.family) for share in shares]
    if named := [one.name for one in named_in(tuple(given))]:
        problem = "shares that can be moved one by one would not add up to 1"
        raise AlgebraError("weighted_sum", problem, found=named[0], fix="lerp(a, b, t) has one")
    plain, rules = all(not isinstance(share, Varied) for share in given), Rules()
    for key in list(first.shapes)[:1] if plain else first.shapes:
        _require_sum([rules.value(share, key) for share in given], None if plain else key, normalise)
    if normalise and plain:
        total = sum(rules.value(share) for share in given)
        given, normalise = [rules.value(share) / total for share in given], False
    return Mixture(models, tuple(given[1:]), False, given[0], normalise)


def _require_sum(shares: list[float], key: str | None, normalise: bool) -> None:
    """Raise AlgebraError unless shares add up to 1, or to something that they can be divided by."""
    total = sum(shares)
    if normalise and abs(total) < 1e-8:
        raise AlgebraError("weighted_sum", "the shares add up to 0, which nothing can be divided by", key=key)
    if not normalise and abs(total - 1) > 1e-6:
        raise AlgebraError(
            "weighted_sum",
            "the shares do not add up to 1, so the result would not be weights",
            key=key,
            expected=1,
            found=total,
            fix="normalise=True divides them by their sum; or add deltas: a + k * (b - c)",
        )


def require_mixable(operation: str, operands: tuple[Weights, ...]) -> None:
    first = operands[0]
    for other in operands[1:]:
        require_same(operation, first, other)
        lost = [text for text in other.protection if text not in first.protection]
        if lost:
            raise AlgebraError(
                operation,
                f"{lost[0]!r} is protected on a later operand only, and would be mixed away",
                found=other.text(),
                fix="put the protected model first, or call .protect() on the result",
            )


def _comfy_mixture(first: Term, others: list[Term | None], shares: list[float]) -> Term:
    # ModelMergeSimple: the first times its ratio, then each other one added.
    mixed: Term = terms.Times(1.0 - sum(shares), first)
    for share, other in zip(shares, others, strict=True):
        if other is not None:
            mixed = terms.Plus(mixed, terms.Times(share, other))
    return mixed


def _require_weights(operation: str, *operands: object) -> None:
    for operand in operands:
        if isinstance(operand, Delta):
            raise AlgebraError(
                operation,
                "a delta was given where complete weights are needed",
                found=operand.text(),
                fix="add it to a checkpoint first: bridge + k * delta",
            )
        if not isinstance(operand, Weights):
            raise AlgebraError(operation, "weights are needed", expected="a checkpoint", found=type(operand).__name__)

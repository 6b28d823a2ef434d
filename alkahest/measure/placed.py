"""Where a delta meets a model: which scalar multiplies it, and what the model protects from it."""

from __future__ import annotations

from collections.abc import Iterator

from alkahest.algebra.deltas import Delta, DeltaSum
from alkahest.algebra.expression import Expression
from alkahest.algebra.weights import Sum, Weights
from alkahest.engine.scalars import Rules
from alkahest.errors import AlgebraError


def auto_multiplied(expression: Weights, name: str = "k") -> tuple[Delta, Weights]:
    """The delta that the scalar ``name`` multiplies in an expression, and what that is added to.

    >>> delta, on = auto_multiplied(bridge + ak.param("k", 1) * (variant - base))

    AlgebraError if the scalar is not there, or if there are several such places.
    """
    found = list(_find_multiplied(expression, name))
    if len(found) != 1 or name not in expression.params:
        raise AlgebraError(
            "auto",
            f"{name!r} must multiply one delta that is added to a model",
            expected=f"bridge + {name} * (variant - base)",
            found=expression.text(),
        )
    return found[0]


def not_protected(delta: Delta, on: Weights | None) -> frozenset[str] | None:
    """The tensors that are not protected from the delta; None for no model to protect any."""
    if on is None:
        return None
    return frozenset(
        key for key in delta.shapes if not on.is_protected(key) or delta.at(key, Rules(), True) is not None
    )


def require_delta(operation: str, delta: object) -> None:
    """Raise AlgebraError for anything that is no delta."""
    if not isinstance(delta, Delta):
        hint = "a checkpoint is no difference: variant - base" if isinstance(delta, Weights) else "variant - base"
        raise AlgebraError(operation, "a delta is needed", found=type(delta).__name__, fix=hint)


def require_weights(operation: str, given: object, name: str) -> None:
    """Raise AlgebraError for anything that is no complete model."""
    if not isinstance(given, Weights):
        found = type(given).__name__
        raise AlgebraError(operation, f"{name} is a complete model", found=found, fix="ak.open(path), or an expression")


def _find_multiplied(expression: Expression, name: str) -> Iterator[tuple[Delta, Weights]]:
    if isinstance(expression, Sum) and name in expression.delta.params:
        for one in _summands(expression.delta):
            if name in one.params:
                yield one.bind(**{name: 1.0}), expression.weights
    for child in expression.children:
        yield from _find_multiplied(child, name)


def _summands(delta: Delta) -> Iterator[Delta]:
    if isinstance(delta, DeltaSum):
        yield from _summands(delta.left)
        yield from _summands(delta.right)
    else:
        yield delta

"""The algebra: weights, deltas, and the rules that join them.

checkpoint - checkpoint = delta        number * delta = delta       delta +- delta = delta
weights + delta = weights              weights + weights is an error
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, SupportsFloat

from alkahest import term
from alkahest.errors import AlgebraError
from alkahest.expr import ATOM, PRODUCT, SUM, Expression, Names, Shapes, refuse, require_same, wrapped
from alkahest.keys import PAD_TOKENS, Pattern, part_of
from alkahest.scalar import Param, Rules, Scalar, number, scalar, text_of
from alkahest.term import Term

if TYPE_CHECKING:
    from alkahest.leaf import Leaf
    from alkahest.stream import Saved

_NOT_A_MODEL = ": a delta is no model; add it to one first: bridge + k * delta"
_NOT_A_DELTA = ": that is for deltas; choose before adding: bridge + (variant - base).only('layers')"
_NOT_PROTECTED = ": protection belongs to the weights: bridge.protect('refiner') + delta, or delta.without('refiner')"


class Weights(Expression):
    """A complete set of tensors: a checkpoint, or what an expression makes of some."""

    _kind = "weights"
    _elsewhere = dict.fromkeys(("only", "without", "everywhere", "scaled"), _NOT_A_DELTA)

    @abstractmethod
    def at(self, key: str, rules: Rules) -> Term | None:
        """The term for one tensor; None if this model does not have it."""

    @property
    @abstractmethod
    def leading(self) -> Leaf:
        """The checkpoint whose storage, layout and pad tokens the result takes by default."""

    @property
    def shapes(self) -> Shapes:
        return self.leading.shapes

    @property
    def protection(self) -> tuple[str, ...]:
        """Patterns that `protect` was called with."""
        return ()

    def is_protected(self, key: str) -> bool:
        return any(Pattern(text).matches(key) for text in self.protection)

    def protect(self, pattern: str) -> Weights:
        """Keep these tensors bit for bit, whatever is added later.

        >>> bridge.protect("refiner") + 171.1 * (variant - base)

        Holds for every delta added and for `lerp`, except deltas marked ``everywhere()``.
        """
        return Protected(self, Pattern(pattern).require_match(self.shapes, "protect").text)

    def __add__(self, other: object) -> Weights:
        if isinstance(other, Delta):
            return Sum(self, other)
        if isinstance(other, Weights):
            raise AlgebraError(
                "weights + weights", "two complete models cannot be added: the sum would be twice a model",
                found=f"{self.text()} + {other.text()}",
                fix="average them with ak.lerp(a, b, 0.5), or add a difference: a + k * (b - base)",
            )  # fmt: skip
        return refuse("+", self, other)

    def __radd__(self, other: object) -> Weights:
        return self + self if other == 0 and isinstance(other, int) else refuse("+", self, other)

    def __sub__(self, other: object) -> Any:
        if isinstance(other, Weights):
            return Difference(self, other)
        if isinstance(other, Delta):
            return Sum(self, -other)
        return refuse("-", self, other)

    def __neg__(self) -> NoReturn:
        self.__mul__(-1)

    def __mul__(self, other: object) -> NoReturn:
        raise AlgebraError(
            "number * weights", "a complete model cannot be scaled, only a difference can",
            found=f"{other!r} * {self.text()}", fix="use ak.lerp or ak.weighted_sum, or scale a delta: k * (a - b)",
        )  # fmt: skip

    __rmul__ = __truediv__ = __mul__

    def save(self, path: Any, **options: Any) -> Saved:
        """Compute the expression and write it to ``path``; ``help(alkahest.stream.save)`` explains each option.

        Options: ``dtype``, ``layout``, ``rounding``, ``seed``, ``device``, ``comfy_compatible``,
        ``max_shard_size``, ``allow_nonfinite``, ``metadata``, ``threads``, ``executor``.
        """
        from alkahest.stream import save

        return save(self, path, **options)

    def stream(self, path: Any, **options: Any) -> Iterator[Any]:
        """Like `save`, as a generator of progress events; closing it stops and removes the partial file."""
        from alkahest.stream import stream

        return stream(self, path, **options)

    def load_into(self, module: Any, **options: Any) -> Any:
        """Compute the expression into the parameters of a live ``torch.nn.Module``, in place."""
        from alkahest.live import load_into

        return load_into(self, module, **options)

    def _notes(self) -> list[str]:
        notes = []
        if self.protection:
            kept = [key for key in self.shapes if self.is_protected(key)]
            what = ", ".join(dict.fromkeys(self.protection))
            notes.append(f"protected: {what} ({len(kept)} tensors stay {self.leading.name}'s, bit for bit)")
        return notes + self.dropped()

    def dropped(self) -> list[str]:
        """What protection leaves out of LoRAs, in words: their names are few, so this is said aloud."""
        return [line for child in self.children if isinstance(child, Weights) for line in child.dropped()]


class Delta(Expression):
    """A difference of weights: what a variant learned. It has no numbers until it is streamed."""

    _kind = "delta"
    _elsewhere: ClassVar = {**dict.fromkeys(("save", "stream", "load_into"), _NOT_A_MODEL), "protect": _NOT_PROTECTED}

    @abstractmethod
    def at(self, key: str, rules: Rules, protected: bool = False) -> Term | None:
        """The term for one tensor; None where it is zero, as on protected tensors unless `everywhere`."""

    def only(self, pattern: str) -> Delta:
        """This delta on the tensors that ``pattern`` selects, zero elsewhere."""
        return Masked(self, Pattern(pattern).require_match(self.shapes, "only").text, True)

    def without(self, pattern: str) -> Delta:
        """This delta, zero on the tensors that ``pattern`` selects."""
        return Masked(self, Pattern(pattern).require_match(self.shapes, "without").text, False)

    def everywhere(self) -> Delta:
        """This delta, added to protected tensors too."""
        return Everywhere(self)

    def scaled(self, factors: Mapping[str, SupportsFloat | Param]) -> Delta:
        """One factor per part: ``delta.scaled({"layers": 1.5, "layers.0-9": 2})``.

        Where several patterns select a tensor the last one counts; where none does the factor is 1.
        """
        checked = [
            (Pattern(text).require_match(self.shapes, "scaled").text, scalar(factor, "scaled"))
            for text, factor in factors.items()
        ]
        return ScaledParts(self, tuple(checked))

    def __add__(self, other: object) -> Any:
        if isinstance(other, Delta):
            return DeltaSum(self, other)
        if isinstance(other, Weights):
            return other + self
        return self if other == 0 and isinstance(other, int) else refuse("+", self, other)

    __radd__ = __add__

    def __sub__(self, other: object) -> Delta:
        if isinstance(other, Delta):
            return DeltaSum(self, -other)
        return refuse("-", self, other)

    def __mul__(self, factor: Any) -> Delta:
        if isinstance(factor, Expression):
            return refuse("*", self, factor)
        k = scalar(factor, "number * delta")
        if k == 1.0:
            return self
        if isinstance(self, Scaled) and not isinstance(k, Param) and not isinstance(self.factor, Param):
            return self.delta * number(k * self.factor, "number * delta")
        return Scaled(k, self)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Delta:
        by = number(divisor, "delta / number")
        if by == 0:
            raise AlgebraError("delta / number", "division by zero", fix="check the number")
        return self * (1 / by)

    def __neg__(self) -> Delta:
        return self * -1.0


class OfWeights(Weights):
    """Weights made from one model, which leads."""

    weights: Weights

    @property
    def leading(self) -> Leaf:
        return self.weights.leading

    @property
    def protection(self) -> tuple[str, ...]:
        return self.weights.protection


@dataclass(frozen=True, repr=False)
class Protected(OfWeights):
    weights: Weights
    pattern: str

    @property
    def protection(self) -> tuple[str, ...]:
        return (*self.weights.protection, self.pattern)

    def at(self, key: str, rules: Rules) -> Term | None:
        return self.weights.at(key, rules)

    def _text(self, names: Names) -> tuple[str, int]:
        return f"{wrapped(self.weights, names, ATOM)}.protect({self.pattern!r})", ATOM


@dataclass(frozen=True, repr=False)
class Sum(OfWeights):
    """Weights plus a delta; protected tensors take nothing of it."""

    weights: Weights
    delta: Delta

    def __post_init__(self) -> None:
        super().__post_init__()
        require_same("weights + delta", self.weights, self.delta)

    def at(self, key: str, rules: Rules) -> Term | None:
        weights = self.weights.at(key, rules)
        if weights is None or (rules.comfy_compatible and key in PAD_TOKENS):
            return weights
        delta = self.delta.at(key, rules, self.is_protected(key))
        if rules.comfy_compatible and delta is not None:
            return term.Plus(weights, delta)
        return term.plus(weights, delta)

    def dropped(self) -> list[str]:
        lines, rules = [], Rules()
        for leaf in self.delta.leaves() if self.protection else ():
            if isinstance(leaf, Delta):
                kept = [key for key in leaf.shapes if self.is_protected(key) and self.delta.at(key, rules) is not None and self.delta.at(key, rules, True) is None]  # fmt: skip
                if kept:
                    lines.append(f"{leaf.name}: protection leaves out {len(kept)} of its {len(leaf.shapes)} tensors ({', '.join(dict.fromkeys(map(part_of, kept)))})")  # fmt: skip
        return lines + super().dropped()

    def _text(self, names: Names) -> tuple[str, int]:
        return _joined(self.weights, self.delta, names), SUM


@dataclass(frozen=True, repr=False)
class Difference(Delta):
    """``variant - base``."""

    variant: Weights
    base: Weights

    def __post_init__(self) -> None:
        super().__post_init__()
        require_same("weights - weights", self.variant, self.base)

    @property
    def shapes(self) -> Shapes:
        return self.variant.shapes

    def at(self, key: str, rules: Rules, protected: bool = False) -> Term | None:
        return None if protected else self._scaled_by(1.0, key, rules)

    def _scaled_by(self, factor: float, key: str, rules: Rules) -> Term | None:
        variant, base = self.variant.at(key, rules), self.base.at(key, rules)
        if rules.comfy_compatible and variant is not None and base is not None:
            # ModelMergeSubtract: multiply the variant, then add -factor times the base.
            return term.Plus(term.Times(factor, variant), term.Times(-factor, base))
        return term.times(factor, term.minus(variant, base))

    def _text(self, names: Names) -> tuple[str, int]:
        return f"{wrapped(self.variant, names, SUM)} - {wrapped(self.base, names, PRODUCT)}", SUM


class _OfDelta(Delta):
    """A delta made from one delta."""

    delta: Delta

    @property
    def shapes(self) -> Shapes:
        return self.delta.shapes

    @property
    def is_partial(self) -> bool:
        return self.delta.is_partial


@dataclass(frozen=True, repr=False)
class Scaled(_OfDelta):
    factor: Scalar
    delta: Delta

    def at(self, key: str, rules: Rules, protected: bool = False) -> Term | None:
        factor = rules.value(self.factor)
        if isinstance(self.delta, Difference) and not protected:
            return self.delta._scaled_by(factor, key, rules)
        return term.times(factor, self.delta.at(key, rules, protected))

    def _scalars(self) -> Iterator[Scalar]:
        yield self.factor
        yield from self.delta._scalars()

    def _text(self, names: Names) -> tuple[str, int]:
        return f"{text_of(self.factor)} * {wrapped(self.delta, names, ATOM)}", PRODUCT


@dataclass(frozen=True, repr=False)
class ScaledParts(_OfDelta):
    delta: Delta
    factors: tuple[tuple[str, Scalar], ...]

    def at(self, key: str, rules: Rules, protected: bool = False) -> Term | None:
        chosen = [factor for text, factor in self.factors if Pattern(text).matches(key)]
        factor = rules.value(chosen[-1]) if chosen else 1.0
        return term.times(factor, self.delta.at(key, rules, protected))

    def _scalars(self) -> Iterator[Scalar]:
        yield from (factor for _, factor in self.factors)
        yield from self.delta._scalars()

    def _text(self, names: Names) -> tuple[str, int]:
        inside = ", ".join(f"{text!r}: {text_of(factor)}" for text, factor in self.factors)
        return f"{wrapped(self.delta, names, ATOM)}.scaled({{{inside}}})", ATOM


@dataclass(frozen=True, repr=False)
class Masked(_OfDelta):
    delta: Delta
    pattern: str
    keep: bool

    def at(self, key: str, rules: Rules, protected: bool = False) -> Term | None:
        chosen = Pattern(self.pattern).matches(key) == self.keep
        return self.delta.at(key, rules, protected) if chosen else None

    def _text(self, names: Names) -> tuple[str, int]:
        verb = "only" if self.keep else "without"
        return f"{wrapped(self.delta, names, ATOM)}.{verb}({self.pattern!r})", ATOM


@dataclass(frozen=True, repr=False)
class Everywhere(_OfDelta):
    delta: Delta

    def at(self, key: str, rules: Rules, protected: bool = False) -> Term | None:
        return self.delta.at(key, rules, False)

    def _text(self, names: Names) -> tuple[str, int]:
        return f"{wrapped(self.delta, names, ATOM)}.everywhere()", ATOM


@dataclass(frozen=True, repr=False)
class DeltaSum(Delta):
    left: Delta
    right: Delta

    def __post_init__(self) -> None:
        super().__post_init__()
        require_same("delta + delta", self.left, self.right)

    @property
    def shapes(self) -> Shapes:
        return {**self.right.shapes, **self.left.shapes}

    @property
    def is_partial(self) -> bool:
        return self.left.is_partial and self.right.is_partial

    def at(self, key: str, rules: Rules, protected: bool = False) -> Term | None:
        return term.plus(self.left.at(key, rules, protected), self.right.at(key, rules, protected))

    def _text(self, names: Names) -> tuple[str, int]:
        return _joined(self.left, self.right, names), SUM


def ends(delta: Delta) -> tuple[Weights | None, Weights | None]:
    """The variant and the base that a delta lies between, under its masks and factors; None for a sum of deltas."""
    while isinstance(delta, _OfDelta):
        delta = delta.delta
    return (delta.variant, delta.base) if isinstance(delta, Difference) else (None, None)


def _joined(left: Expression, delta: Delta, names: Names) -> str:
    sign = "+"
    if isinstance(delta, Scaled) and not isinstance(delta.factor, Param) and delta.factor < 0:
        sign, delta = "-", -delta
    return f"{wrapped(left, names, SUM)} {sign} {wrapped(delta, names, PRODUCT)}"

"""Deltas and their rules: differences of weights, added, scaled, and limited to some tensors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, SupportsFloat

import torch
from torch import Tensor

from alkahest.algebra.expression import (
    ATOM,
    PRODUCT,
    SUM,
    AnyWeights,
    Expression,
    Names,
    in_parentheses,
    refuse,
    require_same,
)
from alkahest.engine import terms
from alkahest.engine.readable import Shapes
from alkahest.engine.scalars import Param, Rules, Scalar, Varied, number, scalar, text_of, varied
from alkahest.engine.terms import Term
from alkahest.errors import AlgebraError, MismatchError
from alkahest.model.keys import Pattern

_NOT_A_MODEL = ": a delta is no model; add it to one first: bridge + k * delta"
_NOT_PROTECTED = ": protection belongs to the weights: bridge.protect('refiner') + delta, or delta.without('refiner')"


class Delta(Expression):
    """A difference of weights: what a variant learned. It has no numbers until it is streamed."""

    _kind = "delta"
    _elsewhere: ClassVar = {**dict.fromkeys(("save", "stream", "load_into"), _NOT_A_MODEL), "protect": _NOT_PROTECTED}

    @abstractmethod
    def at(self, key: str, rules: Rules, protected: bool = False) -> Term | None:
        """The term for one tensor; None where it is zero, as on protected tensors unless `everywhere`."""

    def only(self, pattern: str) -> Delta:
        """This delta on the tensors that ``pattern`` selects, zero elsewhere.

        Parameters
        ----------
        pattern : str
            As in ``protect``.

        Returns
        -------
        Delta

        Raises
        ------
        UnknownNameError
            If an item selects no tensor.

        Examples
        --------
        >>> merged = bridge + 5 * (variant - base).only("layers, final")
        """
        return Masked(self, Pattern(pattern, self.family).require_match(self.shapes, "only").text, True)

    def without(self, pattern: str) -> Delta:
        """This delta, zero on the tensors that ``pattern`` selects.

        Parameters
        ----------
        pattern : str
            As in ``protect``.

        Returns
        -------
        Delta

        Raises
        ------
        UnknownNameError
            If an item selects no tensor.

        Examples
        --------
        >>> merged = bridge + 5 * (variant - base).without("pad_tokens")
        """
        return Masked(self, Pattern(pattern, self.family).require_match(self.shapes, "without").text, False)

    def everywhere(self) -> Delta:
        """This delta, added to protected tensors too.

        Returns
        -------
        Delta

        Examples
        --------
        >>> refiners = (other - base).only("refiner")
        >>> merged = bridge.protect("refiner") + 5 * (variant - base) + 0.1 * refiners.everywhere()
        """
        return Everywhere(self)

    def scaled(self, factors: Mapping[str, Any] | Sequence[SupportsFloat | Param]) -> Delta:
        """This delta with a factor for each part, or along the blocks.

        Parameters
        ----------
        factors : mapping of str to float or list, or list of float
            A factor for each pattern, or a list along the blocks of the main stack, as in `lerp`. Where several
            patterns select a tensor the last one counts; where none does the factor is 1.

        Returns
        -------
        Delta

        Raises
        ------
        AlgebraError
            For one number, which is ``number * delta``, or a list for a LoRA, which does not say how many blocks there
            are.
        UnknownNameError
            If a pattern selects no tensor.

        Examples
        --------
        >>> by_part = bridge + (variant - base).scaled({"layers": 1.5, "layers.0-1": 2, "embedders": 0})
        >>> deeper_more = bridge + 5 * (variant - base).scaled([0.2, 1])
        """
        if not isinstance(factors, (Mapping, list, tuple)):
            problem = "a factor for each part is needed, or a list along the blocks"
            raise AlgebraError("scaled", problem, found=repr(factors), fix="number * delta is one factor for all")
        given = factors if isinstance(factors, Mapping) else {"*": factors}
        return ScaledParts(self, tuple((text, self._factor(text, one)) for text, one in given.items()))

    def _factor(self, text: str, factor: Any) -> Scalar:
        Pattern(text, self.family).require_match(self.shapes, "scaled")
        if not isinstance(factor, (list, tuple)):
            return scalar(factor, "scaled")
        return varied({text: factor}, "scaled", self.shapes, self.family, whole=False, partial=self.is_partial)

    def agreeing(self, signs: Delta) -> Delta:
        """This delta where it goes downhill: entries whose sign is against that of a gradient, zero elsewhere.

        After GradFix (arXiv:2510.09658). What comes over is more a step down that gradient than the delta itself: on
        the miniatures the same mask on a delta whose entries were shuffled did nearly as well
        (experiments/19-import-by-pictures).

        Parameters
        ----------
        signs : Signs
            Of `gradient_signs` or `open_signs`.

        Returns
        -------
        Delta

        Raises
        ------
        AlgebraError
            For anything but signs.
        MismatchError
            If they do not fit.

        Examples
        --------
        >>> signs = ak.gradient_signs(bridge, prompts=prompts, variant=variant, count=3, steps=4)
        >>> merged = bridge.protect("refiner") + 1.2 * (variant - base).agreeing(signs)
        """
        if not getattr(signs, "holds_signs", False):
            found = signs.text() if isinstance(signs, Expression) else repr(signs)
            fix = "ak.gradient_signs(bridge, pictures, prompts), or ak.open_signs(path)"
            raise AlgebraError("agreeing", "gradient signs are needed", found=found, fix=fix)
        return Agreeing(self, signs)

    def __add__(self, other: object) -> Any:
        if isinstance(other, Delta):
            return DeltaSum(self, other)
        if isinstance(other, Expression):
            return NotImplemented  # the weights' own + puts them first
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


@dataclass(frozen=True, repr=False)
class Difference(Delta):
    """``variant - base``."""

    variant: AnyWeights
    base: AnyWeights

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
            return terms.Plus(terms.Times(factor, variant), terms.Times(-factor, base))
        return terms.times(factor, terms.minus(variant, base))

    def _text(self, names: Names) -> tuple[str, int]:
        return f"{in_parentheses(self.variant, names, SUM)} - {in_parentheses(self.base, names, PRODUCT)}", SUM


class OfDelta(Delta):
    """A delta made from one delta."""

    delta: Delta

    @property
    def shapes(self) -> Shapes:
        return self.delta.shapes

    @property
    def is_partial(self) -> bool:
        return self.delta.is_partial


@dataclass(frozen=True, repr=False)
class Scaled(OfDelta):
    factor: float | Param
    delta: Delta

    def at(self, key: str, rules: Rules, protected: bool = False) -> Term | None:
        factor = rules.value(self.factor)
        if isinstance(self.delta, Difference) and not protected:
            return self.delta._scaled_by(factor, key, rules)
        return terms.times(factor, self.delta.at(key, rules, protected))

    def _scalars(self) -> Iterator[Any]:
        yield self.factor
        yield from self.delta._scalars()

    def _text(self, names: Names) -> tuple[str, int]:
        return f"{text_of(self.factor)} * {in_parentheses(self.delta, names, ATOM)}", PRODUCT


@dataclass(frozen=True, repr=False)
class ScaledParts(OfDelta):
    delta: Delta
    factors: tuple[tuple[str, Scalar], ...]

    def at(self, key: str, rules: Rules, protected: bool = False) -> Term | None:
        chosen = [factor for text, factor in self.factors if Pattern(text, self.family).matches(key)]
        factor = rules.value(chosen[-1], key) if chosen else 1.0
        return terms.times(factor, self.delta.at(key, rules, protected))

    def _scalars(self) -> Iterator[Any]:
        yield from (factor for _, factor in self.factors)
        yield from self.delta._scalars()

    def _text(self, names: Names) -> tuple[str, int]:
        said = [(text, _factor_text(factor)) for text, factor in self.factors]
        if [text for text, _ in said] == ["*"] and said[0][1].startswith("["):
            inside = said[0][1]
        else:
            inside = f"{{{', '.join(f'{text!r}: {factor}' for text, factor in said)}}}"
        return f"{in_parentheses(self.delta, names, ATOM)}.scaled({inside})", ATOM


def _factor_text(factor: Scalar) -> str:
    """A factor as it was given, the pattern apart."""
    return text_of(factor) if not isinstance(factor, Varied) else f"[{', '.join(map(text_of, factor.entries[0][1]))}]"


@dataclass(frozen=True, repr=False)
class Masked(OfDelta):
    delta: Delta
    pattern: str
    keep: bool

    def at(self, key: str, rules: Rules, protected: bool = False) -> Term | None:
        chosen = Pattern(self.pattern, self.family).matches(key) == self.keep
        return self.delta.at(key, rules, protected) if chosen else None

    def _text(self, names: Names) -> tuple[str, int]:
        verb = "only" if self.keep else "without"
        return f"{in_parentheses(self.delta, names, ATOM)}.{verb}({self.pattern!r})", ATOM


@dataclass(frozen=True, repr=False)
class Everywhere(OfDelta):
    delta: Delta

    def at(self, key: str, rules: Rules, protected: bool = False) -> Term | None:
        return self.delta.at(key, rules, False)

    def _text(self, names: Names) -> tuple[str, int]:
        return f"{in_parentheses(self.delta, names, ATOM)}.everywhere()", ATOM


@dataclass(frozen=True, repr=False)
class Agreeing(OfDelta):
    """A delta where its sign is against that of a gradient."""

    delta: Delta
    signs: Delta

    def __post_init__(self) -> None:
        super().__post_init__()
        require_same("agreeing", self.delta, self.signs)
        if absent := [key for key in self.delta.shapes if key not in self.signs.shapes]:
            raise MismatchError(
                "agreeing",
                f"{len(absent)} tensors of the delta have no signs",
                key=absent[0],
                fix="delta.only(...) what has some, or signs of all: ak.gradient_signs(bridge, pictures, prompts)",
            )

    def at(self, key: str, rules: Rules, protected: bool = False) -> Term | None:
        delta, signs = self.delta.at(key, rules, protected), self.signs.at(key, rules)
        if delta is None or signs is None:
            return None
        return terms.Apply(_downhill, (delta, signs), many=False, elementwise=True, settings=(), key=key)

    def _text(self, names: Names) -> tuple[str, int]:
        return f"{in_parentheses(self.delta, names, ATOM)}.agreeing({self.signs._text(names)[0]})", ATOM


def _downhill(delta: Tensor, signs: Tensor) -> Tensor:
    return torch.where(delta * signs < 0, delta, 0)


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
        return terms.plus(self.left.at(key, rules, protected), self.right.at(key, rules, protected))

    def _text(self, names: Names) -> tuple[str, int]:
        return sum_text(self.left, self.right, names), SUM


def sum_text(left: Expression, delta: Delta, names: Names) -> str:
    """The text of a sum, with a minus where the delta is a negative multiple."""
    sign = "+"
    if isinstance(delta, Scaled) and not isinstance(delta.factor, Param) and delta.factor < 0:
        sign, delta = "-", -delta
    return f"{in_parentheses(left, names, SUM)} {sign} {in_parentheses(delta, names, PRODUCT)}"

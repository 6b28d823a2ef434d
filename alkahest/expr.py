"""The algebra: weights, deltas, and the rules that join them.

    checkpoint - checkpoint = delta        number * delta = delta       delta +- delta = delta
    weights + delta = weights              weights + weights is an error

Expressions are frozen trees. Nothing is computed until one is streamed into a file or a model.
"""

from __future__ import annotations

import html
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NoReturn, Self, SupportsFloat

from alkahest import term
from alkahest.architecture import Architecture, require_same_tensors
from alkahest.errors import AlgebraError, MismatchError, UnknownNameError, nearest
from alkahest.keys import PAD_TOKENS, Pattern, part_of
from alkahest.scalar import Param, Rules, Scalar, number, scalar, text_of
from alkahest.term import Term

if TYPE_CHECKING:
    from alkahest.files import Reader
    from alkahest.stream import Saved

Shapes = Mapping[str, tuple[int, ...]]
Names = Mapping["AnyLeaf", str]
SUM, PRODUCT, ATOM = 1, 2, 3  # how tightly a text binds
_NOT_A_MODEL = ": a delta is no model; add it to one first: bridge + k * delta"
_NOT_A_DELTA = ": that is for deltas; choose before adding: bridge + (variant - base).only('layers')"
# (is a delta, name) -> what to do instead, for names that only the other kind has.
_OTHER_KIND = {
    (
        True,
        "protect",
    ): ": protection belongs to the weights: bridge.protect('refiner') + delta, or delta.without('refiner')",
    **{(True, name): _NOT_A_MODEL for name in ("save", "stream", "load_into")},
    **{(False, name): _NOT_A_DELTA for name in ("only", "without", "everywhere", "scaled")},
}
_MAX_DEPTH = 150  # a printed or bound tree takes four Python frames a level


@dataclass(frozen=True, repr=False)
class Expression:
    """What weights and deltas have in common."""

    __array_ufunc__ = None  # so that numpy.float64(2) * delta is ours to answer

    def __post_init__(self) -> None:
        if self.depth > _MAX_DEPTH:
            raise AlgebraError("expression", "nested too deeply", expected=f"at most {_MAX_DEPTH} levels")

    @property
    def children(self) -> tuple[Expression, ...]:
        """Sub-expressions, in order."""
        found: list[Expression] = []
        for item in fields(self):
            value = getattr(self, item.name)
            found += [v for v in (value if isinstance(value, tuple) else [value]) if isinstance(v, Expression)]
        return tuple(found)

    @property
    def depth(self) -> int:
        known = self.__dict__.get("_depth")
        if known is None:
            known = 1 + max((child.depth for child in self.children), default=0)
            object.__setattr__(self, "_depth", known)
        return int(known)

    def leaves(self) -> tuple[AnyLeaf, ...]:
        """The distinct checkpoints and LoRAs that this expression reads, in order of appearance."""
        found = dict.fromkeys(leaf for child in self.children for leaf in child.leaves())
        return tuple(found)

    @property
    def params(self) -> dict[str, float]:
        """Named scalars and their values."""
        found: dict[str, float] = {}
        for one in self._scalars():
            if isinstance(one, Param) and found.setdefault(one.name, one.value) != one.value:
                raise AlgebraError(
                    "param", f"{one.name!r} has two values", found=f"{found[one.name]} and {one.value}",
                    fix="use one default, or two names",
                )  # fmt: skip
        return found

    def bind(self, **values: SupportsFloat) -> Self:
        """The same expression with named scalars set: ``expression.bind(k=171.1)``."""
        known = self.params
        for name in values:
            if name not in known:
                raise UnknownNameError("bind", "no such parameter", found=repr(name), fix=nearest(name, known))
        return self._bound({name: number(value, "bind") for name, value in values.items()})

    def text(self, names: Names | None = None) -> str:
        """Canonical recipe text."""
        return self._text(names if names is not None else name_leaves(self))[0]

    def __repr__(self) -> str:
        return "\n".join([self.text(), *(f"  {line}" for line in self._notes())])

    def _repr_html_(self) -> str:
        notes = "".join(f"<div>{html.escape(line)}</div>" for line in self._notes())
        return f"<div><code>{html.escape(self.text())}</code>{notes}</div>"

    if not TYPE_CHECKING:  # a type checker should still see what is not there

        def __getattr__(self, name: str) -> NoReturn:
            hint = _OTHER_KIND.get((isinstance(self, Delta), name), "")
            raise AttributeError(f"{type(self).__name__} has no {name!r}{hint}")

    @property
    @abstractmethod
    def shapes(self) -> Shapes:
        """Canonical name -> shape of every tensor it can produce."""

    @abstractmethod
    def _text(self, names: Names) -> tuple[str, int]: ...

    def _notes(self) -> list[str]:
        return []

    def _scalars(self) -> Iterator[Scalar]:
        for child in self.children:
            yield from child._scalars()

    def _bound(self, values: Mapping[str, float]) -> Self:
        def bound(value: Any) -> Any:
            if isinstance(value, Expression):
                return value._bound(values)
            if isinstance(value, Param):
                return Param(value.name, values.get(value.name, value.value))
            return tuple(bound(item) for item in value) if isinstance(value, tuple) else value

        # Leaves hold no scalars, and copying one would reopen its file.
        return (
            self
            if isinstance(self, (Leaf, DeltaLeaf))
            else replace(self, **{f.name: bound(getattr(self, f.name)) for f in fields(self)})
        )


class Weights(Expression):
    """A complete set of tensors: a checkpoint, or what an expression makes of some."""

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
        return _refuse("+", self, other)

    def __radd__(self, other: object) -> Weights:
        return self + self if other == 0 and isinstance(other, int) else _refuse("+", self, other)

    def __sub__(self, other: object) -> Any:
        if isinstance(other, Weights):
            return Difference(self, other)
        if isinstance(other, Delta):
            return Sum(self, -other)
        return _refuse("-", self, other)

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


class Leaf(Weights):
    """Weights that are read rather than computed."""

    name: str
    files: tuple[Reader, ...] = ()
    file_names: Mapping[Reader, str]  # as recipes record them
    architecture: Architecture
    config: dict[str, Any] | None = None  # diffusers' config.json, where the files have one
    is_reproducible = True  # whether a recipe can name it

    @property
    @abstractmethod
    def storage(self) -> Mapping[str, str]:
        """Canonical name -> storage form, as `alkahest.dtypes.STORAGES` names it."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def leading(self) -> Leaf:
        return self

    def leaves(self) -> tuple[Leaf, ...]:
        return (self,)

    def at(self, key: str, rules: Rules) -> Term | None:
        return term.Source(self, key) if key in self.shapes else None

    @abstractmethod
    def read(self, key: str, start: int, stop: int, out: Any, workspace: Any) -> None:
        """Fill ``out`` (float32) with elements ``start`` to ``stop`` of a tensor, flat and row-major."""

    def _text(self, names: Names) -> tuple[str, int]:
        return names[self], ATOM


class Delta(Expression):
    """A difference of weights: what a variant learned. It has no numbers until it is streamed."""

    @abstractmethod
    def at(self, key: str, rules: Rules, protected: bool = False) -> Term | None:
        """The term for one tensor; None where it is zero, as on protected tensors unless `everywhere`."""

    @property
    def is_partial(self) -> bool:
        """Whether its ``shapes`` are some of a model's, as a LoRA's are, rather than all."""
        return False

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
        return self if other == 0 and isinstance(other, int) else _refuse("+", self, other)

    __radd__ = __add__

    def __sub__(self, other: object) -> Delta:
        if isinstance(other, Delta):
            return DeltaSum(self, -other)
        return _refuse("-", self, other)

    def __mul__(self, factor: Any) -> Delta:
        if isinstance(factor, Expression):
            return _refuse("*", self, factor)
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


class DeltaLeaf(Delta):
    """A delta that is read rather than computed: a LoRA."""

    name: str
    files: tuple[Reader, ...] = ()
    file_names: Mapping[Reader, str]
    config: dict[str, Any] | None = None

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def is_partial(self) -> bool:
        return True

    def leaves(self) -> tuple[AnyLeaf, ...]:
        return (self,)

    def at(self, key: str, rules: Rules, protected: bool = False) -> Term | None:
        return None if protected or key not in self.shapes else term.Source(self, key)

    @abstractmethod
    def read(self, key: str, start: int, stop: int, out: Any, workspace: Any) -> None:
        """Fill ``out`` (float32) with elements ``start`` to ``stop`` of a tensor, flat and row-major."""

    @abstractmethod
    def check_finite(self, key: str, operation: str) -> None:
        """Raise NonFiniteError if what the file holds for this tensor is not finite."""

    def _text(self, names: Names) -> tuple[str, int]:
        return names[self], ATOM


AnyLeaf = Leaf | DeltaLeaf


class _OfWeights(Weights):
    """Weights made from one model, which leads."""

    weights: Weights

    @property
    def leading(self) -> Leaf:
        return self.weights.leading

    @property
    def protection(self) -> tuple[str, ...]:
        return self.weights.protection


@dataclass(frozen=True, repr=False)
class Protected(_OfWeights):
    weights: Weights
    pattern: str

    @property
    def protection(self) -> tuple[str, ...]:
        return (*self.weights.protection, self.pattern)

    def at(self, key: str, rules: Rules) -> Term | None:
        return self.weights.at(key, rules)

    def _text(self, names: Names) -> tuple[str, int]:
        return f"{_wrapped(self.weights, names, ATOM)}.protect({self.pattern!r})", ATOM


@dataclass(frozen=True, repr=False)
class Sum(_OfWeights):
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
            if isinstance(leaf, DeltaLeaf):
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
        return f"{_wrapped(self.variant, names, SUM)} - {_wrapped(self.base, names, PRODUCT)}", SUM


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
        return f"{text_of(self.factor)} * {_wrapped(self.delta, names, ATOM)}", PRODUCT


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
        return f"{_wrapped(self.delta, names, ATOM)}.scaled({{{inside}}})", ATOM


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
        return f"{_wrapped(self.delta, names, ATOM)}.{verb}({self.pattern!r})", ATOM


@dataclass(frozen=True, repr=False)
class Everywhere(_OfDelta):
    delta: Delta

    def at(self, key: str, rules: Rules, protected: bool = False) -> Term | None:
        return self.delta.at(key, rules, False)

    def _text(self, names: Names) -> tuple[str, int]:
        return f"{_wrapped(self.delta, names, ATOM)}.everywhere()", ATOM


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


def name_leaves(*expressions: Expression) -> dict[AnyLeaf, str]:
    """A distinct identifier for every checkpoint and LoRA in the expressions, from their own names."""
    names: dict[AnyLeaf, str] = {}
    for leaf in dict.fromkeys(leaf for expression in expressions for leaf in expression.leaves()):
        name, number = leaf.name, 2
        while name in names.values():
            name, number = f"{leaf.name}_{number}", number + 1
        names[leaf] = name
    return names


def require_same(operation: str, left: Expression, right: Expression) -> None:
    """Raise MismatchError unless both are about the same tensors; a LoRA's must be among the other's."""
    some = [isinstance(side, Delta) and side.is_partial for side in (left, right)]
    if not any(some):
        require_same_tensors(operation, left.shapes, right.shapes, left.text, right.text)
        return
    for key in left.shapes.keys() & right.shapes.keys():
        if left.shapes[key] != right.shapes[key]:
            found = f"{left.text()}: {left.shapes[key]}; {right.text()}: {right.shapes[key]}"
            raise MismatchError(operation, "a tensor has different shapes", key=key, found=found, fix="use a LoRA of this model")  # fmt: skip
    for part, whole, is_part in ((left, right, some[0]), (right, left, some[1])):
        lacking = [key for key in part.shapes if key not in whole.shapes]
        if is_part and not all(some) and lacking:
            raise MismatchError(
                operation, f"the LoRA changes {len(lacking)} tensors that the model does not have", key=lacking[0],
                found=part.text(), fix=f"use a LoRA of this model; {nearest(lacking[0], whole.shapes)}",
            )  # fmt: skip


def _refuse(symbol: str, left: Expression, right: object) -> NoReturn:
    names = name_leaves(*(side for side in (left, right) if isinstance(side, Expression)))

    def kind(side: object) -> str:
        return "weights" if isinstance(side, Weights) else "delta" if isinstance(side, Delta) else type(side).__name__

    def shown(side: object) -> str:
        return _wrapped(side, names, PRODUCT) if isinstance(side, Expression) else repr(side)

    lora = left if isinstance(left, DeltaLeaf) else None
    raise AlgebraError(
        f"{kind(left)} {symbol} {kind(right)}", "this has no meaning", found=f"{shown(left)} {symbol} {shown(right)}",
        expected="weights - weights, weights + delta, delta + delta or number * delta",
        fix=f"{lora.name} is a LoRA, which is a difference already" if lora is not None and symbol == "-" else None,
    )  # fmt: skip


def _joined(left: Expression, delta: Delta, names: Names) -> str:
    sign = "+"
    if isinstance(delta, Scaled) and not isinstance(delta.factor, Param) and delta.factor < 0:
        sign, delta = "-", -delta
    return f"{_wrapped(left, names, SUM)} {sign} {_wrapped(delta, names, PRODUCT)}"


def _wrapped(expression: Expression, names: Names, least: int) -> str:
    text, level = expression._text(names)
    return text if level >= least else f"({text})"

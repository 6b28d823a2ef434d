"""Merge methods: each one decorated function, its parameters read from its signature.

    @method()
    def halve(delta: Tensor, *, share: float = 0.5) -> Tensor: ...

Operands come first: single tensors, or one ``list[Tensor]`` of any number. Keyword-only arguments
are settings. A parameter ``uniform: Tensor`` receives seeded random numbers in (0, 1), one per
element, and gives the method a ``seed`` setting. Operands are flat float32 tensors; ones that are
zero for a tensor (protected or left out by ``only``) are not in the list.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import numpy as np
import torch

from alkahest import random, term
from alkahest.errors import AlgebraError, UnknownNameError, nearest
from alkahest.expr import Delta, Expression, Names, Shapes, Weights, require_same
from alkahest.mixture import OfModels, require_mixable
from alkahest.scalar import Rules, Scalar, scalar, text_of
from alkahest.term import Term

Tensor = torch.Tensor


@dataclass(frozen=True)
class Method:
    """A registered merge method: call it with expressions to get an expression."""

    name: str
    function: Callable[..., Tensor]
    makes: type[Expression]
    many: bool
    operands: int
    defaults: Mapping[str, float]
    random: bool
    elementwise: bool

    def __call__(self, *operands: Any, **settings: Any) -> Any:
        given = (
            tuple(operands[0])
            if self.many and len(operands) == 1 and isinstance(operands[0], (list, tuple))
            else operands
        )
        if (len(given) < 1) if self.many else (len(given) != self.operands):
            expected = "at least one" if self.many else self.operands
            settings_by_name = ", ".join(f"{name}=" for name in self.defaults)
            raise AlgebraError(
                self.name, "wrong number of operands", expected=expected, found=len(given),
                fix=f"settings go by name: {settings_by_name}" if self.defaults else None,
            )  # fmt: skip
        for operand in given:
            if not isinstance(operand, self.makes):
                kind = "deltas" if self.makes is Delta else "weights"
                found = operand.text() if isinstance(operand, Expression) else repr(operand)
                raise AlgebraError(self.name, f"the operands must be {kind}", found=found)
        for name in settings:
            if name not in self.defaults:
                raise UnknownNameError(self.name, "unknown setting", found=repr(name), fix=nearest(name, self.defaults))
        values = {**self.defaults, **settings}
        chosen = tuple((name, scalar(value, f"{self.name} {name}")) for name, value in values.items())
        return (MergedDelta if self.makes is Delta else MergedWeights)(self, given, chosen)


REGISTRY: dict[str, Method] = {}


def method(
    *, weights: bool = False, elementwise: bool = False
) -> Callable[[Callable[..., Tensor]], Callable[..., Any]]:
    """Register a merge method over deltas, or over complete weights with ``weights=True``.

    ``elementwise=True`` lets it run block by block; otherwise it gets whole tensors, and memory
    grows with the largest tensor (157 MB in float32 for a feed-forward matrix, times the operands).
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Any]:
        name, hints = function.__name__, get_type_hints(function)
        positional, defaults, draws = [], {}, False
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name == "uniform":
                draws = True
            elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                if parameter.default is inspect.Parameter.empty:
                    raise AlgebraError("method", f"setting {parameter.name!r} of {name} needs a default")
                defaults[parameter.name] = float(parameter.default)
            else:
                positional.append(hints[parameter.name])
        many = positional == [list[Tensor]]
        if (not many and any(hint is not Tensor for hint in positional)) or not positional:
            raise AlgebraError("method", f"operands of {name} must be Tensor, or one list[Tensor]")
        if name in REGISTRY:
            raise AlgebraError("method", f"{name!r} is registered already")
        if draws:
            defaults["seed"] = 0.0
        makes = Weights if weights else Delta
        made = Method(name, function, makes, many, len(positional), defaults, draws, elementwise)
        REGISTRY[name] = made

        # A plain function, so that help() shows what this method does and takes.
        def build(*operands: Any, **settings: Any) -> Any:
            return made(*operands, **settings)

        build.__name__, build.__qualname__, build.__doc__ = name, name, function.__doc__
        kept = [p for p in inspect.signature(function).parameters.values() if p.name != "uniform"]
        if draws:
            kept.append(inspect.Parameter("seed", inspect.Parameter.KEYWORD_ONLY, default=0))
        build.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [p.replace(annotation=inspect.Parameter.empty) for p in kept]
        )
        return build

    return register


class _Merged(Expression):
    method: Method
    operands: tuple[Any, ...]
    settings: tuple[tuple[str, Scalar], ...]

    def _applied(self, key: str, terms: list[Term], rules: Rules) -> Term:
        values: dict[str, Any] = {name: rules.value(value) for name, value in self.settings}
        if self.method.random:
            values["uniform"] = _Uniform(int(values.pop("seed")), self.method.name)
        settings = tuple(values.items())
        m = self.method
        return term.Apply(m.function, tuple(terms), m.many, m.elementwise, settings, key)

    def _scalars(self) -> Iterator[Scalar]:
        yield from (value for _, value in self.settings)
        yield from super()._scalars()

    def _text(self, names: Names) -> tuple[str, int]:
        operands = ", ".join(operand._text(names)[0] for operand in self.operands)
        settings = "".join(f", {name}={text_of(value)}" for name, value in self.settings)
        return f"{self.method.name}({f'[{operands}]' if self.method.many else operands}{settings})", 3


@dataclass(frozen=True, repr=False)
class MergedDelta(_Merged, Delta):
    method: Method
    operands: tuple[Delta, ...]
    settings: tuple[tuple[str, Scalar], ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        for other in self.operands[1:]:
            require_same(self.method.name, self.operands[0], other)

    @property
    def shapes(self) -> Shapes:
        return self.operands[0].shapes

    def at(self, key: str, rules: Rules, protected: bool = False) -> Term | None:
        terms = [operand.at(key, rules, protected) for operand in self.operands]
        present = [one for one in terms if one is not None]
        return (
            self._applied(key, present, rules) if present and (self.method.many or len(present) == len(terms)) else None
        )


@dataclass(frozen=True, repr=False)
class MergedWeights(_Merged, OfModels):
    method: Method
    operands: tuple[Weights, ...]
    settings: tuple[tuple[str, Scalar], ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        require_mixable(self.method.name, self.operands)

    def at(self, key: str, rules: Rules) -> Term | None:
        first, *others = [operand.at(key, rules) for operand in self.operands]
        if (
            first is None
            or self.keeps_first(key, rules)
            or any(other is None for other in others)
            or all(other == first for other in others)
        ):
            return first
        return self._applied(key, [first, *(other for other in others if other is not None)], rules)


@dataclass(frozen=True)
class _Uniform:
    seed: int
    name: str

    def __call__(self, key: str, start: int, stop: int) -> Tensor:
        numbers = random.uniform(self.seed, self.name, key, start, stop - start)
        return torch.from_numpy(numbers.astype(np.float32))


@method()
def ties(deltas: list[Tensor], *, density: float = 0.2) -> Tensor:
    """Trim each delta to its ``density`` largest entries, elect a sign per entry, average what agrees.

    Yadav et al. 2023, arXiv:2306.01708, algorithm 1. Tensors are trimmed one by one (q, k and v apart).
    """
    _require_share("ties", "density", density)
    stacked = torch.stack([_trimmed(delta, density) for delta in deltas])
    elected = torch.sign(stacked.sum(dim=0))
    agrees = (torch.sign(stacked) == elected) & (elected != 0)
    total = torch.where(agrees, stacked, 0).sum(dim=0)
    return total / agrees.sum(dim=0).clamp(min=1)


@method(elementwise=True)
def dare(delta: Tensor, *, drop: float = 0.9, uniform: Tensor) -> Tensor:
    """Drop entries at random with probability ``drop`` and divide the rest by ``1 - drop``.

    Yu et al. 2023, arXiv:2311.03099, section 3.2. Give each delta of a merge a ``seed`` of its own.
    """
    if not 0 <= drop < 1:
        raise AlgebraError("dare", "drop is out of range", expected="0 <= drop < 1", found=drop)
    return torch.where(uniform.to(delta.device) < drop, 0, delta / (1 - drop))


@method(weights=True)
def slerp(a: Tensor, b: Tensor, *, t: float = 0.5) -> Tensor:
    """Go from ``a`` to ``b`` along the arc between them, each tensor as one vector.

    Shoemake 1985, "Animating rotation with quaternion curves"; weights keep their own lengths, as
    in mergekit. Nearly parallel tensors are mixed linearly, where the two formulas agree.
    """
    cosine = _dot(a, b) / (_dot(a, a) * _dot(b, b)) ** 0.5 if a.any() and b.any() else 1.0
    if abs(cosine) > 0.9995:
        return a + t * (b - a)
    angle = math.acos(max(-1.0, cosine))
    share_a, share_b = (math.sin(share * angle) / math.sin(angle) for share in (1 - t, t))
    return a * share_a + b * share_b


def _trimmed(delta: Tensor, density: float) -> Tensor:
    keep = round(density * delta.numel())
    if keep == 0:
        return torch.zeros_like(delta)
    smallest_kept = torch.kthvalue(delta.abs(), delta.numel() - keep + 1).values
    return torch.where(delta.abs() >= smallest_kept, delta, 0)


def _dot(a: Tensor, b: Tensor) -> float:
    # In pieces and float64, so that the angle does not depend on how torch splits the sum over threads.
    a, b, step = a.cpu(), b.cpu(), 1 << 15  # MPS has no float64
    ranges = (slice(start, start + step) for start in range(0, a.numel(), step))
    return sum(float(torch.dot(a[chosen].double(), b[chosen].double())) for chosen in ranges)


def _require_share(operation: str, name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise AlgebraError(operation, f"{name} is out of range", expected=f"0 < {name} <= 1", found=value)

"""Merge methods: each one decorated function, its parameters read from its signature.

    @method()
    def halve(delta: Tensor, *, share: float = 0.5) -> Tensor: ...

Operands come first: single tensors, or one ``list[Tensor]`` of any number. Keyword-only arguments
are settings: ``float``, ``int`` or ``bool``, of which a call may let the first vary over the
tensors; one that is annotated `PerOperand` receives a number for each operand. A parameter
``uniform: Tensor`` receives seeded random numbers in (0, 1), one per element, and gives the method
a ``seed`` setting; a parameter ``shape`` receives the tensor's shape.
Operands are flat float32 tensors; ones that are zero for a tensor (protected or left out by
``only``) are not in the list. Those that ship are in `alkahest.algebra.delta_methods`,
`alkahest.algebra.sparse_methods` and `alkahest.algebra.model_methods`.
"""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

import numpy as np
import torch

from alkahest.algebra.deltas import Delta
from alkahest.algebra.expression import Expression, Names, require_same
from alkahest.algebra.mixtures import OfModels, require_mixable
from alkahest.algebra.weights import Weights
from alkahest.engine.readable import Shapes
from alkahest.engine.scalars import Param, Rules, Scalar, scalar, text_of, varied
from alkahest.engine.terms import Apply, Term
from alkahest.errors import AlgebraError, unknown
from alkahest.model import seeded

Tensor = torch.Tensor
PerOperand = tuple[float, ...]  # a setting with a number for each operand; its default has one for all


@dataclass(frozen=True)
class Setting:
    """A setting of a merge method: its default and what may be given for it."""

    default: float
    kind: Any = float  # float, int, bool or PerOperand

    @property
    def is_neutral(self) -> bool:
        """Whether its default leaves things as they are, so that a text says it only where it is another."""
        return self.default == 1 and self.kind in (bool, PerOperand)

    def checked(self, value: Any, operation: str, operands: Sequence[Expression]) -> Scalar | tuple[Scalar, ...]:
        """A value for these operands, refused if it is none."""
        if self.kind in (int, bool):
            return self.whole(value, operation)
        family, partial = operands[0].family, any(one.is_partial for one in operands)
        shapes = {key: shape for one in operands for key, shape in one.shapes.items()}
        if self.kind is not PerOperand or not isinstance(value, (list, tuple)):
            return varied(value, operation, shapes, family, partial=partial)
        if len(value) != len(operands):
            found, fix = f"{len(value)} for {len(operands)}", "{'*': [...]} if the list goes along the blocks"
            raise AlgebraError(operation, "a list has a number for each operand", found=found, fix=fix)
        return tuple(varied(one, operation, shapes, family, partial=partial) for one in value)

    def whole(self, value: Any, operation: str) -> float | Param:
        """A whole number, or 0 or 1 for what is on or off; refused if it is none."""
        found = scalar(int(value) if isinstance(value, bool) and self.kind is bool else value, operation)
        given = found.value if isinstance(found, Param) else found
        if self.kind is bool and given not in (0, 1):
            raise AlgebraError(operation, "this is on or off", expected="True or False", found=repr(value))
        if given != int(given):
            raise AlgebraError(operation, "a whole number is needed", found=repr(value))
        return found


@dataclass(frozen=True)
class Method:
    """A registered merge method: call it with expressions to get an expression."""

    name: str
    function: Callable[..., Tensor]
    makes: type[Expression]
    many: bool
    operands: int
    settings: Mapping[str, Setting]
    random: bool
    shaped: bool
    elementwise: bool
    definition: str  # empty for those that ship; tells apart what a notebook defines one after the other

    def __call__(self, *operands: Any, **settings: Any) -> Any:
        for name in settings:
            if name not in self.settings:
                raise unknown(self.name, "unknown setting", name, self.settings)
        given = (
            tuple(operands[0])
            if self.many and len(operands) == 1 and isinstance(operands[0], (list, tuple))
            else operands
        )
        if (len(given) < 1) if self.many else (len(given) != self.operands):
            expected = "at least one" if self.many else self.operands
            settings_by_name = ", ".join(f"{name}=" for name in self.settings)
            raise AlgebraError(
                self.name,
                "wrong number of operands",
                expected=expected,
                found=len(given),
                fix=f"settings go by name: {settings_by_name}" if self.settings else None,
            )
        for operand in given:
            if not isinstance(operand, self.makes):
                kind = "deltas" if self.makes is Delta else "weights"
                found = operand.text() if isinstance(operand, Expression) else repr(operand)
                raise AlgebraError(self.name, f"the operands must be {kind}", found=found)
        chosen = tuple(
            (name, setting.checked(settings.get(name, setting.default), f"{self.name} {name}", given))
            for name, setting in self.settings.items()
        )
        return (MergedDelta if self.makes is Delta else MergedWeights)(self, given, chosen)


REGISTRY: dict[str, Method] = {}
RESERVED = (
    "lerp",
    "weighted_sum",
    "param",
    "made_up",
    "apply_lora",
    "union",
)  # names that mean something else in a recipe
_GIVEN = ("uniform", "shape")  # parameters that evaluation fills in


def method(
    *, weights: bool = False, elementwise: bool = False
) -> Callable[[Callable[..., Tensor]], Callable[..., Any]]:
    """Register a merge method over deltas, or over complete weights.

    The function under it takes flat float32 tensors, or one ``list[Tensor]``; keyword-only arguments are its settings.
    Recipes, the command line and ComfyUI's nodes know it by its name from then on, in this process.

    Parameters
    ----------
    weights : bool, default False
        Whether it takes complete weights instead of deltas.
    elementwise : bool, default False
        Lets it run block by block; otherwise it gets whole tensors, and memory grows with the largest tensor (157 MB in
        float32 for a feed-forward matrix, times the operands).

    Returns
    -------
    decorator
        It returns a function that takes expressions and gives one.

    Raises
    ------
    AlgebraError
        If the name is taken, a setting has no default, or operands are something else than tensors.

    Examples
    --------
    >>> import torch
    >>> @ak.method(elementwise=True)
    ... def clipped(delta: torch.Tensor, *, most: float = 0.01) -> torch.Tensor:
    ...     return delta.clamp(-most, most)
    >>> merged = bridge + clipped(variant - base, most=0.02)
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Any]:
        made = _method_of(function, Weights if weights else Delta, elementwise)
        _require_free(made)
        REGISTRY[made.name] = made

        # A plain function, so that help() and Tab show what this method takes.
        def build(*operands: Any, **settings: Any) -> Any:
            return made(*operands, **settings)

        build.__name__, build.__qualname__, build.__doc__ = made.name, made.name, function.__doc__
        build.__module__ = function.__module__
        build.__signature__ = _signature_of(made)  # type: ignore[attr-defined]
        return build

    return register


def _method_of(function: Callable[..., Tensor], makes: type[Expression], elementwise: bool) -> Method:
    """What a function's signature says of the method that it is."""
    name, hints = function.__name__, get_type_hints(function)
    parameters = inspect.signature(function).parameters
    operands = [hints[one.name] for one in parameters.values() if one.kind is not one.KEYWORD_ONLY]
    settings = [one for one in parameters.values() if one.kind is one.KEYWORD_ONLY and one.name not in _GIVEN]
    if lacking := [one.name for one in settings if one.default is one.empty]:
        raise AlgebraError("method", f"setting {lacking[0]!r} of {name} needs a default")
    many = operands == [list[Tensor]]
    if (not many and any(hint is not Tensor for hint in operands)) or not operands:
        raise AlgebraError("method", f"operands of {name} must be Tensor, or one list[Tensor]")
    made = {one.name: _setting_of(one, hints.get(one.name)) for one in settings}
    draws = "uniform" in parameters
    if draws:
        made["seed"] = Setting(0.0, int)
    definition = "" if function.__module__.startswith("alkahest.") else uuid.uuid4().hex
    shaped = "shape" in parameters
    return Method(name, function, makes, many, len(operands), made, draws, shaped, elementwise, definition)


def _setting_of(parameter: inspect.Parameter, hint: Any) -> Setting:
    default = parameter.default[0] if hint == PerOperand else parameter.default
    return Setting(float(default), hint if hint in (int, bool) else PerOperand if hint == PerOperand else float)


def _require_free(made: Method) -> None:
    """Raise AlgebraError if the name is taken; one that was defined in the same place, as by running a cell again,
    is replaced.
    """
    before = REGISTRY.get(made.name)
    places = [(one.function.__module__, one.function.__qualname__) for one in (before, made) if one is not None]
    if made.name in RESERVED or (before is not None and places[0] != places[1]):
        raise AlgebraError(
            "method",
            f"{made.name!r} is taken",
            found=places[0][0] if before is not None else "a function of recipes",
            fix="give it another name",
        )


_SHOWN = {float: "Share", PerOperand: "Share | Sequence[Share]"}


def _signature_of(made: Method) -> inspect.Signature:
    """Operands and settings as a person gives them."""
    operand = f"Sequence[{made.makes.__name__}]" if made.many else made.makes.__name__
    parameters = inspect.signature(made.function).parameters.values()
    kept = [one.replace(annotation=operand) for one in parameters if one.kind is not one.KEYWORD_ONLY]
    for name, setting in made.settings.items():
        value: float = int(setting.default) if setting.default == int(setting.default) else setting.default
        default, shown = (bool(value), "bool") if setting.kind is bool else (value, _SHOWN.get(setting.kind, "int"))
        kept.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=shown))
    return inspect.Signature(kept, return_annotation=made.makes.__name__)


class _Merged(Expression):
    method: Method
    operands: tuple[Any, ...]
    settings: tuple[tuple[str, Scalar | tuple[Scalar, ...]], ...]

    def definitions(self) -> tuple[str, ...]:
        return (*filter(None, [self.method.definition]), *super().definitions())

    def _term(self, key: str, operands: list[Term], rules: Rules, of: Sequence[int]) -> Term:
        """Its term; ``of`` are the numbers of the operands that have this tensor."""

        def value(name: str, given: Scalar | tuple[Scalar, ...]) -> Any:
            setting = self.method.settings[name]
            if setting.kind is not PerOperand:
                assert not isinstance(given, tuple)
                found = rules.value(given, key)  # a named one may have been moved since it was checked
                return setting.whole(found, f"{self.method.name} {name}") if setting.kind in (int, bool) else found
            each = given if isinstance(given, tuple) else (given,) * len(self.operands)
            return tuple(rules.value(each[number], key) for number in of)

        values: dict[str, Any] = {name: value(name, given) for name, given in self.settings}
        if self.method.random:
            values["uniform"] = _Uniform(int(values.pop("seed")), self.method.name)
        if self.method.shaped:
            values["shape"] = self.shapes[key]
        settings = tuple(values.items())
        m = self.method
        return Apply(m.function, tuple(operands), m.many, m.elementwise, settings, key)

    def _scalars(self) -> Iterator[Any]:
        yield from (value for _, value in self.settings)
        yield from super()._scalars()

    def _text(self, names: Names) -> tuple[str, int]:
        operands = ", ".join(operand._text(names)[0] for operand in self.operands)
        said = [
            (name, value)
            for name, value in self.settings
            if not (self.method.settings[name].is_neutral and value == self.method.settings[name].default)
        ]
        settings = "".join(f", {name}={_text_of(value)}" for name, value in said)
        return f"{self.method.name}({f'[{operands}]' if self.method.many else operands}{settings})", 3


def _text_of(value: Scalar | tuple[Scalar, ...]) -> str:
    return f"[{', '.join(map(text_of, value))}]" if isinstance(value, tuple) else text_of(value)


@dataclass(frozen=True, repr=False)
class MergedDelta(_Merged, Delta):
    method: Method
    operands: tuple[Delta, ...]
    settings: tuple[tuple[str, Scalar | tuple[Scalar, ...]], ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        for other in self.operands[1:]:
            require_same(self.method.name, self.operands[0], other)

    @property
    def shapes(self) -> Shapes:
        whole = next((one for one in self.operands if not one.is_partial), None)
        if whole is not None:
            return whole.shapes
        return {key: shape for one in self.operands for key, shape in one.shapes.items()}

    @property
    def is_partial(self) -> bool:
        return all(operand.is_partial for operand in self.operands)

    def at(self, key: str, rules: Rules, protected: bool = False) -> Term | None:
        terms = [operand.at(key, rules, protected) for operand in self.operands]
        of = [number for number, one in enumerate(terms) if one is not None]
        if not of or (len(of) < len(terms) and not self.method.many):
            return None
        return self._term(key, [one for one in terms if one is not None], rules, of)


@dataclass(frozen=True, repr=False)
class MergedWeights(_Merged, OfModels):
    method: Method
    operands: tuple[Weights, ...]
    settings: tuple[tuple[str, Scalar | tuple[Scalar, ...]], ...]

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
        present = [first, *(other for other in others if other is not None)]
        return self._term(key, present, rules, range(len(present)))


@dataclass(frozen=True)
class _Uniform:
    seed: int
    name: str

    def __call__(self, key: str, start: int, stop: int) -> Tensor:
        numbers = seeded.uniform(self.seed, self.name, key, start, stop - start)
        return torch.from_numpy(numbers.astype(np.float32))


def dot(a: Tensor, b: Tensor) -> float:
    """The dot product of two flat tensors, whatever torch's threads: in pieces, and in float64."""
    a, b, step = a.cpu(), b.cpu(), 1 << 15  # MPS has no float64
    ranges = (slice(start, start + step) for start in range(0, a.numel(), step))
    return sum(float(torch.dot(a[chosen].double(), b[chosen].double())) for chosen in ranges)


def require_within(operation: str, name: str, value: float, low: float, high: float, closed: bool = False) -> None:
    """Raise AlgebraError unless ``low < value <= high``, or ``low <= value <= high`` if ``closed``."""
    if not (low < value <= high or (closed and value == low)):
        raise AlgebraError(
            operation,
            f"{name} is out of range",
            expected=f"{low:g} {'<=' if closed else '<'} {name} <= {high:g}",
            found=value,
        )

"""Numbers in expressions: plain ones, and named ones that a slider or a sweep can move."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, SupportsFloat

from alkahest.errors import AlgebraError
from alkahest.model.keys import Pattern

if TYPE_CHECKING:
    from alkahest.engine.readable import Shapes
    from alkahest.model.families import Family


@dataclass(frozen=True)
class Param:
    """A named scalar; see `param`."""

    name: str  # by which `bind` and sliders know it
    value: float  # that it has now

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise AlgebraError("param", "a parameter needs a plain name", found=repr(self.name), fix="such as 'k'")

    def __repr__(self) -> str:
        return f"param({self.name!r}, {text_of(self.value)})"


@dataclass(frozen=True)
class Varied:
    """A number that differs from tensor to tensor: by part, and along the blocks of the main stack.

    Each entry is a pattern and the values that are spread over the blocks, one value being the same for all. The last
    entry whose pattern selects a tensor counts.
    """

    entries: tuple[tuple[str, tuple[float | Param, ...]], ...]
    family: Family
    blocks: int  # of the main stack

    def at(self, key: str, rules: Rules) -> float:
        """The value for one tensor: linear between the two nearest, the first before the stack, the last after it."""
        values = next(values for text, values in reversed(self.entries) if Pattern(text, self.family).matches(key))
        numbers = [rules.value(one) for one in values]
        place = self.family.place_in_main(key, self.blocks) * (len(numbers) - 1)
        left = min(int(place), max(len(numbers) - 2, 0))
        share = place - left
        return numbers[left] if share == 0 else (1 - share) * numbers[left] + share * numbers[left + 1]

    def bound(self, values: Mapping[str, float]) -> Varied:
        """The same with named scalars set."""
        entries = [
            (text, tuple(Param(n.name, values.get(n.name, n.value)) if isinstance(n, Param) else n for n in numbers))
            for text, numbers in self.entries
        ]
        return replace(self, entries=tuple(entries))

    def __repr__(self) -> str:
        return varied_text(self.entries)


Scalar = float | Param | Varied


def varied_text(entries: Sequence[tuple[str, Sequence[float | Param]]]) -> str:
    """Recipe text of patterns and their values: of all tensors' alone without the pattern."""

    def shown(values: Sequence[float | Param]) -> str:
        return text_of(values[0]) if len(values) == 1 else f"[{', '.join(map(text_of, values))}]"

    if len(entries) == 1 and entries[0][0] == "*":
        return shown(entries[0][1])
    return f"{{{', '.join(f'{text!r}: {shown(values)}' for text, values in entries)}}}"


@dataclass(frozen=True)
class Rules:
    """How an expression is evaluated: values of named scalars, and ComfyUI's order of operations or ours."""

    params: Mapping[str, float] = field(default_factory=dict)
    comfy_compatible: bool = False

    def value(self, scalar: Scalar, key: str | None = None) -> float:
        """The number that a scalar stands for, for one tensor if it is `Varied`."""
        if isinstance(scalar, Varied):
            assert key is not None
            return scalar.at(key, self)
        return self.params.get(scalar.name, scalar.value) if isinstance(scalar, Param) else scalar


def param(name: str, default: SupportsFloat) -> Param:
    """A named scalar: ``ak.param("k", 1.0) * delta`` can be moved later by ``bind(k=171.1)``.

    Parameters
    ----------
    name : str
        An identifier; recipes, sweeps and sliders know the scalar by it.
    default : float
        Its value until it is moved.

    Returns
    -------
    Param

    Raises
    ------
    AlgebraError
        If the name is none, or the default is no finite number.

    Examples
    --------
    >>> merged = bridge.protect("refiner") + ak.param("k", 1.0) * (variant - base)
    >>> merged.bind(k=171.1).text()
    "bridge.protect('refiner') + param('k', 171.1) * (variant - base)"
    """
    return Param(name, number(default, "param"))


def scalar(value: Any, operation: str) -> float | Param:
    return value if isinstance(value, Param) else number(value, operation)


def varied(
    value: Any, operation: str, shapes: Shapes, family: Family, *, whole: bool = True, partial: bool = False
) -> Scalar:
    """A scalar from a number, a list along the blocks of the main stack, or a mapping from patterns to either.

    With ``whole`` every tensor must be selected by some pattern; a ``partial`` model, as a LoRA is one, does not say
    how many blocks there are, so it takes no list. Raises AlgebraError or UnknownNameError.
    """
    if isinstance(value, Varied):
        value = dict(value.entries)
    given = value if isinstance(value, Mapping) else {"*": value}
    if not isinstance(value, Mapping) and not isinstance(value, (list, tuple)):
        return scalar(value, operation)
    entries = []
    for text, one in given.items():
        pattern = Pattern(text, family).require_match(shapes, operation)
        numbers = tuple(scalar(item, operation) for item in (one if isinstance(one, (list, tuple)) else [one]))
        in_stack = any(pattern.matches(key) for key in shapes if key.startswith(f"{family.main}."))
        if not numbers or (len(numbers) > 1 and not in_stack):
            problem = f"a list goes along the blocks of {family.main}, of which {text!r} selects none"
            raise AlgebraError(operation, problem if numbers else "the list of values is empty", fix="give one number")
        if len(numbers) > 1 and partial:
            problem = f"a LoRA does not say how many blocks its model has, and {text!r} is given a list"
            raise AlgebraError(operation, problem, fix="name the blocks: {'layers.0-9': 0.5, 'layers.10-29': 1}")
        entries.append((text, numbers))
    made = Varied(tuple(entries), family, family.depth(shapes))
    left = [key for key in shapes if not any(Pattern(text, family).matches(key) for text, _ in entries)]
    if whole and left:
        raise AlgebraError(
            operation,
            f"{len(left)} tensors are given no value",
            key=left[0],
            found=repr(made),
            fix=f"say first what holds for all: {{'*': 0.5, {repr(made)[1:]}",
        )
    return made


def named_in(value: Any) -> Iterator[Param]:
    """The named scalars in a scalar, or in several."""
    if isinstance(value, Param):
        yield value
    for one in value.entries if isinstance(value, Varied) else value if isinstance(value, tuple) else ():
        yield from named_in(one)


def number(value: Any, operation: str) -> float:
    """A finite float from anything with ``__float__``; AlgebraError for anything else."""
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        raise AlgebraError(operation, "a number is needed", found=f"{type(value).__name__} {value!r:.80}")
    try:
        result = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise AlgebraError(operation, "a single number is needed", found=str(error)) from None
    if not math.isfinite(result):
        raise AlgebraError(operation, "the number is not finite", found=result)
    return result


def text_of(value: Scalar) -> str:
    """Recipe text of a number: the shortest that reads back as the same float."""
    if isinstance(value, (Param, Varied)):
        return repr(value)
    return repr(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)

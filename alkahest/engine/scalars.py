"""Numbers in expressions: plain ones, and named ones that a slider or a sweep can move."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

from alkahest.errors import AlgebraError


@dataclass(frozen=True)
class Param:
    """A named scalar; see `param`."""

    name: str
    value: float

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise AlgebraError("param", "a parameter needs a plain name", found=repr(self.name), fix="such as 'k'")

    def __repr__(self) -> str:
        return f"param({self.name!r}, {text_of(self.value)})"


Scalar = float | Param


@dataclass(frozen=True)
class Rules:
    """How an expression is evaluated: values of named scalars, and ComfyUI's order of operations or ours."""

    params: Mapping[str, float] = field(default_factory=dict)
    comfy_compatible: bool = False

    def value(self, scalar: Scalar) -> float:
        return self.params.get(scalar.name, scalar.value) if isinstance(scalar, Param) else scalar


def param(name: str, default: SupportsFloat) -> Param:
    """A named scalar: ``ak.param("k", 1.0) * delta`` can be moved later by ``bind(k=171.1)``."""
    return Param(name, number(default, "param"))


def scalar(value: Any, operation: str) -> Scalar:
    return value if isinstance(value, Param) else number(value, operation)


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
    if isinstance(value, Param):
        return repr(value)
    return repr(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)

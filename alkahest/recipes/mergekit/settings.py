"""mergekit's parameters as numbers of a recipe: filters as patterns, gradients as lists along the blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alkahest.engine.scalars import varied_text
from alkahest.model.families import FAMILIES, Family
from alkahest.model.keys import Pattern
from alkahest.recipes.mergekit.config import Config

_BLOCKS = 40  # of the stacks by whose names a filter's pattern is checked


@dataclass(frozen=True)
class Value:
    """A parameter's value: patterns and the numbers of each, the last pattern that selects a tensor counting."""

    entries: tuple[tuple[str, tuple[float, ...]], ...]

    @property
    def plain(self) -> float | None:
        """The one number that it is, if it is one."""
        (text, numbers), *more = self.entries
        return numbers[0] if not more and text == "*" and len(numbers) == 1 else None

    @property
    def numbers(self) -> list[float]:
        return [number for _, numbers in self.entries for number in numbers]

    def mapped(self, change: Callable[[float], float]) -> Value:
        """The same with every number changed, by what keeps the way between two straight."""
        return Value(tuple((text, tuple(change(one) for one in numbers)) for text, numbers in self.entries))

    @property
    def text(self) -> str:
        """As a setting of a recipe."""
        return varied_text(self.entries)

    @property
    def factors(self) -> str:
        """As the argument of ``scaled``."""
        return f"{{'*': {self.text}}}" if self.plain is not None else self.text


def constant(number: float) -> Value:
    """A value that is one number everywhere."""
    return Value((("*", (number,)),))


def value_of(config: Config, name: str, scopes: Sequence[Mapping[str, Any]], default: float | None) -> Value:
    """A number for every tensor, from the first scope that has one for it, as mergekit looks them up."""
    found: list[tuple[str | None, tuple[float, ...]]] = []
    for scope in scopes:
        if name in scope:
            found.extend(_conditions(config, name, scope[name]))
    if default is not None:
        found.append((None, (default,)))
    last = next((place for place, (condition, _) in enumerate(found) if condition is None), None)
    if last is None:
        fix = f"parameters: {name}: NUMBER, for the model or for all"
        problem = f"{name} has no value where no filter selects a tensor" if found else f"{name} is missing"
        raise config.refusal(problem, fix=fix)
    entries = []
    for condition, numbers in reversed(found[: last + 1]):
        entries.extend(_entry(config, condition, numbers) if condition is not None else [("*", numbers)])
    return Value(tuple(entries))


def switch_of(config: Config, name: str, default: bool) -> bool:
    """A setting that is on or off, of the whole merge."""
    value = config.parameters.get(name, default)
    if isinstance(value, Mapping) and value.get("filter") in (None, "*"):
        value = value.get("value")
    if not isinstance(value, bool):
        raise config.refusal(f"{name} is read as true or false for all tensors", found=value)
    return value


def whole_of(config: Config, name: str, default: int) -> int:
    """A setting that is a whole number."""
    value = config.parameters.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise config.refusal(f"{name} is read as one whole number", found=value)
    return value


def _conditions(config: Config, name: str, value: Any) -> list[tuple[str | None, tuple[float, ...]]]:
    """Filters and numbers in the order in which mergekit tries them."""
    listed = value if isinstance(value, list) and any(isinstance(one, Mapping) for one in value) else [value]
    return [_condition(config, name, one) for one in listed]


def _condition(config: Config, name: str, value: Any) -> tuple[str | None, tuple[float, ...]]:
    condition = None
    if isinstance(value, Mapping):
        if unknown := [key for key in value if key not in ("filter", "value")]:
            raise config.refusal(f"{name} has filter and value only", found=unknown[0])
        condition, value = value.get("filter"), value.get("value")
        if condition is not None and not isinstance(condition, str):
            raise config.refusal(f"a filter of {name} must be text", found=condition)
    numbers = value if isinstance(value, list) else [value]
    if not numbers:
        raise config.refusal(f"{name} is an empty list")
    return (None if condition in ("*", None) else condition), tuple(_number(config, name, one) for one in numbers)


def _number(config: Config, name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # YAML reads 1e-3 as text, mergekit as a number
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise config.refusal(f"{name} must be a number, a list of numbers, or filters with either", found=value)
    return number


def _entry(config: Config, condition: str, numbers: tuple[float, ...]) -> list[tuple[str, tuple[float, ...]]]:
    found = next((one for family in FAMILIES if (one := _pattern(condition, family))), None)
    if found is None:
        raise config.refusal(
            "the filter selects no tensor, or what no pattern says",
            found=condition,
            fix="a filter is a piece of a stored name: attention, feed_forward.w2, layers.7., refiner",
        )
    pattern, places = found
    if len(numbers) > 1 and places in ({0.0}, {1.0}):  # all of it before the blocks of the stack, or after them
        numbers = (numbers[0],) if places == {0.0} else (numbers[-1],)
    return [(pattern, numbers)]


@functools.lru_cache(maxsize=256)
def _pattern(condition: str, family: Family) -> tuple[str, frozenset[float]] | None:
    """The pattern that selects what has a piece of text in its stored name, and where in the stack that is.

    Names are ComfyUI's, and diffusers' if none of those has it.
    """
    keys = _keys(family)
    layouts = sorted(family.layouts, key=lambda layout: layout.name != family.default_layout)
    selected = next(
        (found for layout in layouts if (found := {k for k in keys if condition in layout.stored(k)})), None
    )
    if selected is None:
        return None
    inside = {family.block_of(key)[1] for key in selected}
    for text in (_wildcards(condition), ", ".join(sorted(inside)), ", ".join(sorted(selected))):
        if text and {key for key in keys if Pattern(text, family).matches(key)} == selected:
            return text, frozenset(family.place_in_main(key, _BLOCKS) for key in selected)
    return None


def _wildcards(condition: str) -> str:
    """The pattern of a piece of a name, which may begin and end within components."""
    if any(one in condition for one in "*?[],-"):
        return ""
    first, *rest = condition.split(".")
    return ".".join([f"*{first}", *rest]) + "*"


@functools.lru_cache(maxsize=8)
def _keys(family: Family) -> tuple[str, ...]:
    """Canonical names of a model with many blocks."""
    names: dict[str, None] = {}
    for key in family.smallest.shapes():
        head = next((head for head in family.stacks if key.startswith(f"{head}.")), None)
        if head is None:
            names[key] = None
            continue
        rest = key.removeprefix(f"{head}.").partition(".")[2]
        names |= dict.fromkeys(f"{head}.{number}.{rest}" for number in range(_BLOCKS if head == family.main else 2))
    return tuple(names)

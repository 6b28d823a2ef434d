"""Patterns that select tensors by name.

The one way to say "these tensors": for protection, for the part of a delta that is used, for LoRA exclusion and for
freezing. Names are canonical; what the short names mean is the family's to say.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from alkahest.errors import UnknownNameError, nearest
from alkahest.model.families.family import Family


@dataclass(frozen=True)
class Pattern:
    """A selection of tensors by name.

    ``Pattern("refiner", family)`` takes every refiner tensor. A pattern is a comma-separated list; each
    item is a part of the family (``refiner``, ``embedders``, ``input``, ``final``, ``layers``), a dotted run of
    name components anywhere in the key (``layers.3``, ``feed_forward.w1``, ``attention``), with
    ``*`` as a wildcard inside a component and ``0-9`` as a range of numbers (``layers.0-9``).

    >>> Pattern("layers.0-9.attention", zimage.FAMILY).matches("layers.7.attention.to_q.weight")
    True
    """

    text: str
    family: Family

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise UnknownNameError(
                "select", "a pattern is one string", found=repr(self.text), fix="such as 'refiner, layers.0-9'"
            )
        if not all(item.strip() for item in self.text.split(",")):
            raise UnknownNameError(
                "select",
                "empty pattern, or a comma with nothing beside it",
                found=repr(self.text),
                fix="name a part, such as 'refiner'",
            )

    def matches(self, key: str) -> bool:
        return _matches(self.text, key, self.family)

    def require_match(self, keys: Iterable[str], operation: str) -> Pattern:
        """Return self, or raise UnknownNameError if an item selects none of ``keys``."""
        keys = list(keys)
        for item in (item.strip() for item in self.text.split(",")):
            if not any(_matches(item, key, self.family) for key in keys):
                pieces = sorted({piece for key in keys for piece in key.split(".") if not piece.isdigit()})
                raise UnknownNameError(
                    operation,
                    f"{item!r} selects no tensor of this model",
                    expected="a part, a name component, or a dotted run of them",
                    found=repr(item),
                    fix=nearest(item, [*self.family.aliases, *pieces]),
                )
        return self


@functools.lru_cache(maxsize=65536)
def _matches(text: str, key: str, family: Family) -> bool:
    components = key.split(".")
    return any(_contains(components, run) for run in _runs(text, family))


@functools.lru_cache(maxsize=1024)
def _runs(text: str, family: Family) -> tuple[tuple[str, ...], ...]:
    items = [item.strip() for item in text.split(",")]
    names = [name for item in items for name in family.aliases.get(item, (item,))]
    return tuple(tuple(name.split(".")) for name in names)


def _contains(components: list[str], run: tuple[str, ...]) -> bool:
    starts = range(len(components) - len(run) + 1)
    return any(all(_fits(components[start + i], wanted) for i, wanted in enumerate(run)) for start in starts)


def _fits(component: str, wanted: str) -> bool:
    bounds = re.fullmatch(r"(\d+)-(\d+)", wanted)
    if bounds and component.isdigit():
        return int(bounds[1]) <= int(component) <= int(bounds[2])
    return fnmatchcase(component, wanted)

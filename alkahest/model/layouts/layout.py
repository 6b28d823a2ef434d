"""What every key layout provides."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Two pure functions on names.

    ``canonical`` gives the canonical names of a stored name (several: equal row slices, in order);
    ``stored`` gives the stored name of a canonical one.
    """

    name: str
    canonical: Callable[[str], tuple[str, ...]]
    stored: Callable[[str], str]

    def grouped(self, keys: Iterable[str]) -> dict[str, list[str]]:
        """Stored name -> canonical names in row order, for the canonical ``keys`` in their order."""
        groups: dict[str, list[str]] = {}
        for key in keys:
            groups.setdefault(self.stored(key), []).append(key)
        for name, members in groups.items():
            members.sort(key=self.canonical(name).index)
        return groups

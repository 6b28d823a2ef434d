"""Key layouts: how files name the tensors of one model, and how canonical names map to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fused:
    """One stored tensor whose rows are several canonical ones, one below the other."""

    parts: tuple[str, ...]  # dotted runs, such as ".attention.to_q.weight", in the order of their rows
    shares: tuple[int, ...]  # how their rows are to each other: equal ones, or of grouped queries more than of keys

    def rows(self, total: int) -> tuple[int, ...] | None:
        """Rows of each part; None if they cannot be cut so.

        >>> Fused((".q.weight", ".k.weight", ".v.weight"), (4, 1, 1)).rows(18)
        (12, 3, 3)
        """
        unit, rest = divmod(total, sum(self.shares))
        return None if rest or unit == 0 else tuple(unit * share for share in self.shares)


@dataclass(frozen=True)
class Layout:
    """Names in files beside canonical ones, as two tables of text.

    ``renamed`` is (stored, canonical) runs: one that begins with a dot is replaced wherever it stands, any other at
    the start of a name. ``fused`` is the end of a stored name, and what its rows are.
    """

    name: str
    renamed: tuple[tuple[str, str], ...] = ()
    fused: Mapping[str, Fused] = field(default_factory=dict)

    def canonical(self, stored: str) -> tuple[str, ...]:
        """Canonical names of a stored one: several are the rows of a fused tensor, in order."""
        for end, fused in self.fused.items():
            if stored.endswith(end) and len(stored) > len(end):
                return tuple(stored.removesuffix(end) + part for part in fused.parts)
        for old, new in self.renamed:
            stored = _replace(stored, old, new)
        return (stored,)

    def stored(self, key: str) -> str:
        """The stored name of a canonical one."""
        for end, fused in self.fused.items():
            for part in fused.parts:
                if key.endswith(part):
                    return key.removesuffix(part) + end
        for old, new in self.renamed:
            key = _replace(key, new, old)
        return key

    def rows(self, stored: str, total: int) -> tuple[int, ...] | None:
        """How many rows each canonical tensor has of a stored one with ``total``; None if it cannot be cut so."""
        fused = next((fused for end, fused in self.fused.items() if stored.endswith(end)), None)
        return (total,) if fused is None else fused.rows(total)

    def group(self, keys: Iterable[str]) -> dict[str, list[str]]:
        """Stored name -> canonical names in row order, for the canonical ``keys`` in their order."""
        groups: dict[str, list[str]] = {}
        for key in keys:
            groups.setdefault(self.stored(key), []).append(key)
        for name, members in groups.items():
            members.sort(key=self.canonical(name).index)
        return groups


def _replace(name: str, old: str, new: str) -> str:
    if old.startswith("."):
        return name.replace(old, new)
    return new + name.removeprefix(old) if name.startswith(old) else name

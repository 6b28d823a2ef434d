"""What one module of a LoRA file adds to one weight, computed row by row from its factors.

    LoRA  scale * up @ down
    LoHa  scale * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise       (Hyeon-Woo et al. 2022, arXiv:2108.06098)
    LoKr  scale * kron(w1, w2), each whole or a product            (Yeh et al. 2024, LyCORIS, arXiv:2309.14859)
    diff  the difference itself

scale is alpha / rank; without an alpha it is 1, as ComfyUI and diffusers have it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alkahest.errors import FileFormatError
from alkahest.files.header import Entry

_LONGEST = 1 << 20  # rows or columns that a weight can have: factors of a small file must not ask for terabytes
# Kind -> the pairs of roles whose product takes the place of a whole factor.
_PAIRS = {
    "lora": (("up", "down"),),
    "hada": (("w1_a", "w1_b"), ("w2_a", "w2_b")),
    "lokr": (("w1_a", "w1_b"), ("w2_a", "w2_b")),
}
# Kinds that depend on the weights that they meet: see `alkahest.sources.transforms`.
TRANSFORMS = ("oft", "peft_oft", "peft_boft", "ia3", "whole")
NAMES = {
    "lora": "LoRA",
    "hada": "LoHa",
    "lokr": "LoKr",
    "diff": "full difference",
    "oft": "OFT",
    "peft_oft": "OFT",
    "boft": "BOFT",
    "peft_boft": "BOFT",
    "ia3": "IA3",
    "whole": "whole tensor",
}

_FACTORS = ("up", "down", "w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b")

Read = Callable[[str], Tensor]  # a factor by its role, float32, as a matrix


@dataclass(frozen=True)
class Update:
    """What a file adds to one weight: rows ``first_row`` and following of what its factors make."""

    kind: str
    entries: Mapping[str, Entry]  # role -> where the tensor is
    names: Mapping[str, str]  # role -> its stored name
    shape: tuple[int, ...]
    scale: float
    first_row: int = 0
    dora: bool = False
    also: Update | None = None  # a difference on the same weight
    fused: tuple[str, ...] = ()  # the weights whose rows the factors make together
    given: tuple[tuple[str, float], ...] = ()  # settings that its kind may need

    @property
    def needs_weights(self) -> bool:
        """Whether what it adds depends on the weights that it meets."""
        return self.dora or self.kind in TRANSFORMS

    @property
    def rank(self) -> int | None:
        """The most that the rank of the update can be, as its file spells it; None for a full difference."""
        if self.kind not in _PAIRS:
            return None
        inner = [self.entries[pair[1]].shape[0] for pair in _PAIRS[self.kind] if pair[1] in self.entries]
        if self.kind == "lokr":  # a whole factor's rank is at most its smaller side
            inner += [min(_matrix(self.entries[name].shape)) for name in ("w1", "w2") if name in self.entries]
        return min(math.prod(inner), *self.shape)

    def rows(self, start: int, stop: int, read: Read) -> Tensor:
        """Rows ``start`` to ``stop`` of the update, float32."""
        if self.also is not None:
            return replace(self, also=None).rows(start, stop, read).add_(self.also.rows(start, stop, read))
        rows = slice(self.first_row + start, self.first_row + stop)
        if self.kind in ("diff", "whole"):
            return read(next(role for role in ("diff", "bias", "whole", "whole_bias") if role in self.entries))[rows]
        if self.kind == "lora":
            return (read("up")[rows] @ read("down")).mul_(self.scale)
        if self.kind == "hada":
            one, two = (read(f"{w}_a")[rows] @ read(f"{w}_b") for w in ("w1", "w2"))
            return one.mul_(two).mul_(self.scale)
        left, right = self._kron_rows(rows, read)
        return (left[:, :, None] * right[:, None, :]).flatten(1).mul_(self.scale)

    def halves(self, read: Read) -> tuple[Tensor, Tensor]:
        """up and down of a LoRA that makes the same, before the scale: exact, of rank `rank` or the product of two."""
        rows = slice(self.first_row, self.first_row + self.shape[0])
        if self.kind == "lora":
            return read("up")[rows], read("down")
        if self.kind == "hada":
            # (a b) * (c d) elementwise is (a and c, column by column) @ (b and d, row by row).
            up = (read("w1_a")[rows][:, :, None] * read("w2_a")[rows][:, None, :]).flatten(1)
            return up, (read("w1_b")[:, None, :] * read("w2_b")[None, :, :]).flatten(0, 1)
        (a, b), (c, d) = (self._as_product(name, read) for name in ("w1", "w2"))
        return torch.kron(a, c)[rows], torch.kron(b, d)

    def _as_product(self, name: str, read: Read) -> tuple[Tensor, Tensor]:
        if name not in self.entries:
            return read(f"{name}_a"), read(f"{name}_b")
        whole = read(name)
        tall = whole.shape[0] > whole.shape[1]
        one = torch.eye(min(whole.shape))
        return (whole, one) if tall else (one, whole)

    def _kron_rows(self, rows: slice, read: Read) -> tuple[Tensor, Tensor]:
        height = side(self.entries, "w2", 0)
        index = torch.arange(rows.start, rows.stop)
        found = []
        for name, place in (("w1", index // height), ("w2", index % height)):
            whole = name in self.entries
            factor = read(name if whole else f"{name}_a")
            taken = factor[place.to(factor.device)]
            found.append(taken if whole else taken @ read(f"{name}_b"))
        return found[0], found[1]


def side(entries: Mapping[str, Entry], name: str, which: int) -> int:
    """Rows (0) or columns (1) of a factor that is whole or a product."""
    if name in entries:
        return _matrix(entries[name].shape)[which]
    return _matrix(entries[f"{name}_{'ab'[which]}"].shape)[which]


def shape_of(kind: str, entries: Mapping[str, Entry], names: Mapping[str, str], file: object) -> tuple[int, ...]:
    """The shape of what factors make together; FileFormatError if one is missing or they do not fit."""
    _require_pairs(kind, entries, names, file)
    if kind in ("diff", "whole"):
        return next(entries[role].shape for role in ("diff", "bias", "whole", "whole_bias") if role in entries)
    if kind in TRANSFORMS:
        return ()
    for left, right in _PAIRS[kind]:
        if left in entries:
            inner = (_matrix(entries[left].shape)[1], _matrix(entries[right].shape)[0])
            if inner[0] != inner[1]:
                raise FileFormatError(
                    "open_lora",
                    "the halves of a pair do not fit",
                    file=file,
                    key=names[left],
                    expected=f"{inner[1]} columns, the rank of {names[right]}",
                    found=f"{inner[0]} columns",
                    fix="the file is damaged; get it again",
                )
    if kind == "lora":
        shape = (_matrix(entries["up"].shape)[0], _matrix(entries["down"].shape)[1])
    elif kind == "hada":
        shape, other = ((side(entries, w, 0), side(entries, w, 1)) for w in ("w1", "w2"))
        if shape != other:
            raise FileFormatError(
                "open_lora",
                "the factors of a LoHa differ in shape",
                file=file,
                key=names["w1_a"],
                expected=shape,
                found=other,
                fix="the file is damaged; get it again",
            )
    else:
        shape = (side(entries, "w1", 0) * side(entries, "w2", 0), side(entries, "w1", 1) * side(entries, "w2", 1))
    if max(shape) > _LONGEST:
        raise FileFormatError(
            "open_lora",
            "impossible size",
            file=file,
            key=next(iter(names.values())),
            found=shape,
            expected=f"sides of at most {_LONGEST:,}",
        )
    return shape


def ranks_of(kind: str, entries: Mapping[str, Entry]) -> list[int]:
    """The ranks of a module's products; a LoKr of two whole factors has none."""
    return [entries[pair[1]].shape[0] for pair in _PAIRS.get(kind, ()) if pair[1] in entries]


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a factor, which a 1x1 convolution's may store with ones at the end."""
    return shape[0], math.prod(shape[1:])


def _require_pairs(kind: str, entries: Mapping[str, Entry], names: Mapping[str, str], file: object) -> None:
    needed = {role for pair in _PAIRS.get(kind, ()) for role in pair if set(pair) & entries.keys()}
    if kind in ("lora", "hada"):
        needed |= {role for pair in _PAIRS[kind] for role in pair}
    for role in sorted(needed - entries.keys()):
        raise FileFormatError(
            "open_lora",
            "half of a pair is missing",
            file=file,
            key=next(iter(names.values())),
            expected=f"its {role}",
            found=f"only {', '.join(entries)}",
            fix="the file is incomplete; get it again",
        )
    if kind == "lokr":
        for whole, half in (("w1", "w1_a"), ("w2", "w2_a")):
            if (whole in entries) == (half in entries):
                raise FileFormatError(
                    "open_lora",
                    f"a LoKr needs {whole}, whole or as a product, once",
                    file=file,
                    key=next(iter(names.values())),
                    found=", ".join(entries),
                    fix="the file is damaged; get it again",
                )
    for role, entry in entries.items():
        if role in _FACTORS and (len(entry.shape) < 2 or math.prod(entry.shape[2:]) != 1):
            raise FileFormatError(
                "open_lora",
                "a factor must be a matrix",
                file=file,
                key=names[role],
                expected="2 dimensions",
                found=entry.shape,
            )
        if role in ("diff", "bias", "whole", "whole_bias") and not entry.shape:
            raise FileFormatError(
                "open_lora", "a difference must have a shape", file=file, key=names[role], found="a single number"
            )
        if 0 in entry.shape:
            raise FileFormatError("open_lora", "a factor is empty", file=file, key=names[role], found=entry.shape)

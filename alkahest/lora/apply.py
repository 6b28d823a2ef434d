"""Apply a LoRA to weights, and adapters whose effect depends on the weights that they meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from alkahest.algebra.expression import ATOM, Names
from alkahest.algebra.weights import OfWeights, Weights
from alkahest.engine.scalars import Param, Rules, Scalar, scalar, text_of
from alkahest.engine.terms import Apply, Minus, Source, Term, plus, times
from alkahest.errors import AlgebraError, MismatchError, UnsupportedError, nearest
from alkahest.lora.transforms import problem_with, transform
from alkahest.sources.factors import NAMES, Update
from alkahest.sources.lora import Lora


def apply_lora(weights: Weights, lora: Lora, strength: SupportsFloat | Param = 1.0) -> Weights:
    """Weights with a LoRA in them; for a DoRA, OFT, BOFT, IA3 and tensors that are stored whole the only way.

    A plain LoRA gives ``weights + strength * lora``. A DoRA makes ``D = m * (W + dW) / |W + dW|``, norms and magnitudes
    m by row, or by column if that is m's length (Liu et al. 2024, arXiv:2402.09353, as PEFT), of which ``strength``
    goes the way: ``W + strength * (D - W)``, as ComfyUI; so do the others, whose formulas are in
    `alkahest.lora.transforms`. ComfyUI's norm by row is |W| alone, which differs by what dW adds to it.

    Parameters
    ----------
    weights : Weights
        Protected tensors stay.
    lora : Lora
        Of `open_lora`.
    strength : float or Param, default 1
        How much of the LoRA is added: 1 is all of it, 0 nothing; above 1 and below 0 are taken as well.

    Returns
    -------
    Weights

    Raises
    ------
    MismatchError
        If the LoRA is not of this model.

    Examples
    --------
    >>> lora = ak.extract_lora(variant - base, rank=4).save("lora.safetensors")
    >>> merged = ak.apply_lora(bridge.protect("refiner"), ak.open_lora("lora.safetensors"), 0.8)
    """
    if not isinstance(weights, Weights) or not isinstance(lora, Lora):
        raise AlgebraError(
            "apply_lora",
            "weights and an opened LoRA are needed",
            found=f"{type(weights).__name__}, {type(lora).__name__}",
            fix="ak.apply_lora(bridge, ak.open_lora(path), strength)",
        )
    if not lora.needs_weights:
        return weights + scalar(strength, "apply_lora") * lora
    return Applied(weights, lora, scalar(strength, "apply_lora"))


@dataclass(frozen=True, repr=False)
class Applied(OfWeights):
    """Weights with an adapter applied that depends on them."""

    weights: Weights
    lora: Lora
    strength: Scalar

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, update in self.lora.updates.items():
            self._require_fit(key, update)

    def _require_fit(self, key: str, update: Update) -> None:
        """Raise MismatchError, or UnsupportedError, if an update is not of this model."""
        shape = self.weights.shapes.get(key)
        if shape is None or (update.shape and shape != update.shape):
            raise MismatchError(
                "apply_lora",
                "the LoRA is not of this model",
                file=self.lora.path,
                key=key,
                expected=shape or nearest(key, self.weights.shapes),
                found=update.shape,
                fix="use a LoRA of this model",
            )
        if update.dora and _by_column(update) is None:
            raise UnsupportedError(
                "apply_lora",
                "the magnitudes fit neither the rows nor the columns",
                file=self.lora.path,
                key=key,
                expected=f"{update.shape[0]} or {update.shape[-1]} of them",
                found=update.entries["magnitude"].shape,
            )
        if update.needs_weights and not update.shape:
            heights = [self.weights.shapes.get(one, (0,)) for one in update.fused or (key,)]
            together = (sum(one[0] for one in heights), *shape[1:])
            if problem := problem_with(update.kind, together, _roles(update)):
                raise MismatchError(
                    "apply_lora",
                    f"this {NAMES[update.kind]} does not fit the weight: {problem}",
                    file=self.lora.path,
                    key=key,
                    expected=together,
                    fix="use an adapter of this model",
                )

    def at(self, key: str, rules: Rules) -> Term | None:
        weights, strength = self.weights.at(key, rules), rules.value(self.strength)
        if weights is None or key not in self.lora.updates or self.is_protected(key) or strength == 0:
            return weights
        update = self.lora.updates[key]
        if not update.needs_weights:
            return plus(weights, times(strength, Source(self.lora, key)))
        if update.kind == "whole":
            return plus(weights, times(strength, Minus(Source(self.lora, key), weights)))
        # What is measured over the whole of a fused weight needs all of its parts.
        keys = update.fused if len(update.fused) > 1 and _is_over_all(update) else (key,)
        parts = [self.weights.at(one, rules) for one in keys]
        changes = [Source(self.lora, one) for one in keys] if update.dora else []
        operands = tuple(one for one in (*parts, *changes) if one is not None)
        shapes = tuple(self.weights.shapes[one] for one in keys)
        change = _Change(self.lora, key, keys.index(key), shapes)
        return Apply(_applied, operands, True, False, (("change", change), ("strength", strength)), key)

    def protection_notes(self) -> list[str]:
        kept = [key for key in self.lora.updates if self.is_protected(key)]
        note = f"{self.lora.name}: protection leaves out {len(kept)} of its {len(self.lora.updates)} tensors"
        return [note] * bool(kept) + super().protection_notes()

    def _scalars(self) -> Iterator[Any]:
        yield self.strength
        yield from self.weights._scalars()

    def _text(self, names: Names) -> tuple[str, int]:
        return f"apply_lora({self.weights._text(names)[0]}, {names[self.lora]}, {text_of(self.strength)})", ATOM


Operands = Callable[[list[Tensor]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Change:
    """What an adapter makes of one weight, of which ``number`` of ``shapes`` is asked for; called when it is needed."""

    lora: Lora
    key: str
    number: int
    shapes: tuple[tuple[int, ...], ...]

    def __call__(self, key: str, start: int, stop: int) -> Operands:
        return self._made

    def _made(self, operands: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The weight before and after, [rows, columns]."""
        update, count = self.lora.updates[self.key], len(self.shapes)
        before = [one.view(shape) for one, shape in zip(operands, self.shapes, strict=False)]
        joined = torch.cat(before) if count > 1 else before[0]
        if update.dora:
            change = torch.cat([one.view(shape) for one, shape in zip(operands[count:], self.shapes, strict=True)])
            after = self._dora(update, joined, change)
        else:
            after = self._transformed(update, joined)
        first = sum(shape[0] for shape in self.shapes[: self.number])
        return before[self.number], after[first : first + self.shapes[self.number][0]]

    def _transformed(self, update: Update, joined: Tensor) -> Tensor:
        def read(role: str) -> Tensor:
            return self.lora.factor(update, role).to(joined.device)

        return transform(update.kind, joined, read, _roles(update), {**dict(update.given), "alpha": update.scale})

    def _dora(self, update: Update, weights: Tensor, change: Tensor) -> Tensor:
        values = self.lora.factor(update, "magnitude").flatten().to(weights)
        by_column = bool(_by_column(update))
        rows = slice(update.first_row, update.first_row + len(weights)) if len(self.shapes) == 1 else slice(None)
        magnitude = values[None, :] if by_column else values[rows, None]
        moved = weights + change
        norm: Tensor = torch.linalg.vector_norm(moved, dim=0 if by_column else 1, keepdim=True)
        return moved.mul_(magnitude / norm.clamp_(min=torch.finfo(norm.dtype).tiny))


def _applied(operands: list[Tensor], *, change: Operands, strength: float) -> Tensor:
    before, after = change(operands)
    return (after - before).mul_(strength).add_(before).flatten()


def _roles(update: Update) -> dict[str, tuple[int, ...]]:
    return {role: entry.shape for role, entry in update.entries.items()}


def _is_over_all(update: Update) -> bool:
    """Whether an update of a fused weight mixes rows of its parts: norms of columns, rotations of outputs."""
    return bool(update.dora and _by_column(update)) or update.kind in ("oft", "ia3", "peft_boft")


def _by_column(update: Update) -> bool | None:
    """Whether a DoRA's magnitudes are those of columns; None if they fit neither side."""
    shape = update.entries["magnitude"].shape
    many = max(shape, default=1)
    rows = update.first_row + update.shape[0]  # of a fused weight there are more
    if len(shape) == 2 and shape[0] == 1 and many == update.shape[1]:
        return True
    return False if many >= rows and many % update.shape[0] == 0 else None

"""Apply a LoRA to weights, DoRA included, whose effect depends on the weights that it meets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import SupportsFloat

import torch
from torch import Tensor

from alkahest.algebra.expression import ATOM, Names
from alkahest.algebra.weights import OfWeights, Weights
from alkahest.engine.scalars import Param, Rules, Scalar, scalar, text_of
from alkahest.engine.terms import Apply, Source, Term, plus, times
from alkahest.errors import AlgebraError, MismatchError, UnsupportedError, nearest
from alkahest.sources.lora import Lora


def apply_lora(weights: Weights, lora: Lora, strength: SupportsFloat | Param = 1.0) -> Weights:
    """Weights with a LoRA in them; for a DoRA the only way.

    >>> ak.apply_lora(bridge.protect("refiner"), ak.open_lora("dora.safetensors"), 0.8).save("with.safetensors")

    A plain LoRA gives ``weights + strength * lora``. A DoRA makes ``D = m * (W + dW) / |W + dW|``, norms and
    magnitudes m by row, or by column if that is m's length (Liu et al. 2024, arXiv:2402.09353, as PEFT), of
    which ``strength`` goes the way: ``W + strength * (D - W)``, as ComfyUI. ComfyUI's norm by row is |W| alone,
    which differs by what dW adds to it. Protected tensors stay. Raises MismatchError if it is not of this model.
    """
    if not isinstance(weights, Weights) or not isinstance(lora, Lora):
        raise AlgebraError(
            "apply_lora",
            "weights and an opened LoRA are needed",
            found=f"{type(weights).__name__}, {type(lora).__name__}",
            fix="ak.apply_lora(bridge, ak.open_lora(path), strength)",
        )
    if not lora.is_dora:
        return weights + scalar(strength, "apply_lora") * lora
    return Applied(weights, lora, scalar(strength, "apply_lora"))


@dataclass(frozen=True, repr=False)
class Applied(OfWeights):
    """Weights with a DoRA applied."""

    weights: Weights
    lora: Lora
    strength: Scalar

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, shape in self.lora.targets.items():
            if self.weights.shapes.get(key) != shape:
                raise MismatchError(
                    "apply_lora",
                    "the LoRA is not of this model",
                    file=self.lora.path,
                    key=key,
                    expected=self.weights.shapes.get(key) or nearest(key, self.weights.shapes),
                    found=shape,
                    fix="use a LoRA of this model",
                )
        for key, update in self.lora.updates.items():
            if update.dora and _by_column(self.lora, key) is None:
                raise UnsupportedError(
                    "apply_lora",
                    "the magnitudes fit neither the rows nor the columns",
                    file=self.lora.path,
                    key=key,
                    expected=f"{update.shape[0]} or {update.shape[-1]} of them",
                    found=update.entries["magnitude"].shape,
                )

    def at(self, key: str, rules: Rules) -> Term | None:
        weights, strength = self.weights.at(key, rules), rules.value(self.strength)
        if weights is None or key not in self.lora.updates or self.is_protected(key) or strength == 0:
            return weights
        change = Source(self.lora, key)
        if not self.lora.updates[key].dora:
            return plus(weights, times(strength, change))
        return Apply(
            _dora,
            (weights, change),
            False,
            False,
            (("magnitude", _Magnitude(self.lora, key)), ("strength", strength)),
            key,
        )

    def protection_notes(self) -> list[str]:
        kept = [key for key in self.lora.updates if self.is_protected(key)]
        note = f"{self.lora.name}: protection leaves out {len(kept)} of its {len(self.lora.updates)} tensors"
        return [note] * bool(kept) + super().protection_notes()

    def _scalars(self) -> Iterator[Scalar]:
        yield self.strength
        yield from self.weights._scalars()

    def _text(self, names: Names) -> tuple[str, int]:
        return f"apply_lora({self.weights._text(names)[0]}, {names[self.lora]}, {text_of(self.strength)})", ATOM


@dataclass(frozen=True)
class _Magnitude:
    """The magnitudes of one weight, shaped to multiply its rows or columns; called when they are needed."""

    lora: Lora
    key: str

    def __call__(self, key: str, start: int, stop: int) -> Tensor:
        update = self.lora.updates[self.key]
        values = self.lora.factor(update, "magnitude").flatten()
        if _by_column(self.lora, self.key):
            return values[None, :]
        return values[update.first_row : update.first_row + update.shape[0], None]


def _by_column(lora: Lora, key: str) -> bool | None:
    """Whether a DoRA's magnitudes are those of columns; None if they fit neither side."""
    update = lora.updates[key]
    shape = update.entries["magnitude"].shape
    many = max(shape, default=1)
    rows = update.first_row + update.shape[0]  # of a fused weight there are more
    if len(shape) == 2 and shape[0] == 1 and many == update.shape[1]:
        # Norms of a fused weight's columns would need all of q, k and v at once.
        return None if update.first_row else True
    return False if many >= rows and many % update.shape[0] == 0 else None


def _dora(weights: Tensor, change: Tensor, magnitude: Tensor, strength: float) -> Tensor:
    by_column = magnitude.shape[0] == 1
    shape = (-1, magnitude.numel()) if by_column else (magnitude.numel(), -1)
    before, sum_ = weights.view(shape), (weights + change).view(shape)
    norm: Tensor = torch.linalg.vector_norm(sum_, dim=0 if by_column else 1, keepdim=True)
    moved = sum_ * (magnitude.to(norm) / norm.clamp_(min=torch.finfo(norm.dtype).tiny))
    return moved.sub_(before).mul_(strength).add_(before).flatten()

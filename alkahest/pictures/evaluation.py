"""Pictures with captions on which models are compared, and noise that is the same for every model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alkahest.errors import NonFiniteError
from alkahest.model import seeded
from alkahest.pictures.flow import Arithmetic, Noised, velocity

LEVELS = (
    0.6,
    0.8,
    0.95,
)  # sigma: where subject and colour are decided; nearer to the picture the loss is about texture


@dataclass(frozen=True)
class EvaluationSet:
    """Latents [n, c, h, w] and their captions' embeddings, each to be mixed with its own noise at several levels."""

    latents: Tensor
    captions: list[Tensor]
    seed: int = 0
    levels: tuple[float, ...] = LEVELS
    name: str = "pictures"

    def __len__(self) -> int:
        return len(self.latents)

    def batches(self, size: int) -> Iterator[tuple[slice, Noised]]:
        """Every picture at every level, ``size`` at a time: rows picture by picture, levels within."""
        count = len(self.levels)
        for first in range(0, len(self) * count, size):
            rows = range(first, min(first + size, len(self) * count))
            numbers = [row // count for row in rows]
            sigma = torch.tensor([self.levels[row % count] for row in rows])
            data = self.latents[numbers].float().cpu()
            noise = torch.stack([self._noise(row // count, row % count) for row in rows])
            mixed = torch.lerp(data, noise, sigma[:, None, None, None])
            captions = [self.captions[number] for number in numbers]
            yield slice(rows.start, rows.stop), Noised(mixed, 1 - sigma, captions, data - noise, sigma)

    def target(self) -> Tensor:
        """What a perfect model says, [n, levels, c, h, w]."""
        found = torch.cat([batch.target for _, batch in self.batches(64)])
        return found.view(len(self), len(self.levels), *found.shape[1:])

    def without_captions(self, empty: Tensor) -> EvaluationSet:
        """The same pictures and noise, with the embedding of no caption."""
        return EvaluationSet(self.latents, [empty] * len(self), self.seed, self.levels, self.name)

    def _noise(self, number: int, level: int) -> Tensor:
        rng = seeded.generator(self.seed, "evaluation", self.name, number * len(self.levels) + level)
        return torch.from_numpy(rng.standard_normal(tuple(self.latents.shape[1:]), np.float32))


@torch.no_grad()
def predictions(pipe: Any, examples: EvaluationSet, batch: int, operation: str = "needed_multiplier") -> Tensor:
    """What a pipeline's model says for a set, [n, levels, c, h, w], float32 on the CPU. NonFiniteError for NaN."""
    model = pipe.transformer
    how = Arithmetic(pipe._execution_device, model.dtype)
    found = []
    for _, one in examples.batches(batch):
        said = velocity(model, one, how).cpu()
        if not torch.isfinite(said).all():
            raise NonFiniteError(
                operation,
                f"the model says NaN or infinity of {examples.name}",
                fix="dtype='fp32', or a smaller multiplier; alkahest verify finds NaN in files",
            )
        found.append(said)
    said = torch.cat(found)
    return said.view(len(examples), len(examples.levels), *said.shape[1:])


def errors(said: Tensor, wanted: Tensor) -> np.ndarray[Any, Any]:
    """Mean square error of each picture over its noise levels, float64 [n]."""
    found: np.ndarray[Any, Any] = (said - wanted).double().square().flatten(1).mean(1).numpy()
    return found


def share_along(effect: Tensor, wanted: Tensor) -> float:
    """How much of a wanted change of predictions is in an effect: <effect, wanted> / <wanted, wanted>."""
    return float((effect.double() * wanted.double()).sum() / wanted.double().square().sum())

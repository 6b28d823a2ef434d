"""The flow-matching objective of Z-Image, with noise that is a function of seed, step and example."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alkahest.model import seeded
from alkahest.training.config import Stage


@dataclass(frozen=True)
class Noised:
    """A batch as the model is given it: mixed latents [n, c, h, w], time 1 - sigma, captions, and what it must say."""

    latents: Tensor
    time: Tensor
    captions: list[Tensor]
    target: Tensor
    sigma: Tensor


def add_noise(
    latents: Sequence[Tensor],
    captions: Sequence[Tensor],
    empty: Tensor,
    stage: Stage,
    seed: int,
    step: int,
    first: int = 0,
) -> Noised:
    """Mix a batch with noise.

    ``x = (1 - sigma) data + sigma noise``; the model is told ``1 - sigma`` and must say ``data - noise``, as
    `ZImagePipeline` reads it. ``sigma = k s / (1 + (k - 1) s)`` with k the stage's shift and s the sigmoid of a
    normal number (Esser et al. 2024, arXiv:2403.03206). Example n of the batch has number ``first + n``: it gets
    the same noise however a batch is divided over processes.
    """
    rngs = [seeded.generator(seed, f"noise {step}", "", first + number) for number in range(len(latents))]
    logits = torch.tensor([stage.mean + stage.std * rng.standard_normal() for rng in rngs], dtype=torch.float32)
    sigma = shift_sigma(torch.sigmoid(logits), stage.shift)
    dropped = [rng.random() < stage.drop for rng in rngs]
    data = torch.stack(list(latents)).float()
    noise = torch.from_numpy(np.stack([rng.standard_normal(data.shape[1:], np.float32) for rng in rngs]))
    mixed = torch.lerp(data, noise, sigma[:, None, None, None])
    return Noised(
        mixed,
        1 - sigma,
        [empty if gone else text for gone, text in zip(dropped, captions, strict=True)],
        data - noise,
        sigma,
    )


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Noise levels after the shift that sampling uses too (ModelSamplingAuraFlow's)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclass(frozen=True)
class Arithmetic:
    """In which dtype a model is given its inputs, where, and whether float32 weights compute in bf16."""

    device: torch.device
    dtype: torch.dtype
    mixed: bool = False

    def autocast(self) -> AbstractContextManager[Any]:
        # Its cache would keep a bf16 copy of every weight until the step is over: 10 GiB of the real model.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed, cache_enabled=False)


def velocity(model: Any, batch: Noised, how: Arithmetic) -> Tensor:
    """What the model says for a batch, [n, c, h, w] in float32."""
    given = list(batch.latents.to(how.device, how.dtype).unsqueeze(2).unbind(0))
    captions = [text.to(how.device, how.dtype) for text in batch.captions]
    with how.autocast():
        out = model(given, batch.time.to(how.device), captions, return_dict=False)[0]
    return torch.stack([one.float() for one in out]).squeeze(2)


def losses(model: Any, batch: Noised, how: Arithmetic) -> Tensor:
    """Mean square error of each example, float32."""
    return (velocity(model, batch, how) - batch.target.to(how.device)).square().flatten(1).mean(1)

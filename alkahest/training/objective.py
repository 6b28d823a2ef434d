"""The flow-matching objective of Z-Image, with noise that is a function of seed, step and example."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from alkahest.model import seeded
from alkahest.pictures.flow import Noised, shift_sigma
from alkahest.training.config import Stage


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

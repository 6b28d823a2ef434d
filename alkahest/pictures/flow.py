"""What a model says for latents mixed with noise, and how far that is from what it should say: the flow's loss."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noised:
    """A batch as the model is given it: mixed latents [n, c, h, w], time 1 - sigma, captions, and what it must say."""

    latents: Tensor
    time: Tensor
    captions: list[Tensor]
    target: Tensor
    sigma: Tensor


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

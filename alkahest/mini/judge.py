"""The judge: a small network that reads a picture's attributes back, so that "follows the prompt" is a number."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from alkahest.errors import MismatchError
from alkahest.mini.scenes import ATTRIBUTES
from alkahest.mini.shipped import WEIGHTS

if TYPE_CHECKING:
    import pandas


class Judge(nn.Module):
    """Pictures [n, 3, 64, 64] in -1 to 1 -> logits for every attribute of `scenes.ATTRIBUTES`."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for width, wider, stride in ((3, 24, 2), (24, 48, 2), (48, 64, 2), (64, 64, 1), (64, 64, 2)):
            blocks += [nn.Conv2d(width, wider, 3, stride, padding=1), nn.GroupNorm(8, wider), nn.SiLU()]
        self.features = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(values)) for name, values in ATTRIBUTES.items()})

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        seen = self.features(pictures)
        return {name: head(seen) for name, head in self.heads.items()}


@functools.cache
def load_judge(folder: Path = WEIGHTS) -> Judge:
    """The judge that ships with the package, or the one of another family's folder."""
    judge = Judge()
    path = folder / "judge.safetensors"
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def attributes(images: Iterable[Any], judge: Judge | None = None) -> pandas.DataFrame:
    """What the judge sees in pictures of 64 x 64: one row each, a column an attribute, values in words.

    >>> attributes(ak.sample(pipe, "a red ball at night").images).colour[0]
    'red'
    """
    import pandas as pd

    stack = np.stack([np.asarray(image) for image in images])
    if stack.shape[1:] != (64, 64, 3):
        raise MismatchError(
            "attributes",
            "the judge reads pictures of the miniature family",
            expected="64 x 64 pixels",
            found=stack.shape,
        )
    pictures = torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1
    seen = (judge or load_judge())(pictures)
    return pd.DataFrame({name: [ATTRIBUTES[name][n] for n in out.argmax(1)] for name, out in seen.items()})

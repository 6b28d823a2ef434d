"""Muon for small models on CPUs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for matrices and (flattened) convolutions.

    Source: Jordan et al. 2024, "Muon"; update size as in Liu et al. 2025 (arXiv 2502.16982), 0.2 sqrt of
    the longer side, so that AdamW's learning rates fit. ``torch.optim.Muon`` is the same thing in
    bfloat16, which a CPU without bfloat16 units takes sixty times as long for (1.8 s a step instead of
    0.03 s for the miniature transformer); this one works in float32, on all matrices of a shape at once.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                    average.lerp_(parameter.grad, 1 - group["momentum"])
                    update = torch.lerp(parameter.grad, average, group["momentum"])
                    alike.setdefault(parameter.shape, []).append((parameter, update))
            for shape, pairs in alike.items():
                updates = orthogonal(torch.stack([update.flatten(1) for _, update in pairs]))
                size = 0.2 * max(updates.shape[1:]) ** 0.5 * group["lr"]
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.sub_(update.reshape(shape), alpha=size)


def orthogonal(matrices: Tensor) -> Tensor:
    """Each matrix of a stack [n, rows, columns] with its singular values brought near 1 (0.7 to 1.2).

    Five Newton-Schulz steps of the quintic that the Muon authors tuned.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x

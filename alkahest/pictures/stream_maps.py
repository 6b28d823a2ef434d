"""Least-squares maps between tokens of two streams, and how well they agree."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def affine_map(x: Tensor, y: Tensor, ridge: float = 1e-6) -> Tensor:
    """[width + 1, width]: the least-squares map from tokens x to tokens y, ridged by a share of x's mean variance; the
    last row is a shift.

    >>> y = torch.cat([x, torch.ones(len(x), 1)], 1) @ affine_map(x, y)
    """
    given = with_one(x)
    gram = given.T @ given
    gram.diagonal()[:-1].add_(ridge * float(gram.diagonal()[:-1].mean()))
    found: Tensor = torch.linalg.solve(gram, given.T @ y.double())
    return found


def orthogonal_map(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The best rotation, scale and shift from tokens x to tokens y (Schoenemann 1966), as a function."""
    mean_x, mean_y = x.double().mean(0), y.double().mean(0)
    a, b = x.double() - mean_x, y.double() - mean_y
    u, s, vt = torch.linalg.svd(a.T @ b)
    rotation = (u @ vt) * (s.sum() / a.square().sum())
    return lambda values: (values.double() - mean_x) @ rotation + mean_y


def r_squared(found: Tensor, wanted: Tensor) -> float:
    """1 less the share of ``wanted``'s variance that ``found`` leaves."""
    wanted = wanted.double()
    left = (wanted - found.double()).square().sum()
    return float(1 - left / (wanted - wanted.mean(0)).square().sum())


def cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of tokens [n, width]: 1 if they are the same up to rotation and scale."""
    a, b = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    return float((a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm()))


def with_one(x: Tensor) -> Tensor:
    """Tokens with a column of ones, for a shift."""
    return torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)

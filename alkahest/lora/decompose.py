"""A matrix as the product of two thin ones: exact, randomised until enough is proved, or from a LoRA's own factors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from alkahest.engine.evaluate import why_nonfinite
from alkahest.engine.terms import Minus, Plus, Source, Term, Times
from alkahest.lora.rank import RankRule, Values
from alkahest.measure.spectrum import randomised_svd
from alkahest.sources.lora import Lora

METHODS = ("auto", "exact", "randomised")
_EXACT_SIDE = 1024  # a matrix with a side up to this is decomposed in full: at most half a second
_FIRST = 64  # singular values that are looked for first
_PIECE = 1 << 22  # elements of a residual computed at a time


@dataclass(frozen=True)
class Decomposition:
    """``u @ diag(s) @ v.T``, the leading part of a matrix whose squares sum to ``squares``; s falls."""

    u: Tensor
    s: Values
    v: Tensor
    squares: float
    complete: bool  # whether s are all there are
    lost: Callable[[Tensor, Tensor, float], float]  # (up, down, scale) -> sum of squares of matrix - scale * up @ down

    def split(self, rank: int, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """up and down of this rank, whose product times ``scale`` is the leading part; each takes sqrt(s)."""
        roots = torch.from_numpy(np.sqrt(self.s[:rank] / scale)).to(self.u)
        up, down = self.u[:, :rank] * roots, (self.v[:, :rank] * roots).T
        return up.to(dtype).contiguous(), down.to(dtype).contiguous()


def decompose(
    matrix: Tensor, squares: float, rule: RankRule, edge: float, method: str, seed: int, key: str
) -> Decomposition:
    """As much of a float32 matrix as the rule needs; ``squares`` is its sum of squares.

    ``exact`` takes the eigenvectors of the smaller Gram matrix in float64. ``randomised`` widens a seeded
    sketch until the singular values in it satisfy the rule: what they hold, the matrix holds at least.
    """
    side = min(matrix.shape)
    cap = rule.cap(side)
    width = cap if cap <= 2 * _FIRST else _FIRST
    whole = method == "exact" or rule.needs_all or (method == "auto" and side <= _EXACT_SIDE)
    while not whole and 4 * (width + 10) <= side:
        u, s, v = randomised_svd(matrix, width, seed, key)
        values = s.double().cpu().numpy()
        if width >= cap or rule.choose(values, squares, False, edge) is not None:
            return Decomposition(u, values, v, squares, False, _residual(matrix))
        width = min(cap, _wider(rule, values, squares))
    return _exact(matrix, squares)


def of_factors(up: Tensor, down: Tensor) -> Decomposition:
    """Of ``up @ down`` in float64, from QR of the two: as exact as the factors, and as quick as they are thin."""
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    u, s, vt = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    u, v = q_up @ u, q_down @ vt.T
    values = s.cpu().numpy()

    def lost(up: Tensor, down: Tensor, scale: float) -> float:
        left = torch.cat([u * s, -scale * up.double()], 1)
        right = torch.cat([v, down.double().T], 1)
        return max(0.0, float(((left.T @ left) * (right.T @ right)).sum()))

    return Decomposition(u, values, v, float((values**2).sum()), True, lost)


def of_loras(term: Term, key: str, shape: tuple[int, int]) -> Decomposition | None:
    """A sum of LoRAs from their factors, if they are thin together; None if it is anything else."""
    found = _loras(term)
    if found is None or sum(lora.updates[key].rank or max(shape) for _, lora in found) > min(shape) // 2:
        return None
    ups, downs, most = [], [], 0.0
    for factor, lora in found:
        update = lora.updates[key]
        up, down = update.halves(lambda role, lora=lora, update=update: lora.factor(update, role))  # type: ignore[misc]
        ups.append(up.double() * (factor * update.scale))
        downs.append(down.double())
        most += float(ups[-1].norm() * downs[-1].norm())
    up, down = torch.cat(ups, 1), torch.cat(downs)
    if not (torch.isfinite(up).all() and torch.isfinite(down).all()):
        raise why_nonfinite(term, key, "extract_lora")
    whole = of_factors(up, down)
    # What cancels leaves float64's own noise, which is nothing.
    return whole if whole.s[0] > 1e-12 * most else replace(whole, squares=0.0)


def _loras(term: Term) -> list[tuple[float, Lora]] | None:
    match term:
        case Source(leaf) if isinstance(leaf, Lora):
            return [(1.0, leaf)]
        case Times(factor, inner):
            found = _loras(inner)
            return None if found is None else [(factor * k, lora) for k, lora in found]
        case Plus(left, right) | Minus(left, right):
            one, two = _loras(left), _loras(right)
            sign = 1.0 if isinstance(term, Plus) else -1.0
            return None if one is None or two is None else one + [(sign * k, lora) for k, lora in two]
    return None


def _exact(matrix: Tensor, squares: float) -> Decomposition:
    wide = (matrix.cpu() if matrix.device.type == "mps" else matrix).double()
    tall = wide.shape[0] > wide.shape[1]
    eigenvalues, vectors = torch.linalg.eigh(wide.T @ wide if tall else wide @ wide.T)
    values = eigenvalues.flip(0).clamp_(min=0).sqrt_()
    near = vectors.flip(1)
    # Below the largest times 1e-8 a root is noise, and its vector on the other side is left zero.
    divisor = torch.where(values > 1e-8 * values[0], values, torch.inf)
    far = (wide if tall else wide.T) @ near / divisor
    u, v = (far, near) if tall else (near, far)
    return Decomposition(u, values.cpu().numpy(), v, squares, True, _residual(matrix))


def _wider(rule: RankRule, values: Values, squares: float) -> int:
    """The next width: twice as wide, or where an energy is asked for, a little more than it takes at least.

    What follows is no larger than the last value, and in rounding noise not much smaller.
    """
    width = len(values)
    if rule.name != "energy" or values[-1] == 0:
        return 2 * width
    missing = rule.value * squares - float((values**2).sum())
    return max(width + width // 4, math.ceil(1.15 * (width + missing / float(values[-1] ** 2))))


def _residual(matrix: Tensor) -> Callable[[Tensor, Tensor, float], float]:
    def lost(up: Tensor, down: Tensor, scale: float) -> float:
        total, step = 0.0, max(1, _PIECE // matrix.shape[1])
        right = down.to(matrix) * scale
        for start in range(0, matrix.shape[0], step):
            left = matrix[start : start + step] - up[start : start + step].to(matrix) @ right
            total += float(torch.linalg.vector_norm(left, dim=1).cpu().double().square().sum())
        return total

    return lost

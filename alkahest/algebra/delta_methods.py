"""Merge methods over deltas: what to keep of each, and what they agree on."""

from __future__ import annotations

import torch

from alkahest.algebra.deltas import Delta
from alkahest.algebra.methods import PerOperand, dot, method, require_within
from alkahest.algebra.model_methods import along_arc
from alkahest.errors import AlgebraError, refuse_unknown_options

Tensor = torch.Tensor


@method()
def ties(
    deltas: list[Tensor],
    *,
    density: PerOperand = (0.2,),
    weights: PerOperand = (1.0,),
    normalise: bool = True,
) -> Tensor:
    """Trim each delta to its ``density`` largest entries, elect a sign per entry, average what agrees.

    Yadav et al. 2023, arXiv:2306.01708, algorithm 1. Tensors are trimmed one by one (q, k and v apart).
    """
    for share in density:
        require_within("ties", "density", share, 0, 1, closed=max(density) > 0)
    trimmed = [_largest(delta, delta.abs(), share) for delta, share in zip(deltas, density, strict=True)]
    stacked = torch.stack([one * weight for one, weight in zip(trimmed, weights, strict=True)])
    agrees = _majority(stacked)
    total = torch.where(agrees, stacked, 0).sum(dim=0)
    if not normalise:
        return total
    each = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device).view(-1, 1)
    divisor = torch.where(agrees, each, 0).sum(dim=0)
    return total / torch.where(divisor == 0, 1, divisor)


@method(elementwise=True)
def dare(delta: Tensor, *, drop: float = 0.9, uniform: Tensor) -> Tensor:
    """Drop entries at random with probability ``drop`` and divide the rest by ``1 - drop``.

    Yu et al. 2023, arXiv:2311.03099, section 3.2. Give each delta of a merge a ``seed`` of its own.
    """
    if not 0 <= drop < 1:
        raise AlgebraError("dare", "drop is out of range", expected="0 <= drop < 1", found=drop)
    return torch.where(uniform.to(delta.device) < drop, 0, delta / (1 - drop))


@method()
def della(delta: Tensor, *, drop: float = 0.7, window: float = 0.2, uniform: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Drop entries at random, small ones of a row rather than large ones, and divide the rest by their odds.

    MAGPRUNE of Deep et al. 2024, arXiv:2406.11617, section 3: in each row the probability of being dropped falls
    from ``drop + window/2`` for the smallest entry to ``drop - window/2`` for the largest, evenly by rank. The
    paper's two further steps are `ties` with a density of 1: ``ak.ties([ak.della(a, seed=1), ak.della(b, seed=2)],
    density=1)``.
    """
    if not (window >= 0 and drop - window / 2 >= 0 and drop + window / 2 < 1):
        raise AlgebraError(
            "della",
            "drop and window are out of range",
            expected="0 <= drop - window/2 and drop + window/2 < 1",
            found=f"drop={drop}, window={window}",
        )
    rows = delta.view(shape) if len(shape) > 1 else delta.view(1, -1)
    rank = rows.abs().argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)  # 0 is the largest
    dropped = drop - window / 2 + window * rank / max(rows.shape[-1] - 1, 1)
    kept = uniform.to(delta.device).view(rows.shape) >= dropped
    return torch.where(kept, rows / (1 - dropped), 0).view(-1)


@method()
def breadcrumbs(delta: Tensor, *, smallest: float = 0.85, largest: float = 0.01) -> Tensor:
    """Leave out the ``largest`` share of a tensor's entries, which are outliers, and the ``smallest``, which are noise.

    Davari and Belilovsky 2023, arXiv:2312.06795, section 3. Entries as large as the ones at the two limits stay.
    """
    for name, value in (("smallest", smallest), ("largest", largest)):
        require_within("breadcrumbs", name, value, 0, 1, closed=True)
    size, count = delta.abs(), delta.numel()
    below, above = round(smallest * count), round(largest * count)
    if below + above >= count:
        return torch.zeros_like(delta)
    low = torch.kthvalue(size, below + 1).values
    high = torch.kthvalue(size, count - above).values
    return torch.where((size >= low) & (size <= high), delta, 0)


@method()
def sce(deltas: list[Tensor], *, top: float = 1.0, normalise: bool = False) -> Tensor:
    """Keep the entries on which deltas vary most, weigh each by its energy there, and leave out minority signs.

    Wan et al. 2024, FuseChat, arXiv:2408.07990, section 3.3: select the ``top`` share by variance over the deltas,
    calculate each one's weight as its share of the squares, erase what goes against the sign of the sum. The
    weighted rest is added up; ``normalise=True`` divides by the weights that are left of each entry, as mergekit does.
    """
    require_within("sce", "top", top, 0, 1)
    stacked = torch.stack(deltas)
    if top < 1 and len(deltas) > 1:
        varies = stacked.var(dim=0, correction=0)
        stacked = torch.stack([_largest(delta, varies, top) for delta in deltas])
    energy = [dot(delta, delta) for delta in stacked]
    shares = [one / (sum(energy) or 1.0) for one in energy]
    weights = torch.where(_majority(stacked), torch.tensor(shares, device=stacked.device).view(-1, 1), 0)
    merged = (stacked * weights).sum(dim=0)
    return torch.where(weights.sum(dim=0) > 0, merged / weights.sum(dim=0), 0) if normalise else merged


@method()
def model_stock(deltas: list[Tensor]) -> Tensor:
    """The mean of deltas, pulled toward the base by how little they agree: ``t * mean``.

    Jang et al. 2024, arXiv:2403.19522, equation 7: ``t = N cos / (1 + (N - 1) cos)``, with the mean cosine between two
    deltas of N, tensor by tensor. Where they oppose each other t is 0.
    """
    count = len(deltas)
    lengths = [dot(delta, delta) ** 0.5 for delta in deltas]
    pairs = [(i, j) for i in range(count) for j in range(i)]
    cosines = [
        dot(deltas[i], deltas[j]) / (lengths[i] * lengths[j]) if lengths[i] * lengths[j] else 0.0 for i, j in pairs
    ]
    cosine = max(0.0, sum(cosines) / len(cosines)) if cosines else 1.0
    t = count * cosine / (1 + (count - 1) * cosine)
    return torch.stack(deltas).mean(dim=0) * t


@method()
def nuslerp(a: Tensor, b: Tensor, *, t: float = 0.5, rows: bool = False, shape: tuple[int, ...]) -> Tensor:
    """Go from one delta to another along the arc between them: the whole tensor as one vector, or row by row.

    mergekit's NuSLERP with a base model. ``rows=True`` takes each row's own angle; nearly parallel ones are mixed
    linearly.
    """
    if not rows or len(shape) < 2:
        return along_arc(a, b, t)
    a, b = a.view(shape), b.view(shape)
    lengths = a.norm(dim=-1, keepdim=True) * b.norm(dim=-1, keepdim=True)
    angle = torch.acos(((a * b).sum(dim=-1, keepdim=True) / lengths.clamp(min=1e-30)).clamp(-1, 1))
    sine = torch.sin(angle)
    arc = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / sine
    return torch.where(sine > 1e-3, arc, a + t * (b - a)).view(-1)


@method(elementwise=True)
def common(a: Tensor, b: Tensor) -> Tensor:
    """What two deltas share: where their signs agree the smaller of the two entries, elsewhere nothing.

    >>> shared = ak.common(variant - base, other - base)

    For sets of signed amounts this is the intersection, as ``--variant2`` of the article's tool means it: its script
    was not published, so the formula is ours. ``common(a, b) + union(a, b)`` is ``a + b``.
    """
    return torch.where(torch.sign(a) == torch.sign(b), torch.where(a.abs() <= b.abs(), a, b), 0)


@refuse_unknown_options
def union(a: Delta, b: Delta) -> Delta:
    """What either of two deltas holds, what they share counted once: ``a + b - common(a, b)``.

    >>> either = ak.union(variant - base, other - base)

    Where signs agree that is the larger of the two entries, where they do not their sum. Raises MismatchError if the
    two do not fit.
    """
    either: Delta = a + b - common(a, b)
    return either


def _largest(delta: Tensor, by: Tensor, share: float) -> Tensor:
    """A delta's entries where ``by`` is among its largest ``share``; entries as large as the last of those stay too."""
    keep = round(share * by.numel())
    if keep == 0:
        return torch.zeros_like(delta)
    least = torch.kthvalue(by, by.numel() - keep + 1).values
    return torch.where(by >= least, delta, 0)


def _majority(stacked: Tensor) -> Tensor:
    """Which entries have the sign of the sum over all deltas, zero apart."""
    elected = torch.sign(stacked.sum(dim=0))
    return (torch.sign(stacked) == elected) & (elected != 0)

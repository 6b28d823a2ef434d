"""Merge methods over several deltas: what they agree on, and what they share."""

from __future__ import annotations

import torch

from alkahest.algebra.deltas import Delta
from alkahest.algebra.methods import PerOperand, dot, method, require_within
from alkahest.algebra.model_methods import along_arc
from alkahest.errors import refuse_unknown_options

Tensor = torch.Tensor


@method()
def ties(
    deltas: list[Tensor],
    *,
    density: PerOperand = (0.2,),
    weights: PerOperand = (1.0,),
    normalise: bool = True,
) -> Tensor:
    """Trim each delta to its largest entries, elect a sign per entry, average what agrees.

    Yadav et al. 2023, arXiv:2306.01708, algorithm 1, tensor by tensor (q, k and v apart). Signs are elected by the sum
    of what is left; an entry whose sum is 0 is 0.

    Parameters
    ----------
    deltas : list of Delta
        Differences of models with the same tensors.
    density : float or one for each delta, default 0.2
        Share of a tensor's entries that stay, 0 to 1; entries as large as the last of them stay too. Every number may
        be a list along the blocks or a mapping from patterns, as in `lerp`.
    weights : float or one for each delta, default 1
        What each delta is multiplied by before signs are elected. The average is over the weights that agree, so one
        number for all changes nothing.
    normalise : bool, default True
        False adds up what agrees instead of averaging it.

    Returns
    -------
    Delta

    Raises
    ------
    AlgebraError
        If something else than deltas is given, a list has another length than ``deltas``, or a density is out of range.

    Notes
    -----
    ``ties([0.7 * a, 0.3 * b])`` divides by the count of deltas that agree, ``ties([a, b], weights=[0.7, 0.3])`` by
    their weights, as mergekit's ``ties`` does. mergekit keeps ``int(density * n)`` entries where here it is rounded.
    sd-mecha counts signs unless it is given ``vote_sgn=True``.

    Examples
    --------
    >>> merged = base + ak.ties([variant - base, other - base], density=0.3, weights=[0.7, 0.3])
    >>> by_depth = ak.ties([variant - base, other - base], density=[0.2, {"*": 0.5, "layers": [0.1, 0.9]}])
    >>> summed = base + 0.8 * ak.ties([variant - base, other - base], normalise=False)
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


@method()
def sce(deltas: list[Tensor], *, top: float = 1.0, normalise: bool = False) -> Tensor:
    """Keep the entries on which deltas vary most, weigh each by its energy there, and leave out minority signs.

    Wan et al. 2024, FuseChat, arXiv:2408.07990, section 3.3: select the ``top`` share by variance over the deltas,
    calculate each one's weight as its share of the squares, erase what goes against the sign of the sum.

    Parameters
    ----------
    deltas : list of Delta
        Differences of models with the same tensors.
    top : float, default 1
        Share of a tensor's entries that stay, more than 0 and at most 1.
    normalise : bool, default False
        Divide by the weights that are left of each entry, as mergekit does, instead of adding the weighted rest up.

    Returns
    -------
    Delta

    Raises
    ------
    AlgebraError
        If something else than deltas is given, or ``top`` is out of range.

    Notes
    -----
    mergekit's ``sce`` gives all deltas equal weights where their mean squares add up to less than 1e-6, as those of
    differences of 1e-4 do; here weights are shares at any size.

    Examples
    --------
    >>> merged = base + ak.sce([variant - base, other - base], top=0.5, normalise=True)
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

    Parameters
    ----------
    deltas : list of Delta
        Differences of models with the same tensors. Of one alone t is 1.

    Returns
    -------
    Delta

    Raises
    ------
    AlgebraError
        If something else than deltas is given.

    Notes
    -----
    mergekit's ``model_stock`` lets t be negative where the mean cosine is; sd-mecha's takes the cosine of each row, of
    neighbours in the list.

    Examples
    --------
    >>> merged = base + ak.model_stock([variant - base, other - base])
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

    mergekit's NuSLERP with a base model; its ``weight`` of the two, w1 and w2, is ``t = w2 / (w1 + w2)``.

    Parameters
    ----------
    a, b : Delta
        Where to start and where to go.
    t : float, default 0.5
        How far, 0 at ``a`` and 1 at ``b``.
    rows : bool, default False
        Take each row's own angle (``nuslerp_flatten: false``).

    Returns
    -------
    Delta

    Raises
    ------
    AlgebraError
        If something else than deltas is given.

    Notes
    -----
    Tensors that point nearly the same way (a cosine above 0.9995) are mixed linearly, where mergekit stays on the arc;
    the difference is 1e-4 of them at most.

    Examples
    --------
    >>> merged = base + ak.nuslerp(variant - base, other - base, t=0.3, rows=True)
    >>> deeper_more = base + ak.nuslerp(variant - base, other - base, t=[0, 1])
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

    For sets of signed amounts this is the intersection, as ``--variant2`` of the article's tool means it: its script
    was not published, so the formula is ours. ``common(a, b) + union(a, b)`` is ``a + b``.

    Parameters
    ----------
    a, b : Delta
        Differences of models with the same tensors.

    Returns
    -------
    Delta

    Raises
    ------
    AlgebraError
        If something else than deltas is given.
    MismatchError
        If the two do not fit.

    Examples
    --------
    >>> shared = ak.common(variant - base, other - base)
    >>> only_the_variants = (variant - base) - shared
    """
    return torch.where(torch.sign(a) == torch.sign(b), torch.where(a.abs() <= b.abs(), a, b), 0)


@refuse_unknown_options
def union(a: Delta, b: Delta) -> Delta:
    """What either of two deltas holds, what they share counted once: ``a + b - common(a, b)``.

    Where signs agree that is the larger of the two entries, where they do not their sum.

    Parameters
    ----------
    a, b : Delta
        Differences of models with the same tensors.

    Returns
    -------
    Delta

    Raises
    ------
    AlgebraError
        If something else than deltas is given.
    MismatchError
        If the two do not fit.

    Examples
    --------
    >>> either = ak.union(variant - base, other - base)
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

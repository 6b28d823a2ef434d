"""Merge methods over complete models."""

from __future__ import annotations

import math

import torch

from alkahest.algebra.methods import dot, method, require_within
from alkahest.errors import AlgebraError

Tensor = torch.Tensor


@method(weights=True)
def slerp(a: Tensor, b: Tensor, *, t: float = 0.5) -> Tensor:
    """Go from ``a`` to ``b`` along the arc between them, each tensor as one vector.

    Shoemake 1985, "Animating rotation with quaternion curves"; weights keep their own lengths, as in mergekit. Nearly
    parallel tensors (a cosine above 0.9995) are mixed linearly, where the two formulas agree.

    Parameters
    ----------
    a, b : Weights
        Where to start and where to go. The first leads, as in `lerp`.
    t : float, default 0.5
        How far, 0 at ``a`` and 1 at ``b``; it may be a list along the blocks or a mapping from patterns.

    Returns
    -------
    Weights

    Raises
    ------
    AlgebraError
        If something else than weights is given, or what ``b`` protects ``a`` does not.

    Notes
    -----
    sd-mecha's ``slerp`` turns the directions and mixes the lengths linearly.

    Examples
    --------
    >>> merged = ak.slerp(base, variant, t=0.3)
    >>> deeper_more = ak.slerp(base, variant, t={"*": 0.2, "layers": [0, 0.5, 1]})
    """
    return along_arc(a, b, t)


@method(weights=True)
def karcher(models: list[Tensor], *, iterations: int = 20) -> Tensor:
    """The mean of models on the sphere: the direction whose arcs to all of them cancel, at their mean length.

    The Riemannian centre of mass (Karcher 1977, Comm. Pure Appl. Math. 30), each tensor as one vector: from the mean of
    the directions step along the mean of the arcs, until that is shorter than 1e-6.

    Parameters
    ----------
    models : list of Weights
        The first leads, as in `lerp`.
    iterations : int, default 20
        How many steps at most, at least 1; mergekit's ``max_iter``, 10 there.

    Returns
    -------
    Weights

    Raises
    ------
    AlgebraError
        If something else than weights is given, or ``iterations`` is no whole number of at least 1.

    Examples
    --------
    >>> merged = ak.karcher([base, variant, other])
    """
    if iterations < 1:
        raise AlgebraError("karcher", "iterations is out of range", expected="at least 1", found=iterations)
    lengths = [dot(model, model) ** 0.5 for model in models]
    units = [model / length for model, length in zip(models, lengths, strict=True) if length > 0]
    mean = sum(lengths) / len(lengths)
    centre = sum(units, torch.zeros_like(models[0]))
    for _ in range(int(iterations)):
        size = dot(centre, centre) ** 0.5
        if size < 1e-12:  # directions that cancel have no mean
            return torch.stack(models).mean(dim=0)
        centre = centre / size
        step = torch.zeros_like(centre)
        for unit in units:
            angle = math.acos(max(-1.0, min(1.0, dot(centre, unit))))
            if angle > 1e-6:
                step += (unit - math.cos(angle) * centre) * (angle / math.sin(angle) / len(units))
        length = dot(step, step) ** 0.5
        if length < 1e-6:
            break
        centre = math.cos(length) * centre + math.sin(length) / length * step
    return torch.mul(centre, mean)


@method(weights=True)
def cosine_add(a: Tensor, b: Tensor, *, alpha: float = 0.0, whole: float = 0.0, shape: tuple[int, ...]) -> Tensor:
    """Take more of ``b`` the less alike the two are: ``a + (1 - clamp(cosine - alpha, 0, 1)) * (b - a)``.

    supermerger's cosineA, sd-mecha's ``add_cosine_a``: the cosine of each column over the rows.

    Parameters
    ----------
    a, b : Weights
        The first leads, as in `lerp`.
    alpha : float, default 0
        What is subtracted from the cosine: 1 takes all of ``b``.
    whole : float, default 0
        Share of the cosine of the tensors as a whole, 0 to 1; 0.5 is cosineB.

    Returns
    -------
    Weights

    Raises
    ------
    AlgebraError
        If something else than weights is given, or ``whole`` is out of range.

    Examples
    --------
    >>> merged = ak.cosine_add(base, variant, alpha=0.1, whole=0.5)
    """
    require_within("cosine_add", "whole", whole, 0, 1, closed=True)
    one, other = a.view(shape), b.view(shape)
    columns = torch.nn.functional.cosine_similarity(one, other, dim=0)
    lengths = (dot(a, a) * dot(b, b)) ** 0.5
    cosine = (1 - whole) * columns + whole * (dot(a, b) / lengths if lengths else 0.0)
    return (one + (1 - (cosine - alpha).clamp(0, 1)) * (other - one)).view(-1)


@method(weights=True, elementwise=True)
def train_difference(a: Tensor, b: Tensor, base: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Add what ``b`` learned over ``base`` where ``a`` has not learned it yet.

    supermerger's trainDifference, sd-mecha's ``train_difference_mask``:
    ``a + 1.8 alpha (b - base) |b - a| / (|b - base| + |b - a|)``, entry by entry; 1.8 is its author's constant.

    Parameters
    ----------
    a : Weights
        What is added to. It leads, as in `lerp`.
    b, base : Weights
        What learned something, and what from.
    alpha : float, default 1
        How much of it.

    Returns
    -------
    Weights

    Raises
    ------
    AlgebraError
        If something else than weights is given.

    Examples
    --------
    >>> merged = ak.train_difference(other, variant, base, alpha=0.5)
    """
    learned, missing = b - base, (b - a).abs()
    total = learned.abs() + missing
    return a + torch.where(total > 0, learned * (missing / total), 0) * (1.8 * alpha)


def along_arc(a: Tensor, b: Tensor, t: float) -> Tensor:
    """`slerp` of two flat tensors."""
    cosine = dot(a, b) / (dot(a, a) * dot(b, b)) ** 0.5 if a.any() and b.any() else 1.0
    if abs(cosine) > 0.9995:
        return a + t * (b - a)
    angle = math.acos(max(-1.0, cosine))
    share_a, share_b = (math.sin(share * angle) / math.sin(angle) for share in (1 - t, t))
    return a * share_a + b * share_b

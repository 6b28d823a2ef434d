"""Merge methods over one delta: which of its entries are kept."""

from __future__ import annotations

import torch

from alkahest.algebra.methods import method, require_within
from alkahest.errors import AlgebraError

Tensor = torch.Tensor


@method(elementwise=True)
def dare(delta: Tensor, *, drop: float = 0.9, uniform: Tensor) -> Tensor:
    """Drop entries at random and divide the rest by what share of them is left.

    Yu et al. 2023, arXiv:2311.03099, section 3.2.

    Parameters
    ----------
    delta : Delta
        What is made sparse.
    drop : float, default 0.9
        Probability of being dropped, at least 0 and less than 1; it may be a list along the blocks or a mapping from
        patterns, as in `lerp`.
    seed : int, default 0
        Each delta of a merge needs one of its own, or the same entries go. Numbers depend on the seed and the tensor's
        name alone, so a merge is the same whatever the threads.

    Returns
    -------
    Delta

    Raises
    ------
    AlgebraError
        If ``drop`` is out of range, or ``seed`` is no whole number.

    Notes
    -----
    The rest is divided by ``1 - drop``, 10 times as large at 0.9. mergekit's ``dare_linear`` and ``dare_ties`` multiply
    it until its L1 norm is that of the delta instead, 9.76 in one case that was tried. sd-mecha's ``dropout`` drops the
    same entries of all deltas unless it is told otherwise.

    Examples
    --------
    >>> merged = base + ak.dare(variant - base, drop=0.5, seed=1) + ak.dare(other - base, drop=0.5, seed=2)
    >>> dare_ties = base + ak.ties([ak.dare(variant - base, seed=1), ak.dare(other - base, seed=2)], density=1)
    """
    if not 0 <= drop < 1:
        raise AlgebraError("dare", "drop is out of range", expected="0 <= drop < 1", found=drop)
    return torch.where(uniform.to(delta.device) < drop, 0, delta / (1 - drop))


@method()
def della(delta: Tensor, *, drop: float = 0.7, window: float = 0.2, uniform: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Drop entries at random, small ones of a row rather than large ones, and divide the rest by their odds.

    MAGPRUNE of Deep et al. 2024, arXiv:2406.11617, section 3: in each row the probability of being dropped falls from
    ``drop + window/2`` for the smallest entry to ``drop - window/2`` for the largest, evenly by rank.

    Parameters
    ----------
    delta : Delta
        What is made sparse.
    drop : float, default 0.7
        Mean probability of being dropped.
    window : float, default 0.2
        How much it differs between a row's smallest and largest entry; twice mergekit's ``epsilon``.
    seed : int, default 0
        Each delta of a merge needs one of its own.

    Returns
    -------
    Delta

    Raises
    ------
    AlgebraError
        Unless ``0 <= drop - window/2`` and ``drop + window/2 < 1``, or if ``seed`` is no whole number.

    Notes
    -----
    The paper's two further steps are `ties` with a density of 1, as in the example. Each entry is divided by its own
    odds; mergekit's ``della`` restores the L1 norm of the whole delta instead, a factor of 1.066 in one case where the
    paper's is 1.

    Examples
    --------
    >>> thinned = [ak.della(variant - base, seed=1), ak.della(other - base, seed=2)]
    >>> merged = base + ak.ties(thinned, density=1)
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
    """Leave out the largest entries of a tensor, which are outliers, and the smallest, which are noise.

    Davari and Belilovsky 2023, arXiv:2312.06795, section 3. Entries as large as the ones at the two limits stay.

    Parameters
    ----------
    delta : Delta
        What is made sparse.
    smallest : float, default 0.85
        Share of the entries that goes as noise, 0 to 1: mergekit's ``1 - density - gamma``.
    largest : float, default 0.01
        Share that goes as outliers, 0 to 1: mergekit's ``gamma``.

    Returns
    -------
    Delta

    Raises
    ------
    AlgebraError
        If a share is out of range.

    Examples
    --------
    >>> merged = base + 0.5 * ak.breadcrumbs(variant - base, smallest=0.5) + 0.5 * ak.breadcrumbs(other - base)
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

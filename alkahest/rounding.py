"""What rounding takes from a delta: sizes in units of the last place, and what adding them leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alkahest.dtypes import Format

if TYPE_CHECKING:
    import pandas

Counts = npt.NDArray[np.int64]
Energies = npt.NDArray[np.float64]
# Lower edges of the bins, four to an octave: 2^-16 to 2^16 units in w's last place; the outer ones take the rest.
ULPS = np.array([2.0**octave * (1 + quarter / 4) for octave in range(-16, 16) for quarter in range(4)])


def ulp_counts(delta: Tensor, weights: Tensor, form: Format, scale: float = 1.0) -> tuple[Counts, Energies]:
    """How many of |delta| / ulp(weight) fall into each bin of `ULPS`, and the sum of delta squared there.

    ulp(w) is the distance of w to its neighbours in ``form``: 2 ** (exponent of w - mantissa bits), with
    the exponent of the smallest normal number for all below it.
    """
    d, w = (delta / scale, weights / scale) if scale != 1.0 else (delta, weights)
    # The bits of a float32 are its exponent and then its mantissa: shifted, they count quarters of octaves.
    bins = (d.view(torch.int32) & 0x7FFFFFFF) >> 21
    exponents = ((w.view(torch.int32) >> 23) & 0xFF).clamp_(min=form.min_exponent + 127)
    bins.sub_((exponents - form.mantissa) << 2).add_(len(ULPS) // 2).clamp_(0, len(ULPS) - 1)
    bins.masked_fill_(d == 0, len(ULPS))
    counts = torch.bincount(bins, minlength=len(ULPS) + 1)
    energy = torch.bincount(bins, weights=delta.double().square(), minlength=len(ULPS) + 1)
    return counts[:-1].cpu().numpy(), energy[:-1].cpu().numpy()


def share_below(histogram: npt.NDArray[Any], size: float) -> float:
    """The share of a histogram over `ULPS` that lies below ``size`` units in the last place; NaN if it is empty.

    Inside a bin what is there is taken to be spread evenly.
    """
    total = float(histogram.sum())
    if total == 0:
        return float("nan")
    upper = np.append(ULPS[1:], 2 * ULPS[-1] - ULPS[-2])
    inside = np.clip((size - ULPS) / (upper - ULPS), 0.0, 1.0)
    return float((histogram * inside).sum()) / total


def absorbed(table: pandas.DataFrame, k: float = 1.0) -> pandas.DataFrame:
    """What adding ``k`` times a measured delta to its weights changes nothing of: a row for each row of the table.

    >>> ak.absorbed(ak.delta_table(variant - base, on=bridge), k=20).energy.mean()

    A change below half a unit in the last place is rounded away again where the weights are numbers of
    their format, as stored ones are. ``count`` is the share of changed elements that this befalls,
    ``energy`` the share of the delta's sum of squares that they hold. From the histograms of
    `delta_table`: exact to a few parts in a thousand. NaN where nothing was changed.
    """
    limit = 0.5 / abs(k) if k else float("inf")
    found = {name: [share_below(histogram, limit) for histogram in table[column]] for name, column in (("count", "ulps"), ("energy", "ulp_energy"))}  # fmt: skip
    labels = [name for name in ("tensor", "part", "block", "module") if name in table]
    return table[labels].assign(**found)

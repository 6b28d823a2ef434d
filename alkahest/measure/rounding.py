"""What rounding takes from a delta: in the variant's file, on adding, and what multiplying makes of it.

ulp(w), the unit in the last place, is the distance of w to its neighbours in the format that stores it.
All closed forms below leave out the steps where a change crosses a power of two and its ulp doubles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alkahest.engine.scalars import number
from alkahest.errors import AlgebraError, refuse_unknown_options
from alkahest.model.dtypes import Format

if TYPE_CHECKING:
    import pandas

_NOISE = ("changed", "delta_norm", "elements", "step", "base_step")
Counts = npt.NDArray[np.int64]
Energies = npt.NDArray[np.float64]
# Lower edges of the bins, four to an octave: 2^-16 to 2^16 units in w's last place; the outer ones take the rest.
ULPS = np.array([2.0**octave * (1 + quarter / 4) for octave in range(-16, 16) for quarter in range(4)])
_UPPER = np.append(ULPS[1:], 2 * ULPS[-1] - ULPS[-2])
# 32 sizes spread evenly inside each bin.
_INSIDE = ULPS[:, None] + (_UPPER - ULPS)[:, None] * (np.arange(32) + 0.5) / 32


def require_columns(table: Any, operation: str, *columns: str) -> None:
    """Raise AlgebraError unless a table is one of `delta_table` that still has these columns."""
    lacking = [name for name in columns if name not in getattr(table, "columns", ())]
    if lacking:
        problem = "a table of ak.delta_table is needed, with its columns"
        raise AlgebraError(operation, problem, expected=", ".join(columns), found=f"none called {lacking[0]!r}")


def ulp_counts(delta: Tensor, weights: Tensor, form: Format, scale: float = 1.0) -> tuple[Counts, Energies]:
    """How many of |delta| / ulp(weight) fall into each bin of `ULPS`, and the sum of delta squared there.

    ulp(w) is the distance of w to its neighbours in ``form``: 2 ** (exponent of w - mantissa bits), with
    the exponent of the smallest normal number for all below it.
    """
    d, w = (delta / scale, weights / scale) if scale != 1.0 else (delta, weights)
    # The bits of a float32 are its exponent and then its mantissa: shifted, they count quarters of octaves.
    bins = (d.view(torch.int32) & 0x7FFFFFFF) >> 21
    bins.sub_((_exponents(w, form) - form.mantissa) << 2).add_(len(ULPS) // 2).clamp_(0, len(ULPS) - 1)
    bins.masked_fill_(d == 0, len(ULPS))
    counts = torch.bincount(bins, minlength=len(ULPS) + 1)
    energy = torch.bincount(bins, weights=delta.double().square(), minlength=len(ULPS) + 1)
    return counts[:-1].cpu().numpy(), energy[:-1].cpu().numpy()


def ulp(weights: Tensor, form: Format, scale: float = 1.0) -> Tensor:
    """The unit in the last place of each weight, float32: 2 ** (exponent - mantissa bits), times the scale."""
    exponents = _exponents(weights / scale if scale != 1.0 else weights, form)
    powers = exponents.bitwise_left_shift_(23).view(torch.float32)  # the bits of 2 ** exponent
    return powers.mul_(scale * 2.0**-form.mantissa)


def is_rounding(variant: Tensor, base: Tensor, unit: tuple[Format, float]) -> bool:
    """Whether v is nowhere farther from b than rounding b to v's format puts it: half an ulp, up to float32's own."""
    half = ulp(variant, *unit).mul_(0.5 * (1 + 1e-3))
    return not bool(((variant - base).abs_() > half).any())


def nearest_error(moves: Energies) -> Energies:
    """Mean square error, in ulp squared, of adding ``moves`` ulp to a stored number and rounding to nearest.

    The stored number lies on the grid, so the error is the distance to the nearest whole move, squared.
    """
    distance = np.abs(moves - np.rint(moves))
    return distance**2


def stochastic_error(moves: Energies) -> Energies:
    """Mean square error, in ulp squared, of the same with stochastic rounding: f (1 - f), f the fraction of the move.

    Also that of ``bf16(w + d) - bf16(w)`` against d, where w was finer than bf16 and lies anywhere within
    an ulp: both ends are off by up to half an ulp, and the mean of the difference is right.
    """
    fraction = np.abs(moves) % 1.0
    return fraction * (1 - fraction)


def share_below(histogram: npt.NDArray[Any], size: float) -> float:
    """The share of a histogram over `ULPS` that lies below ``size`` units in the last place; NaN if it is empty.

    Inside a bin what is there is taken to be spread evenly.
    """
    total = float(histogram.sum())
    if total == 0:
        return float("nan")
    inside = np.clip((size - ULPS) / (_UPPER - ULPS), 0.0, 1.0)
    return float((histogram * inside).sum()) / total


@refuse_unknown_options
def absorbed(table: pandas.DataFrame, k: float = 1.0) -> pandas.DataFrame:
    """What adding ``k`` times a measured delta to its weights changes nothing of: a row for each row of the table.

    A change below half a unit in the last place is rounded away again where the weights are numbers of their format, as
    stored ones are. From the histograms of `delta_table`: exact to a few parts in a thousand.

    Parameters
    ----------
    table : pandas.DataFrame
        Of `delta_table`, with ``on`` what is added to.
    k : float, default 1
        The multiplier.

    Returns
    -------
    pandas.DataFrame
        ``count``: the share of changed elements that this befalls; ``energy``: the share of the delta's sum of squares
        that they hold. NaN where nothing was changed.

    Raises
    ------
    AlgebraError
        If ``k`` is no finite number, or the table is another.

    Examples
    --------
    >>> table = ak.delta_table(variant - base, on=bridge)
    >>> lost = ak.absorbed(table, k=20).energy.mean()
    """
    require_columns(table, "absorbed", "ulps", "ulp_energy")
    k = number(k, "absorbed")
    limit = 0.5 / abs(k) if k else float("inf")
    found = {
        name: [share_below(histogram, limit) for histogram in table[column]]
        for name, column in (("count", "ulps"), ("energy", "ulp_energy"))
    }
    labels = [name for name in ("tensor", "part", "block", "module") if name in table]
    return table[labels].assign(**found)


@refuse_unknown_options
def rounding_curve(table: pandas.DataFrame, ks: Sequence[float] | None = None) -> pandas.DataFrame:
    """What rounding does to ``k`` times a measured delta, over many ``k``: a row for each.

    Parameters
    ----------
    table : pandas.DataFrame
        Of `delta_table`, with ``on`` what is added to.
    ks : list of float, optional
        Multipliers, by default 81 from 0.1 to 1000, evenly by their logarithm.

    Returns
    -------
    pandas.DataFrame
        ``size`` is k |d| / |w|; ``absorbed_count`` and ``absorbed_energy`` are as in `absorbed`. Of what is left by
        nearest rounding of the sum ``nearest_kept`` says how much of k d there is along k d itself (1 means no bias),
        and ``nearest_error`` the norm of what differs over that of k d. Stochastic rounding keeps 1 on average and
        makes ``stochastic_error``. ``noise_least`` and ``noise_most`` are the noise of the variant's own file,
        multiplied by k, over |w|: see `file_noise`.

    Raises
    ------
    AlgebraError
        If a multiplier is no finite number, there are none, or the table is another.

    Examples
    --------
    >>> curve = ak.rounding_curve(ak.delta_table(variant - base, on=bridge), ks=[1, 10, 20, 171.1])
    """
    import pandas as pd

    ks = np.geomspace(0.1, 1000.0, 81).tolist() if ks is None else [number(k, "rounding_curve") for k in ks]
    if not ks:
        raise AlgebraError("rounding_curve", "there are no multipliers", fix="ks=[1, 10, 171.1]")
    require_columns(table, "rounding_curve", "on_norm", "ulps", "ulp_energy", *_NOISE)
    on, delta = (math.sqrt(table[name].pow(2).sum()) for name in ("on_norm", "delta_norm"))
    counts, energy = (np.sum(list(table[name]), axis=0) for name in ("ulps", "ulp_energy"))
    noise = file_noise(table)
    least, most = (math.sqrt((noise[name] * table.delta_norm**2).sum()) for name in ("least", "most"))
    rows = []
    for k in ks:
        sizes = abs(k) * _INSIDE  # every bin's moves, and the ulp squared that a bin's energy stands for
        squares = energy[:, None] / (_INSIDE**2).mean(1, keepdims=True) / _INSIDE.shape[1]
        whole = float((squares * sizes**2).sum())
        per = {
            name: float((squares * found).sum()) / whole if whole else math.nan
            for name, found in {
                "nearest_kept": np.rint(sizes) * sizes,
                "nearest_error": nearest_error(sizes),
                "stochastic_error": stochastic_error(sizes),
            }.items()
        }
        limit = 0.5 / abs(k) if k else math.inf
        rows.append(
            {
                "k": k,
                "size": abs(k) * delta / on if on else math.nan,
                "absorbed_count": share_below(counts, limit),
                "absorbed_energy": share_below(energy, limit),
                "nearest_kept": per["nearest_kept"],
                "nearest_error": math.sqrt(per["nearest_error"]),
                "stochastic_error": math.sqrt(per["stochastic_error"]),
                "noise_least": abs(k) * least / on if on else math.nan,
                "noise_most": abs(k) * most / on if on else math.nan,
            }
        )
    curve = pd.DataFrame(rows)
    curve.attrs |= table.attrs
    return curve


@refuse_unknown_options
def file_noise(table: pandas.DataFrame) -> pandas.DataFrame:
    """How much of a delta may be rounding of the files it was taken from: shares of its sum of squares, per row.

    In files of one dtype, with a change alike all over a tensor, of which a share p shows, the noise is p (1 - p) ulp
    squared, at most 1/4; a base in a coarser dtype adds its own ulp squared / 12, unless the delta is too small for
    that to be so. Weights that were trained in their stored dtype have no noise at all. The numbers cannot tell these
    apart; `delta_spectra` can, for noise has no leading directions.

    Parameters
    ----------
    table : pandas.DataFrame
        Of `delta_table`.

    Returns
    -------
    pandas.DataFrame
        ``least``: the noise if the variant was fine-tuned from the base as stored, every changed element being off by
        ulp squared / 12 of the variant's file. ``most``: if the base was rounded from finer weights too. NaN where
        nothing was changed.

    Raises
    ------
    AlgebraError
        If the table is another.

    Examples
    --------
    >>> noise = ak.file_noise(ak.delta_table(variant - base))[["tensor", "least", "most"]]
    """
    require_columns(table, "file_noise", *_NOISE)
    share, energy = table.changed, (table.delta_norm**2).where(table.delta_norm > 0)
    least = share * table.elements * table.step**2 / 12 / energy
    alike = table.elements * table.step**2 * (share * (1 - share)).where(share < 0.5, 0.25) / energy
    coarser = least + share * table.elements * table.base_step**2 / 12 / energy
    most = least.where(table.step > 2 * table.base_step, alike)
    is_coarser = table.base_step > 2 * table.step
    most = most.where(~is_coarser, coarser.where(coarser < 1.5, least))
    labels = [name for name in ("tensor", "part", "block", "module") if name in table]
    return table[labels].assign(least=least.clip(upper=1), most=most.clip(upper=1))


def _exponents(weights: Tensor, form: Format) -> Tensor:
    """Exponents plus 127, as float32 holds them; that of the smallest normal number for all below it."""
    return ((weights.view(torch.int32) >> 23) & 0xFF).clamp_(min=form.min_exponent + 127)

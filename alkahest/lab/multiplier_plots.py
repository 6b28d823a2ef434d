"""Plots over the multiplier: what rounding takes, what multiplying costs, and what each part needs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from alkahest.lab.figure import COLOURS, Plot, axes_for, legend_beside, number_text, title_of_plot

if TYPE_CHECKING:
    import pandas

# The article's limits are marked in both of their readings: the whole multiplier, or ten times the adding side.
MARKED = {
    1.0: "1x",
    10.0: "10x, ComfyUI's cap",
    20.0: '20x, "practically 20x" in all',
    200.0: "200x, the same on the adding side",
}


_SEEN = 1e-3  # of the delta: what is smaller is not drawn
_TICKS = (1.0, 2.0, 5.0)  # in every decade, where there are few


def survival(curve: pandas.DataFrame, ax: Axes | None = None, title: str | None = None) -> Plot:
    """What is left of a delta after adding and rounding, over k, with the usual marks."""
    ax = axes_for(ax, (8, 4.2))
    lines = {
        "elements that change": 1 - curve.absorbed_count,
        "energy that survives": 1 - curve.absorbed_energy,
        "kept along the delta (1 = no bias)": curve.nearest_kept,
    }
    for number, (name, values) in enumerate(lines.items()):
        ax.plot(curve.k, values, color=COLOURS[number], ls=("-", "--", "-.")[number], lw=2, label=name)
    ax.axhline(1.0, color="0.7", lw=0.8)
    ax.set_ylim(-0.02, max(1.1, 1.05 * float(np.nanmax(curve.nearest_kept))))
    ax.set_ylabel("share of the delta, unitless\n(added, rounded to nearest)")
    _mark_multipliers(ax, curve.k)
    ax.set_title(title or title_of_plot(curve, "What adding leaves of the delta"))
    words = ", ".join(f"{number_text(1 - _at(curve, 'absorbed_energy', k))} at {k:g}x" for k in _inside(curve.k))
    return Plot(
        ax, f"{ax.get_title()}: share of the delta's energy that survives rounding, over the multiplier: {words}."
    )


def noise(curve: pandas.DataFrame, ax: Axes | None = None, title: str | None = None) -> Plot:
    """What multiplying costs: the delta's size and the noise in it, relative to the weights, over k."""
    ax = axes_for(ax, (8, 4.2))
    ax.plot(curve.k, curve["size"], color=COLOURS[0], lw=2, label="k |delta|")
    ax.plot(curve.k, curve["size"] * curve.nearest_error, color=COLOURS[1], ls="--", label="error of nearest rounding")
    ax.plot(
        curve.k, curve["size"] * curve.stochastic_error, color=COLOURS[2], ls="-.", label="error of stochastic rounding"
    )
    # Of float32 files it is there and a millionth of the delta: nothing to draw, nor to stretch the axis for.
    if (curve.noise_most > _SEEN * curve["size"]).any():
        low = curve.noise_least.clip(lower=_SEEN * curve["size"])
        ax.fill_between(
            curve.k,
            low,
            curve.noise_most,
            color=COLOURS[3],
            alpha=0.35,
            label="the file's own rounding, times k",
            hatch="//",
            edgecolor=COLOURS[3],
            lw=0,
        )
    ax.set_yscale("log")
    ax.set_ylabel("norm / norm of the weights,\nunitless (log scale)")
    _mark_multipliers(ax, curve.k)
    ax.set_title(title or title_of_plot(curve, "What multiplying costs"))
    words = ", ".join(
        f"{number_text(_at(curve, 'noise_least', k))} to {number_text(_at(curve, 'noise_most', k))} at {k:g}x"
        for k in _inside(curve.k)
    )
    return Plot(
        ax,
        f"{ax.get_title()}: norms relative to the weights over the multiplier; the file's own rounding makes {words}.",
    )


def multiplier_by_part(multiplier: Any, ax: Axes | None = None, title: str | None = None) -> Plot:
    """The k that each part would need by itself, beside the one for all, with the usual marks."""
    parts = multiplier.per_part
    own = multiplier.basis == "relative"
    values = (parts.k if own else parts.relative_at_k).to_numpy(float)
    ax = axes_for(ax, (8, 0.45 * len(parts) + 1.8))
    some = np.isfinite(values) & (values > 0) & (parts.changed > 0).to_numpy()
    y = np.arange(len(parts))
    ax.plot(values[some], y[some], "o", color=COLOURS[0], ms=8)
    ax.set_ylim(len(parts) - 0.4, -0.9)  # first part on top, with room for its number
    # What keeps a part from having a number stands beside its name, where no line of the limits crosses it.
    names = [part if good else f"{part}\n{why}" for part, good, why in zip(parts.part, some, parts.why, strict=True)]
    ax.set_yticks(y, names)
    ax.set_xscale("log")
    for place, value in zip(y[some], values[some], strict=True):
        ax.annotate(number_text(value), (value, place), xytext=(6, 2), textcoords="offset points", va="bottom")
    if own:
        ax.axvline(float(multiplier), color=COLOURS[1], lw=2, label=f"all together: {float(multiplier):.4g}")
        _mark_multipliers(ax, values[some], axis_label="multiplier k that brings the part to its share (log scale)")
    else:
        ax.set_xlabel("k |delta| / |weights| at the multiplier, unitless (log scale)")
    ax.margins(x=0.15)
    low, high = ax.get_xlim()
    if some.any() and high < 10 * low:  # equal parts shall look equal
        middle = math.sqrt(low * high)
        ax.set_xlim(middle / math.sqrt(10), middle * math.sqrt(10))
    _label_ticks(ax)
    ax.grid(axis="y", color="0.9")
    ax.set_title(title or title_of_plot(parts, f"{float(multiplier):.4g} ({multiplier.basis}) by part"))
    words = ", ".join(
        f"{part} {number_text(value) if good else why}"
        for part, value, good, why in zip(parts.part, values, some, parts.why, strict=True)
    )
    return Plot(ax, f"{ax.get_title()}: {words}.")


def multiplier_overview(
    curve: pandas.DataFrame, multiplier: Any, k: float | None = None, figure: Figure | None = None
) -> Plot:
    """What adding leaves of a delta and what multiplying costs, with k marked, and the multiplier by part below."""
    k = float(multiplier) if k is None else k
    figure = Figure(figsize=(10, 9), layout="constrained") if figure is None else figure
    upper, middle, lower = figure.subplots(3, 1, height_ratios=(3, 3, 2))
    drawn = [survival(curve, upper), noise(curve, middle), multiplier_by_part(multiplier, lower)]
    for axes in (upper, middle):
        axes.axvline(k, color=COLOURS[1], lw=2.5, label=f"k = {k:.4g}")
        legend_beside(axes)
    return Plot(upper, " ".join(one.alt for one in drawn))


def _mark_multipliers(ax: Axes, ks: Any, axis_label: str = "multiplier k (log scale)") -> None:
    ax.set_xscale("log")
    ax.set_xlabel(axis_label)
    low, high = (float(np.min(ks)), float(np.max(ks))) if len(ks) else (1.0, 1.0)
    for (k, name), style in zip(MARKED.items(), (":", "-.", "--", (0, (1, 3))), strict=True):
        if low / 10 <= k <= high * 10:
            ax.axvline(k, color="0.35", ls=style, lw=1, label=name)
    legend_beside(ax)


def _label_ticks(ax: Axes) -> None:
    """Plain numbers on a logarithmic axis, at 1, 2 and 5 where it has less than two decades; no minor labels."""
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=_TICKS if high < 100 * low else (1.0,)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _inside(ks: Any) -> Iterator[float]:
    yield from (k for k in MARKED if np.min(ks) <= k <= np.max(ks))


def _at(curve: pandas.DataFrame, column: str, k: float) -> float:
    return float(np.interp(math.log(k), np.log(curve.k), curve[column]))

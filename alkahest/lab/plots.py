"""Plots of measured tables: a DataFrame in, Axes and alt text out.

>>> plots.delta_magnitudes(ak.delta_table(variant - base))          # shows itself in a notebook
>>> plots.delta_magnitudes(table, statistic="rms", ax=axes).alt     # or draws into Axes of yours

Zeros have a strip of their own at the bottom of a log axis. Colours are `okabe_ito`, never hue alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alkahest.errors import AlkahestError, unknown
from alkahest.lab.effect_plots import alignment_by_depth as alignment_by_depth
from alkahest.lab.effect_plots import effect_blocks as effect_blocks
from alkahest.lab.effect_plots import loss_curve as loss_curve
from alkahest.lab.effect_plots import weight_and_effect as weight_and_effect
from alkahest.lab.figure import COLOURS, MARKERS, Plot, axes_for, legend_beside, number_text, title_of_plot
from alkahest.lab.multiplier_plots import multiplier_by_part as multiplier_by_part
from alkahest.lab.multiplier_plots import multiplier_overview as multiplier_overview
from alkahest.lab.multiplier_plots import noise as noise
from alkahest.lab.multiplier_plots import survival as survival
from alkahest.model.families import FAMILIES, family_of

if TYPE_CHECKING:
    import pandas

    from alkahest.pictures.effects import Effect

__all__ = [
    "COLOURS",
    "STATISTICS",
    "alignment_by_depth",
    "comparison_matrix",
    "delta_magnitudes",
    "effect_blocks",
    "effect_heatmap",
    "lineage_comparison",
    "lora_report",
    "loss_curve",
    "magnitude_heatmap",
    "multiplier_by_part",
    "multiplier_overview",
    "noise",
    "spectrum",
    "survival",
    "weight_and_effect",
]

# Statistic -> what an axis says about it.
STATISTICS = {
    "relative": "norm of delta / norm of weights, unitless",
    "rms": "root mean square of delta, in units of the weights",
    "delta_norm": "Frobenius norm of delta, in units of the weights",
    "largest": "largest |delta|, in units of the weights",
    "changed": "share of elements that differ, unitless",
    "angle": "1 - cosine of variant and base, unitless",
}
_PARTS = [*dict.fromkeys(part.name for family in FAMILIES for part in family.parts), "other"]
_SHORT = {"other": "other", **{part.name: part.label for family in FAMILIES for part in family.parts}}
_MAIN = {part.name for family in FAMILIES for part in family.parts if part.is_main}
_KINDS = [*dict.fromkeys(kind for family in FAMILIES for kind in family.kinds), "other"]


def delta_magnitudes(
    table: pandas.DataFrame, statistic: str = "relative", ax: Axes | None = None, title: str | None = None
) -> Plot:
    """Every tensor's change by part and depth, one marker each, on a log axis with a strip for zeros."""
    values = _statistic(table, statistic)
    ax = axes_for(ax, (10, 4.2))
    _by_depth(ax, table, values, _log_axis(ax, values))
    ax.set_ylabel(f"{STATISTICS[statistic]}\n(log scale)")
    legend_beside(ax, fontsize=None)
    ax.set_title(title or title_of_plot(table, "Where it differs"))
    untouched = int((values == 0).sum())
    by_part = _by_part(table, values)
    largest = max(by_part, key=lambda name: by_part[name])
    words = ", ".join(f"{name} {number_text(value)}" for name, value in by_part.items())
    return Plot(
        ax,
        f"{ax.get_title()}: {statistic} of each of {len(table)} tensors by part and depth. Median by part: {words}; "
        f"largest in {largest}. {untouched} tensors are untouched.",
    )


def magnitude_heatmap(
    table: pandas.DataFrame, statistic: str = "relative", ax: Axes | None = None, title: str | None = None
) -> Plot:
    """Module by depth: the logarithm of a statistic as colour; untouched tensors crossed, absent ones blank."""
    values = _statistic(table, statistic)
    return _heatmap(table, values, (statistic, STATISTICS[statistic]), ax, title)


def effect_heatmap(effect: Effect, ax: Axes | None = None, title: str | None = None) -> Plot:
    """Module by depth: how much of what flows through each matrix a delta changes, the logarithm as colour.

    Examples
    --------
    >>> plots.effect_heatmap(ak.effect(variant - base, bridge, prompts=prompts))
    """
    tensors = effect.tensors
    what = ("flow", "norm of delta x / norm of weights x, unitless")
    title = title or f"What flows through each matrix: {effect.k:g} x {effect.title}"
    return _heatmap(tensors, tensors.flow.to_numpy(float), what, ax, title)


def _heatmap(
    table: pandas.DataFrame,
    values: np.ndarray[Any, Any],
    statistic: tuple[str, str],
    ax: Axes | None,
    title: str | None,
) -> Plot:
    places = _Places(table[table.block >= 0])
    inside = table.block.to_numpy() >= 0
    modules = list(dict.fromkeys(table.module[inside]))
    grid = np.full((len(modules), len(places.of)), np.nan)
    for part, block, module, value in zip(
        table.part[inside], table.block[inside], table.module[inside], values[inside], strict=True
    ):
        grid[modules.index(module), places.of[part, block]] = value
    ax = axes_for(ax, (10, 0.25 * len(modules) + 1.6))
    positive = grid[grid > 0]
    low, high = (positive.min(), positive.max()) if positive.size else (0.1, 1.0)
    norm = mpl.colors.LogNorm(low, max(high, low * 1.001))
    image = ax.imshow(
        np.ma.masked_invalid(np.where(grid == 0, np.nan, grid)),
        norm=norm,
        cmap="cividis",
        aspect="auto",
        interpolation="nearest",
    )
    rows, columns = np.nonzero(grid == 0)
    ax.plot(columns, rows, "x", color="0.6", ms=4)
    ax.set_yticks(range(len(modules)), modules, fontsize=8)
    places.draw(ax, bands=False)
    if rows.size:
        ax.set_xlabel(f"{ax.get_xlabel()};  x: untouched, exactly 0", labelpad=26)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.01)
    bar.set_label(f"{statistic[1]}\n(log scale)", fontsize=8)
    ax.set_title(title or title_of_plot(table, "Module by depth"))
    words = "nothing differs"
    if positive.size:
        row, column = np.unravel_index(np.nanargmax(grid), grid.shape)
        part, block = places.keys[column]
        words = f"from {number_text(low)} to {number_text(high)}, most in {part}.{block}.{modules[row]}"
    return Plot(
        ax,
        f"{ax.get_title()}: {statistic[0]} of {len(modules)} modules over {len(places.of)} blocks, {words}; "
        f"{rows.size} untouched.",
    )


def lineage_comparison(
    tables: Mapping[str, pandas.DataFrame],
    statistic: str = "relative",
    ax: Axes | None = None,
    title: str | None = None,
) -> Plot:
    """Several deltas by depth, one line each: how far a model is from either of its parents, block by block.

    Examples
    --------
    >>> tables = {name: ak.delta_table(bridge - one) for name, one in {"from Base": base, "from Turbo": turbo}.items()}
    >>> plots.lineage_comparison(tables)
    """
    ax = axes_for(ax, (10, 4.2))
    places = _Places(next(iter(tables.values())))
    lines = {}
    for name, table in tables.items():
        values = _statistic(table, statistic)
        found: dict[tuple[str, int], list[float]] = {}
        for part, block, value in zip(table.part, table.block, values, strict=True):
            found.setdefault((part, block), []).append(value)
        lines[name] = np.array([np.median(found.get(key, [np.nan])) for key in places.keys])
    zero = _log_axis(ax, np.concatenate(list(lines.values())))
    for number, (name, line) in enumerate(lines.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        for first, last in places.spans.values():
            some = line[first : last + 1]
            x = np.arange(first, last + 1)
            ax.plot(
                x,
                np.where(some > 0, some, np.nan),
                "-",
                color=colour,
                marker=marker,
                ms=5,
                label=name if first == 0 else None,
            )
            ax.plot(x[some == 0], np.full((some == 0).sum(), zero), marker, mfc="none", mec=colour, ms=5)
    places.draw(ax)
    ax.set_ylabel(f"{STATISTICS[statistic]}\n(median over a block's tensors, log scale)")
    legend_beside(ax, fontsize=None)
    small = " (miniatures)" if any("(miniatures)" in one.attrs.get("of", "") for one in tables.values()) else ""
    ax.set_title(title or f"By depth{small}")
    family = family_of(next(iter(tables.values())).tensor)
    told = [part for part in (family.main_part, *family.bridge_parts[:1]) if part in places.spans]
    words = "; ".join(
        f"{name}: " + ", ".join(f"{part.replace('_', ' ')} {number_text(_median(line, places, part))}" for part in told)
        for name, line in lines.items()
    )
    return Plot(ax, f"{ax.get_title()}: median {statistic} of each block, for {len(lines)} deltas. {words}.")


def spectrum(spectra: pandas.DataFrame, ax: Axes | None = None, title: str | None = None, most: int = 6) -> Plot:
    """Singular values of the ``most`` largest matrices of `alkahest.delta_spectra`, each over its noise edge."""
    if not len(spectra):
        raise AlkahestError(
            "spectrum", "there is nothing to plot", found="no matrix that differs", fix="a delta that is not zero"
        )
    ax = axes_for(ax, (8, 4.2))
    chosen = spectra.nlargest(most, "delta_norm")
    for number, row in enumerate(chosen.itertuples()):
        index = np.arange(1, len(row.singular_values) + 1)
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        ax.plot(index, row.singular_values / row.noise_edge, "-", color=colour, marker=marker, ms=4, label=row.tensor)
    ax.axhline(1.0, color="0.4", ls="--", lw=1)
    ax.annotate(
        "noise edge",
        (0.99, 1),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color="0.3",
        fontsize=8,
    )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("number of the singular value (log scale)")
    ax.set_ylabel("singular value / noise edge, unitless (log scale)")
    legend_beside(ax)
    ax.set_title(title or title_of_plot(spectra, "Spectrum"))
    ranks = chosen.stable_rank
    above = (
        f"the first is {number_text(chosen.above_edge.min())} to {number_text(chosen.above_edge.max())} times the "
        "noise edge"
    )
    return Plot(
        ax,
        f"{ax.get_title()}: leading singular values of {len(chosen)} matrices; {above}, stable ranks "
        f"{number_text(ranks.min())} to {number_text(ranks.max())}.",
    )


def comparison_matrix(
    square: pandas.DataFrame, statistic: str = "cosine", ax: Axes | None = None, title: str | None = None
) -> Plot:
    """Delta against delta, from `alkahest.comparison_matrix`: colours are symmetric about zero where signs matter."""
    ax = axes_for(ax, (1.1 * len(square) + 2.4, 0.8 * len(square) + 1.6))
    values = square.to_numpy(float)
    signed = statistic == "cosine"
    top = 1.0 if statistic != "interference" else max(float(np.nanmax(values, initial=0.0)), 1e-9)
    low = -1.0 if signed else 0.0
    image = ax.imshow(np.ma.masked_invalid(values), vmin=low, vmax=top, cmap="RdBu_r" if signed else "cividis")
    ax.set_xticks(range(len(square)), square.columns, rotation=30, ha="right")
    ax.set_yticks(range(len(square)), square.index)
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        if math.isfinite(value):
            shade = (value - low) / (top - low)
            dark = abs(shade - 0.5) > 0.3 if signed else shade < 0.5
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black")
    ax.figure.colorbar(image, ax=ax, label=f"{statistic.replace('_', ' ')}, unitless")
    small = " (miniatures)" if "(miniatures)" in square.attrs.get("of", "") else ""
    ax.set_title(title or f"Delta against delta: {statistic.replace('_', ' ')}{small}")
    pairs = [
        f"{a} and {b} {values[i, j]:.2f}"
        for i, a in enumerate(square.index)
        for j, b in enumerate(square.columns)
        if i < j
    ]
    return Plot(ax, f"{ax.get_title()}: {', '.join(pairs)}.")


def lora_report(report: pandas.DataFrame, figure: Figure | None = None, title: str | None = None) -> Plot:
    """What an extracted LoRA keeps of each tensor: its rank, its energy, the noise in it, and its size.

    Examples
    --------
    >>> plots.lora_report(ak.extract_lora(base - bridge, exclude="refiner").report)
    """
    thin = report[report.kept == "LoRA"]
    if len(thin) == 0:
        raise AlkahestError("plot", "the report has no tensors that became a LoRA")
    figure = Figure(figsize=(13, 8), layout="constrained", facecolor="white") if figure is None else figure
    axes = figure.subplots(2, 2)
    for ax, column, name in (
        (axes[0, 0], "rank", "rank of the LoRA's two factors"),
        (axes[0, 1], "energy", "energy kept, share of |delta|^2"),
        (axes[1, 0], "noise", "rounding noise in the delta,\nshare of |delta|^2 (log scale)"),
        (axes[1, 1], "nbytes", "size, kB (log scale)"),
    ):
        known = thin[thin[column].notna()]
        values = known[column].to_numpy(float) / (1000 if column == "nbytes" else 1)
        zero = 0.0
        if len(known) == 0:
            ax.set(xticks=[], yticks=[])
            why = f"{column} is not known here:\nthe delta does not lie between two files"
            ax.text(0.5, 0.5, why, transform=ax.transAxes, ha="center", va="center", color="0.4")
            continue
        if len(known) < len(thin):  # noise, where a delta does not lie between two files
            ax.set_title(
                f"{column} is not known for {len(thin) - len(known)} of {len(thin)} tensors", loc="right", fontsize=8
            )
        if column in ("noise", "nbytes"):
            zero = _log_axis(ax, values)
        else:
            ax.set_ylim(0, 1.02 if column == "energy" else 1.1 * values.max())
        _by_depth(ax, known, values, zero)
        ax.set_ylabel(name)
    capped = thin.capped.to_numpy(bool)
    if capped.any():
        axes[0, 0].axhline(
            thin["rank"][capped].max(), color="0.35", ls="--", lw=1, label=f"rank_max ({capped.sum()} capped)"
        )
    axes[0, 0].legend(loc="best", fontsize=8)
    heading = title or title_of_plot(report, "What the LoRA keeps")
    figure.suptitle(heading)
    energy = float((thin.delta_norm**2 * thin.energy).sum() / (thin.delta_norm**2).sum())
    ranks = f"{thin['rank'].min()} to {thin['rank'].max()}, median {thin['rank'].median():g}"
    return Plot(
        axes[0, 0],
        f"{heading}: {len(thin)} tensors, rank {ranks} ({capped.sum()} capped), {energy:.4f} of their energy, "
        f"{thin.nbytes.sum() / 1e6:.4g} MB.",
    )


def _by_depth(ax: Axes, table: pandas.DataFrame, values: np.ndarray[Any, Any], zero: float) -> None:
    """One marker for each tensor by part and block, a shape for each kind of module; hollow at ``zero`` for 0."""
    places = _Places(table)
    x = np.array([places.of[row] for row in zip(table.part, table.block, strict=True)], float)
    kinds = [_kind(module) for module in table.module]
    for number, kind in enumerate(kind for kind in _KINDS if kind in kinds):
        mine = np.array([one == kind for one in kinds])
        shift = x[mine] + 0.12 * (number - 2)
        some = values[mine] > 0
        colour, marker = COLOURS[number], MARKERS[number]
        ax.plot(shift[some], values[mine][some], marker, color=colour, ms=4.5, alpha=0.75, label=kind.replace("_", " "))
        ax.plot(shift[~some], np.full((~some).sum(), zero), marker, mfc="none", mec=colour, ms=4.5)
    places.draw(ax)


class _Places:
    """Where parts and blocks stand on the x axis: embedders, refiners, layers, final layer."""

    def __init__(self, table: pandas.DataFrame) -> None:
        known = sorted(set(zip(table.part, table.block, strict=True)), key=lambda key: (_PARTS.index(key[0]), key[1]))
        self.keys = known
        self.of = {key: place for place, key in enumerate(known)}
        self.spans: dict[str, tuple[int, int]] = {}
        for part, _ in known:
            mine = [place for (one, _), place in self.of.items() if one == part]
            self.spans[part] = (mine[0], mine[-1])

    def draw(self, ax: Axes, bands: bool = True) -> None:
        ticks, labels = [], []
        for number, (part, (first, last)) in enumerate(self.spans.items()):
            if bands and number % 2 == 0:
                ax.axvspan(first - 0.5, last + 0.5, color="0.93", zorder=0, lw=0)
            elif not bands and first:
                ax.axvline(first - 0.5, color="0.7", lw=1.5)
            step = 1 if last - first < 12 else 5
            for place in range(first, last + 1, step):
                block = self.keys[place][1]
                ticks.append(place)
                labels.append("" if block < 0 else str(block))
            short = f"layers (0-{last - first})" if part in _MAIN else _SHORT[part]
            ax.annotate(
                short,
                ((first + last) / 2, 0),
                xycoords=("data", "axes fraction"),
                xytext=(0, -18),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=8,
            )
        ax.set_xticks(ticks, labels, fontsize=8)
        ax.set_xlim(-0.7, len(self.keys) - 0.3)
        ax.set_xlabel("part and block, in the order of the data flow", labelpad=26)


def _statistic(table: pandas.DataFrame, name: str) -> np.ndarray[Any, Any]:
    if name not in STATISTICS:
        raise unknown("plot", "no such statistic", name, STATISTICS)
    if len(table) == 0:
        raise AlkahestError(
            "plot", "the table has no rows", fix="measure something first: ak.delta_table(variant - base)"
        )
    if name != "angle":
        values: np.ndarray[Any, Any] = table[name].fillna(0.0).to_numpy(float)
        return values
    # From lengths, for a cosine next to 1 has no digits left: |v - b|^2 = |v|^2 + |b|^2 - 2 |v| |b| cos.
    angle = (table.gap**2 - (table.variant_norm - table.base_norm) ** 2) / (2 * table.variant_norm * table.base_norm)
    values = angle.fillna(0.0).clip(lower=0.0).to_numpy(float)
    return values


def _log_axis(ax: Axes, values: np.ndarray[Any, Any]) -> float:
    """A log y axis round the values that are not zero; returns where the strip for zeros lies."""
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (0.1, 1.0)
    ax.set_yscale("log")
    if positive.size == values.size:
        ax.set_ylim(low / 2, high * 2)
        return float(low)
    span = max(math.log10(high / low), 1.0)
    zero = low / 10 ** (0.12 * span + 0.15)
    ax.set_ylim(zero / 10 ** (0.05 * span), high * 10 ** (0.06 * span))
    ax.axhspan(ax.get_ylim()[0], zero * 10 ** (0.05 * span), color="0.85", zorder=0.5, lw=0)
    ax.annotate(
        "0 (untouched)",
        (1, zero),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
    )
    return float(zero)


def _kind(module: str) -> str:
    lowered = module.lower()
    if "norm" in lowered:
        return "norm"
    return next((kind for kind in _KINDS if kind.lower() in lowered), "other")


def _by_part(table: pandas.DataFrame, values: np.ndarray[Any, Any]) -> dict[str, float]:
    return {str(part): float(np.median(values[(table.part == part).to_numpy()])) for part in dict.fromkeys(table.part)}


def _median(line: np.ndarray[Any, Any], places: _Places, part: str) -> float:
    first, last = places.spans.get(part, (0, 0))
    return float(np.nanmedian(line[first : last + 1]))


def __dir__() -> list[str]:
    return __all__

"""Plots of what a delta does to pictures: losses over k with the advice, and which blocks carry it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes

from alkahest.lab.figure import COLOURS, MARKERS, Plot, axes_for, legend_beside, number_text
from alkahest.measure.text import two_digits

if TYPE_CHECKING:
    from alkahest.pictures.alignments import Alignment
    from alkahest.pictures.effects import Effect
    from alkahest.pictures.loss_curve import LossCurve


def loss_curve(multiplier: Any, ax: Axes | None = None, title: str | None = None, k: float | None = None) -> Plot:
    """The losses over k of a multiplier by pictures: of the new thing and of everything else, with the advice marked.

    Examples
    --------
    >>> plots.loss_curve(ak.needed_multiplier(variant - base, on=bridge, prompts=prompts))
    """
    curve: LossCurve = multiplier.curve
    table, least = curve.table, float(curve.ks[curve.ks > 0].min())
    ax = axes_for(ax, (8.5, 4.4))
    for number, (name, losses) in enumerate({"new": curve.new, "rest": curve.rest}.items()):
        mean, spread = losses.mean(1), losses.std(1, ddof=1) / math.sqrt(losses.shape[1]) if losses.shape[1] > 1 else 0
        label = {"new": "the new thing", "rest": "everything else"}[name]
        style: dict[str, Any] = {"color": COLOURS[number], "marker": MARKERS[number], "ls": ("-", "--")[number]}
        ax.plot(curve.ks, mean, label=f"{label} ({losses.shape[1]} pictures)", ms=5, **style)
        ax.fill_between(curve.ks, mean - spread, mean + spread, color=COLOURS[number], alpha=0.15, lw=0)
    ax.axhline(curve.variant.mean(), color=COLOURS[0], ls=":", lw=1, label="the new thing, by the variant")
    low, high = (min(one, float(curve.ks[-1])) for one in curve.interval)
    taken = float(multiplier) if k is None else k
    if float(multiplier) > 0:
        ax.axvspan(low, high, color="0.85", zorder=0, lw=0, label="minimum, by resampling")
        ax.axvline(curve.minimum, color="0.35", ls="-.", lw=1, label=f"minimum {two_digits(curve.minimum)}")
    ax.axvline(taken, color=COLOURS[2], lw=2, label=f"{'advice' if k is None else 'k'} {number_text(taken)}")
    ax.set_xscale("symlog", linthresh=least, linscale=0.4)
    ticks = [0.0, *(step * 10.0**power for power in range(-4, 6) for step in (1, 2, 5))]
    shown = [tick for tick in ticks if tick == 0 or least <= tick <= curve.ks[-1]]
    ax.set_xticks(shown, [f"{tick:g}" for tick in shown])
    ax.minorticks_off()
    ax.set_xlim(-0.15 * least, float(curve.ks[-1]) * 1.15)
    top = float(max(curve.new[0].mean(), curve.rest[0].mean()))
    ax.set_ylim(0, 2.2 * top)
    ax.set_xlabel(f"multiplier k (log scale from {number_text(least)}, and zero)")
    ax.set_ylabel("flow loss, mean square\n(band: standard error)")
    ax.set_title(title or "What k does to predictions")
    legend_beside(ax)
    words = "does not come over" if float(multiplier) == 0 else f"take {two_digits(float(multiplier))}"
    before, after = (curve.at(name, curve.minimum) for name in ("new", "rest"))
    return Plot(
        ax,
        f"{ax.get_title()}: the new thing's loss falls from {two_digits(table.new[0])} at k = 0 to "
        f"{two_digits(before)} at {two_digits(curve.minimum)}; everything else's rises from "
        f"{two_digits(table.rest[0])} to {two_digits(after)} there. Advice: {words}.",
    )


def effect_blocks(effect: Effect, ax: Axes | None = None, title: str | None = None) -> Plot:
    """Which blocks carry a delta: how much each does alone of the whole on its own base, and its leak.

    Examples
    --------
    >>> plots.effect_blocks(ak.effect(variant - base, bridge, prompts=prompts))
    """
    blocks = effect.table.iloc[1:]
    names = [row.part if row.block < 0 else f"{row.part}.{row.block}" for row in blocks.itertuples()]
    ax = axes_for(ax, (max(6.0, 0.35 * len(blocks) + 3), 4.2))
    places = np.arange(len(blocks))
    ax.bar(places - 0.2, 100 * blocks.along, 0.4, color=COLOURS[0], edgecolor="black", lw=0.5, label="along (carried)")
    leak = 100 * blocks.leak.fillna(0.0)
    ax.bar(places + 0.2, leak, 0.4, color=COLOURS[1], hatch="//", edgecolor="black", lw=0.5, label="leak")
    ax.axhline(0, color="0.3", lw=0.8)
    ax.set_xticks(places, names, rotation=60 if len(blocks) > 8 else 20, ha="right", fontsize=8)
    ax.set_ylabel("per cent of the whole's effect on its own base;\nof the block's own effect for the leak")
    ax.set_title(title or f"Which blocks carry {effect.k:g} x {effect.title}")
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
    legend_beside(ax)
    top = blocks.nlargest(3, "along")
    words = ", ".join(
        f"{row.part if row.block < 0 else f'{row.part}.{row.block}'} {number_text(100 * row.along)} %"
        for row in top.itertuples()
    )
    return Plot(ax, f"{ax.get_title()}: most by {words}, of {len(blocks)} blocks.")


def weight_and_effect(effect: Effect, ax: Axes | None = None, title: str | None = None) -> Plot:
    """What the weights say against what flows through them: |d| / |w| and |d x| / |w x| of every matrix.

    Examples
    --------
    >>> plots.weight_and_effect(ak.effect(variant - base, bridge, prompts=prompts))
    """
    tensors = effect.tensors
    ax = axes_for(ax, (7, 5))
    for number, (part, rows) in enumerate(tensors.groupby("part", sort=False)):
        ax.plot(
            rows.weights,
            rows.flow,
            MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            label=part,
            ms=5,
            alpha=0.8,
        )
    both = tensors[["weights", "flow"]].to_numpy()
    both = both[np.isfinite(both).all(1) & (both > 0).all(1)]
    low, high = float(both.min()) / 1.5, float(both.max()) * 1.5
    ax.plot([low, high], [low, high], color="0.6", lw=1, ls=":", label="alike")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("|delta| / |weights|, unitless (log scale)")
    ax.set_ylabel("|delta x| / |weights x| over the inputs x\nthat reach it, unitless (log scale)")
    ax.set_title(title or f"Weights against what flows through them:\n{effect.k:g} x {effect.title}")
    legend_beside(ax)
    ratio = np.median(both[:, 1] / both[:, 0])
    return Plot(
        ax,
        f"{ax.get_title()}: {len(both)} matrices; in the median the flow changes {number_text(float(ratio))} times as "
        "much as the weights do.",
    )


def alignment_by_depth(alignment: Alignment, ax: Axes | None = None, title: str | None = None) -> Plot:
    """How well one model's streams give another's, by place: as they are, rotated, by a linear map, and CKA.

    Examples
    --------
    >>> plots.alignment_by_depth(ak.alignment(base, bridge, prompts=prompts))
    """
    table = alignment.table
    ax = axes_for(ax, (9, 4.4))
    places = list(dict.fromkeys(table.place))
    for number, column in enumerate(("as it is", "orthogonal", "linear", "cka")):
        for stream, rows in table.groupby("stream", sort=False):
            ax.plot(
                [places.index(place) for place in rows.place],
                rows[column],
                color=COLOURS[number],
                ls="-" if stream == "image" else "--",
                marker="o" if stream == "image" else "s",
                ms=4,
                label=f"{column}, {stream}",
            )
    ax.axhline(1, color="0.7", lw=0.8)
    ax.set_ylim(max(-1.05, min(-0.05, float(table["as it is"].min()) - 0.05)), 1.05)
    ax.set_xticks(range(len(places)), places, rotation=60 if len(places) > 8 else 20, ha="right", fontsize=8)
    ax.set_ylabel("R^2 on other pictures (CKA: alignment), unitless")
    ax.set_title(title or "Whether the numbers in two models' streams mean the same")
    ax.grid(axis="y", color="0.9")
    legend_beside(ax)
    words = ", ".join(
        f"{row.stream} after {row.place} {number_text(row[4])} as it is and {number_text(row.linear)} by a linear map"
        for row in table.head(2).itertuples()
    )
    return Plot(ax, f"{ax.get_title()}: {words}.")

"""Plots of training runs and of what came over: a table in, a `Plot` out, as in `alkahest.lab.plots`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alkahest.errors import AlkahestError, UnknownNameError, nearest
from alkahest.lab.figure import COLOURS, MARKERS, Plot, axes_for, legend_beside

if TYPE_CHECKING:
    import pandas

_LINES = ("-", "--", "-.", ":")
# What a picture measure says about an axis.
MEASURES = {
    "latent_lag1": "correlation of neighbouring\nlatents, unitless",
    "grid": "gradient at patch borders /\nelsewhere, unitless",
    "lag1": "correlation of neighbouring\npixels, unitless",
    "high_freq": "share of energy in high\nfrequencies, unitless",
}


def training_curve(history: pandas.DataFrame, measure: str = "latent_lag1", of: Mapping[str, float] | None = None, title: str | None = None, figure: Figure | None = None) -> Plot:  # fmt: skip
    """A run from noise to pictures: held-out loss of each dataset above, a picture measure below, stages marked.

    >>> training_curve(ak.read_history("runs/tb1"), of={"base": 0.24, "1:1 merge": -0.08})

    ``of`` gives the measure of models to compare with. A run that drew no pictures has the losses alone.
    """
    held = [name for name in history.columns if name.startswith("held_out ")]
    if not len(history) or not held:
        raise AlkahestError("plot", "this history has no held-out loss", fix="ak.read_history(folder) of a run with held_out above 0")  # fmt: skip
    if measure not in MEASURES:
        raise UnknownNameError("plot", "no such measure", found=repr(measure), fix=nearest(measure, MEASURES))
    shown = measure in history.columns
    figure = figure or Figure(figsize=(8, 5.2 if shown else 3.2), layout="constrained", facecolor="white")
    upper, *lower = np.atleast_1d(figure.subplots(1 + shown, 1, sharex=True))
    for number, name in enumerate(held):
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "ls": _LINES[number % len(_LINES)]}
        upper.plot(history.step, history[name], lw=2, label=name.removeprefix("held_out "), **style)
    upper.set_ylabel("held-out flow loss,\nmean square error")
    upper.set_ylim(bottom=0)
    legend_beside(upper, title="data, pixels")
    for ax in lower:
        ax.plot(history.step, history[measure], color=COLOURS[0], marker=MARKERS[0], ms=3, lw=1, label="this run")
        for number, (name, value) in enumerate((of or {}).items(), 1):
            ax.axhline(value, color=COLOURS[number], ls=_LINES[number % len(_LINES)], lw=1.2, label=name)
        ax.set_ylabel(MEASURES[measure])
        legend_beside(ax)
    _mark_stages([upper, *lower], history)
    (lower or [upper])[-1].set_xlabel("step")
    upper.xaxis.get_major_locator().set_params(integer=True)
    upper.set_title(title or "From noise to pictures", pad=18)
    first, last = history.iloc[0], history.iloc[-1]
    words = ", ".join(f"{name.removeprefix('held_out ')} {first[name]:.3g} to {last[name]:.3g}" for name in held)
    return Plot(upper, f"{upper.get_title()}: held-out loss over {int(last.step)} steps: {words}.")


def _mark_stages(axes: list[Axes], history: pandas.DataFrame) -> None:
    """A line where each stage begins, and its name above the first plot."""
    start = float(history.step.iloc[0])
    for stage, rows in history.groupby("stage", sort=False):
        end = float(rows.step.iloc[-1])
        for ax in axes:
            ax.axvline(start, color="0.6", lw=0.8)
        axes[0].annotate(str(stage), ((start + end) / 2, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8)  # fmt: skip
        start = end


def runs_compared(history: pandas.DataFrame, column: str, names: Mapping[str, str] | None = None, title: str | None = None, ax: Axes | None = None) -> Plot:  # fmt: skip
    """One column of several runs' histories over their steps, a line for each run.

    >>> runs_compared(history, "held_out subjects 64", {"tb1": "averaged refiners", "free": "nothing frozen"})

    ``history`` has a column ``run``; ``names`` choose runs, in order, and say what they are called.
    """
    names = dict(names or {run: run for run in history.run.unique()})
    for run in names:
        if run not in set(history.run):
            raise UnknownNameError("plot", "no such run", found=repr(run), fix=nearest(run, set(history.run)))
    if column not in history.columns:
        raise UnknownNameError("plot", "no such column", found=repr(column), fix=nearest(column, history.columns))
    ax = axes_for(ax, (8, 3.6))
    ends = []
    for number, (run, name) in enumerate(names.items()):
        rows = history[history.run == run].dropna(subset=[column])
        if not len(rows):
            raise AlkahestError("plot", f"this run measured no {column}", found=repr(run), fix="leave it out of names")
        ax.plot(rows.step, rows[column], lw=2, label=name, color=COLOURS[number % len(COLOURS)], ls=_LINES[number % len(_LINES)])  # fmt: skip
        ends.append(f"{name} {rows[column].iloc[-1]:.3g} at step {int(rows.step.iloc[-1])}")
    ax.set_xlabel("step")
    what = column.removeprefix("held_out ")
    ax.set_ylabel(MEASURES.get(column, f"held-out flow loss ({what}),\nmean square error" if what != column else column))  # fmt: skip
    ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    ax.grid(axis="y", color="0.9")
    legend_beside(ax)
    ax.set_title(title or "Runs compared")
    return Plot(ax, f"{ax.get_title()}: {column}: {'; '.join(ends)}.")


def import_curve(table: pandas.DataFrame, title: str | None = None, ax: Axes | None = None) -> Plot:
    """What comes over at which k: a line for the new thing and one for following prompts without it, for each import.

    ``table`` has the columns ``name``, ``k``, ``new`` and ``plain``, shares from 0 to 1. Zero has its place on the axis.
    """
    if not len(table):
        raise AlkahestError("plot", "the table has no rows", fix="judge something first")
    ax = axes_for(ax, (8, 4.2))
    for number, (name, rows) in enumerate(table.groupby("name", sort=False)):
        style: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "ms": 5,
        }
        ax.plot(rows.k, 100 * rows.new, ls="-", lw=2, label=f"{name}: the new thing", **style)
        ax.plot(rows.k, 100 * rows.plain, ls="--", lw=1, mfc="none", label=f"{name}: all else as asked", **style)
    ks = np.unique(table.k)
    smallest = float(ks[ks > 0].min()) if (ks > 0).any() else 1.0
    ax.set_xscale("symlog", linthresh=smallest, linscale=0.5)
    ax.set_xticks(ks, [f"{k:g}" for k in ks])
    ax.set_xlabel(f"multiplier k (log scale from {smallest:g}, and zero)")
    ax.set_ylabel("pictures that the judge finds\nas asked (%)")
    ax.set_ylim(-3, 103)
    ax.grid(axis="y", color="0.9")
    legend_beside(ax)
    ax.set_title(title or "What comes over")
    best = table.loc[table.groupby("name", sort=False).new.idxmax()]
    words = "; ".join(f"{row.name_} {100 * row.new:.0f} % at k = {row.k:g}, all else {100 * row.plain:.0f} %" for row in best.rename(columns={"name": "name_"}).itertuples())  # fmt: skip
    return Plot(ax, f"{ax.get_title()}: at its best {words}.")

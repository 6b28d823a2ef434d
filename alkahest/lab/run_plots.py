"""Plots of training runs: a history in, a `Plot` out, as in `alkahest.lab.plots`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alkahest.errors import AlkahestError, unknown
from alkahest.lab.figure import COLOURS, MARKERS, Plot, legend_beside

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
__all__ = [
    "training_curve",
]


def training_curve(
    history: pandas.DataFrame,
    measure: str = "latent_lag1",
    of: Mapping[str, float] | None = None,
    title: str | None = None,
    figure: Figure | None = None,
) -> Plot:
    """A run from noise to pictures: held-out loss of each dataset above, a picture measure below, stages marked.

    >>> training_curve(ak.read_history("runs/tb1"), of={"base": 0.24, "1:1 merge": -0.08})

    ``of`` gives the measure of models to compare with. A run that drew no pictures has the losses alone.
    """
    held = [name for name in history.columns if name.startswith("held_out ")]
    if not len(history) or not held:
        raise AlkahestError(
            "plot", "this history has no held-out loss", fix="ak.read_history(folder) of a run with held_out above 0"
        )
    if measure not in MEASURES:
        raise unknown("plot", "no such measure", measure, MEASURES)
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
        legend_beside(ax, title="nearer to these models is better" if of else None)
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
        axes[0].annotate(
            str(stage),
            ((start + end) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
        start = end


def __dir__() -> list[str]:
    return __all__

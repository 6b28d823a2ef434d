"""Figures of experiments: lines or bars of a recorded table, as ``experiment.toml`` asks for them."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from alkahest.errors import FileFormatError
from alkahest.experiment.config import Drawing, Experiment, read_experiment
from alkahest.experiment.measure import Tables
from alkahest.experiment.record import rows_where, slug, tables_of
from alkahest.lab.figure import COLOURS, MARKERS, Plot, axes_for, legend_beside

_DASHES = ("-", "--", "-.", ":")
_UNASKED = "unsaid "  # columns of what came where prompts say nothing of it
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")  # one more than colours: the two together repeat late


def figure_of(drawing: Drawing, tables: Tables) -> Plot:
    """A drawing of ``experiment.toml`` from its tables. FileFormatError if it names a column that is not there."""
    table = rows_where(tables.get(drawing.table, pd.DataFrame()), drawing.where)
    for name in [drawing.x, *drawing.columns]:
        if name not in table.columns or not len(table):
            raise FileFormatError(
                "experiment",
                f"figure {drawing.title!r}: the table {drawing.table} has no such column, or no rows",
                found=name,
            )
    ax = axes_for(None, (8.5, 4))
    series = _series(drawing, table)
    (_lines if drawing.kind == "lines" else _bars)(ax, drawing, series)
    ax.set_ylabel(drawing.y)
    if "%" in drawing.y:
        ax.set_ylim(-3, 103)
    elif drawing.log and drawing.kind == "bars":
        ax.set_yscale("log")
    elif all((values >= 0).all() for values in series.values()):
        ax.set_ylim(bottom=0)
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
    legend_beside(ax)
    ax.set_title(f"{drawing.title} (miniatures)")
    words = "; ".join(
        f"{name} from {values.min():.3g} to {values.max():.3g}" for name, values in series.items() if len(values)
    )
    return Plot(ax, f"{ax.get_title()}, {drawing.y} over {drawing.x}: {words}.")


def _series(drawing: Drawing, table: pd.DataFrame) -> dict[str, pd.Series]:
    """Name -> values over x, for each ``by`` and column, in the order of the table."""
    groups = dict(list(table.groupby(drawing.by, sort=False))) if drawing.by in table.columns else {"": table}
    found = {}
    for group, rows in groups.items():
        for column in drawing.columns:
            several = len(drawing.columns) > 1
            said = f"{column.removeprefix(_UNASKED)}, not asked for" if column.startswith(_UNASKED) else column
            name = said if (several and len(groups) == 1) or not group else f"{group}, {said}" if several else group
            found[name] = rows.set_index(drawing.x)[column].dropna()
    return found


def _lines(ax: Axes, drawing: Drawing, series: dict[str, pd.Series]) -> None:
    for number, (name, values) in enumerate(series.items()):
        ax.plot(
            values.index,
            values,
            label=name,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            ls=_DASHES[number % len(_DASHES)],
            ms=5,
        )
    places = np.unique(np.concatenate([values.index.to_numpy(float) for values in series.values()]))
    label = drawing.x
    if drawing.log:
        smallest = float(places[places > 0].min())
        ax.set_xscale("symlog", linthresh=smallest, linscale=0.5)
        label = f"{drawing.x} (log scale from {smallest:g}{', and zero' if 0 in places else ''})"
    if len(places) <= 14:
        ax.set_xticks(places, [f"{place:g}" for place in places], rotation=45 if len(places) > 7 else 0)
        ax.minorticks_off()
    ax.set_xlabel(label)


def _bars(ax: Axes, drawing: Drawing, series: dict[str, pd.Series]) -> None:
    places = list(dict.fromkeys(place for values in series.values() for place in values.index))
    if not any(isinstance(place, str) for place in places):
        places.sort()
    names = [place if isinstance(place, str) else f"{place:g}" for place in places]
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        left = [places.index(place) - 0.4 + (number + 0.5) * width for place in values.index]
        ax.bar(
            left,
            values,
            width,
            label=name,
            color=COLOURS[number % len(COLOURS)],
            hatch=_HATCHES[number % len(_HATCHES)],
            edgecolor="black",
            lw=0.5,
        )
    longest = max(map(len, names))
    ax.set_xticks(
        range(len(names)),
        names,
        rotation=20 if longest * len(names) > 90 else 0,
        ha="right" if longest * len(names) > 90 else "center",
    )
    ax.set_xlabel("" if drawing.x in ("case", "stage", "part", "run") else drawing.x)


def figures_of(experiment: Experiment, tables: Tables) -> dict[str, bytes]:
    """The experiment's figures as SVG files by name, the same bytes for the same tables."""
    files = {}
    with mpl.rc_context({"svg.hashsalt": "alkahest", "svg.fonttype": "path"}):
        for number, drawing in enumerate(experiment.figures, 1):
            buffer = io.BytesIO()
            figure = figure_of(drawing, tables).axes.get_figure(root=True)
            assert figure is not None  # these axes were just drawn on one
            figure.savefig(buffer, format="svg", metadata={"Date": None})
            files[f"{number}-{slug(drawing.title)}.svg"] = buffer.getvalue()
    return files


def recorded_figures(folder: str | Path) -> list[Plot]:
    """The figures of an experiment that was run, from its recorded tables.

    >>> over_k, style = recorded_figures("experiments/07-importing")
    """
    experiment = read_experiment(folder)
    return [figure_of(drawing, tables_of(experiment)) for drawing in experiment.figures]

from __future__ import annotations

import pandas as pd
import pytest

from alkahest.errors import AlkahestError, UnknownNameError
from alkahest.lab import run_plots

HISTORY = pd.DataFrame({
    "step": [0, 10, 20, 30, 40], "stage": ["people", "people", "people", "light", "light"],
    "held_out people 64": [2.5, 1.0, 0.6, 0.5, 0.45], "held_out light 64": [2.6, 1.4, 1.1, 0.7, 0.5],
    "latent_lag1": [-0.1, 0.0, 0.1, 0.15, 0.2],
})  # fmt: skip


def test_a_training_curve_has_every_measurement_and_stage() -> None:
    plot = run_plots.training_curve(HISTORY, of={"base": 0.24})
    upper, lower = plot.axes.figure.axes
    lines = {line.get_label(): line for line in (*upper.lines, *lower.lines)}
    assert lines["light 64"].get_ydata().tolist() == HISTORY["held_out light 64"].tolist()
    assert lines["this run"].get_ydata().tolist() == HISTORY["latent_lag1"].tolist()
    assert lines["base"].get_ydata() == [0.24, 0.24]
    assert [text.get_text() for text in upper.texts] == ["people", "light"]
    assert [text.xy[0] for text in upper.texts] == [10, 30]
    assert lower.get_xlabel() == "step"
    assert "unitless" in lower.get_ylabel()
    assert "light 64 2.6 to 0.5" in plot.alt
    alone = run_plots.training_curve(HISTORY.drop(columns="latent_lag1"))
    assert len(alone.axes.figure.axes) == 1


def test_runs_are_compared_over_their_steps() -> None:
    other = HISTORY.assign(run="free", **{"held_out people 64": [2.5, 0.9, 0.5, 0.4, None]})
    both = pd.concat([HISTORY.assign(run="tb1"), other])
    plot = run_plots.runs_compared(both, "held_out people 64", {"free": "nothing frozen", "tb1": "averaged"})
    free, tb1 = plot.axes.lines
    assert (free.get_label(), free.get_ydata().tolist()) == ("nothing frozen", [2.5, 0.9, 0.5, 0.4])
    assert tb1.get_ydata().tolist() == HISTORY["held_out people 64"].tolist()
    assert plot.axes.get_ylim()[0] == 0
    assert "nothing frozen 0.4 at step 30; averaged 0.45 at step 40" in plot.alt
    assert run_plots.runs_compared(both, "latent_lag1").axes.get_ylim()[0] < -0.1
    with pytest.raises(UnknownNameError, match="did you mean 'free'"):
        run_plots.runs_compared(both, "latent_lag1", {"fre": "x"})
    with pytest.raises(UnknownNameError, match="did you mean 'latent_lag1'"):
        run_plots.runs_compared(both, "latent_lag")
    with pytest.raises(AlkahestError, match="measured no held_out people 64"):
        run_plots.runs_compared(both.assign(**{"held_out people 64": None}), "held_out people 64")


def test_an_import_curve_shows_zero_and_both_shares() -> None:
    table = pd.DataFrame({"name": ["cyan"] * 3 + ["heart"] * 3, "k": [0, 1, 4] * 2, "new": [0, 0.5, 0.9, 0, 0.7, 0.3], "plain": [1, 0.9, 0.8, 1, 0.6, 0.2]})  # fmt: skip
    plot = run_plots.import_curve(table)
    lines = {line.get_label(): line for line in plot.axes.lines}
    assert lines["cyan: the new thing"].get_ydata().tolist() == [0, 50, 90]
    assert lines["heart: all else as asked"].get_ydata().tolist() == [100, 60, 20]
    assert [label.get_text() for label in plot.axes.get_xticklabels()] == ["0", "1", "4"]
    assert "and zero" in plot.axes.get_xlabel()
    assert "cyan 90 % at k = 4, all else 80 %; heart 70 % at k = 1" in plot.alt


def test_bad_input() -> None:
    with pytest.raises(AlkahestError, match="no held-out loss"):
        run_plots.training_curve(HISTORY[["step", "stage"]])
    with pytest.raises(UnknownNameError, match="did you mean 'grid'"):
        run_plots.training_curve(HISTORY, "gird")
    with pytest.raises(AlkahestError, match="no rows"):
        run_plots.import_curve(pd.DataFrame({"name": [], "k": [], "new": [], "plain": []}))

from __future__ import annotations

import pandas as pd
import pytest

from alkahest.errors import AlkahestError, UnknownNameError
from alkahest.lab import run_plots

HISTORY = pd.DataFrame(
    {
        "step": [0, 10, 20, 30, 40],
        "stage": ["people", "people", "people", "light", "light"],
        "held_out people 64": [2.5, 1.0, 0.6, 0.5, 0.45],
        "held_out light 64": [2.6, 1.4, 1.1, 0.7, 0.5],
        "latent_lag1": [-0.1, 0.0, 0.1, 0.15, 0.2],
    }
)


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


def test_bad_input() -> None:
    with pytest.raises(AlkahestError, match="no held-out loss"):
        run_plots.training_curve(HISTORY[["step", "stage"]])
    with pytest.raises(UnknownNameError, match="did you mean 'grid'"):
        run_plots.training_curve(HISTORY, "gird")

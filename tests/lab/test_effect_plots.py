from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from alkahest.lab import plots
from alkahest.measure.multiplier import Multiplier
from alkahest.pictures.effects import Effect
from alkahest.pictures.evidence import Evidence
from alkahest.pictures.loss_curve import LossCurve


@pytest.fixture
def multiplier() -> Multiplier:
    ks = np.array([0, 1, 2, 4, 8.0])
    new = 1 + 0.01 * (ks[:, None] - np.array([2.5, 3.5, 3.0])) ** 2
    rest = 0.5 + 0.02 * ks[:, None] ** 2 + np.zeros(5)
    flat = np.full(3, 0.9)
    curve = LossCurve(ks, new, rest, ks / 4, flat, flat + 0.1, flat + 0.2)
    return Multiplier(6.0, basis="pictures", curve=curve)


def test_the_losses_over_k_with_the_advice(multiplier: Multiplier) -> None:
    plot = plots.loss_curve(multiplier)
    lines = {line.get_label(): line for line in plot.axes.lines}
    new = lines["the new thing (3 pictures)"]
    assert new.get_xdata().tolist() == [0, 1, 2, 4, 8]
    assert new.get_ydata() == pytest.approx(multiplier.curve.new.mean(1))
    assert lines["everything else (5 pictures)"].get_ydata() == pytest.approx(multiplier.curve.rest.mean(1))
    assert lines["advice 6"].get_xdata()[0] == 6
    assert lines["minimum 3"].get_xdata()[0] == pytest.approx(3)
    assert "multiplier k (log scale from 1, and zero)" in plot.axes.get_xlabel()
    assert "Advice: take 6." in plot.alt
    refused = Multiplier(0.0, basis="pictures", curve=multiplier.curve)
    assert "Advice: does not come over." in plots.loss_curve(refused).alt
    single = replace(multiplier.curve, new=multiplier.curve.new[:, :1], variant=np.ones(1))
    assert "(1 pictures)" in plots.loss_curve(Multiplier(6.0, curve=single)).axes.lines[0].get_label()
    moved = {line.get_label() for line in plots.loss_curve(multiplier, k=2.0).axes.lines}
    assert "k 2" in moved


@pytest.fixture
def effect() -> Effect:
    rows = [("all", -1, 1.0, 0.5), ("layers", 0, 0.6, 0.4), ("layers", 1, -0.1, np.nan), ("final", -1, 0.5, 2.0)]
    table = pd.DataFrame(
        [{"part": p, "block": b, "weights": 0.1, "size": 1, "cosine": 1, "along": a, "leak": k} for p, b, a, k in rows]
    )
    tensors = pd.DataFrame(
        {
            "tensor": ["a", "b"],
            "part": ["layers", "final"],
            "block": [0, -1],
            "module": ["a", "b"],
            "weights": [0.1, 0.2],
            "flow": [0.3, 0.2],
        }
    )
    nothing: Any = SimpleNamespace(__len__=lambda: 9)
    return Effect(2.0, table, tensors, Evidence(nothing, nothing), "v - b")


def test_which_blocks_carry_it(effect: Effect) -> None:
    plot = plots.effect_blocks(effect)
    carried, leak = plot.axes.containers[:2]
    assert [bar.get_height() for bar in carried] == pytest.approx([60, -10, 50])
    assert [bar.get_height() for bar in leak] == pytest.approx([40, 0, 200])
    assert [label.get_text() for label in plot.axes.get_xticklabels()] == ["layers.0", "layers.1", "final"]
    assert "most by layers.0 60 %, final 50 %, layers.1 -10 %, of 3 blocks" in plot.alt


def test_weights_against_what_flows_through_them(effect: Effect) -> None:
    plot = plots.weight_and_effect(effect)
    assert plot.axes.get_xscale() == plot.axes.get_yscale() == "log"
    assert [line.get_label() for line in plot.axes.lines] == ["layers", "final", "alike"]
    assert "in the median the flow changes 2 times as much as the weights do" in plot.alt


def test_what_flows_through_each_matrix(effect: Effect) -> None:
    plot = plots.effect_heatmap(effect)
    assert "flow of 1 modules over 1 blocks" in plot.alt  # what lies outside of blocks has no depth
    assert "norm of delta x / norm of weights x" in plot.axes.figure.axes[1].get_ylabel()


def test_streams_by_depth() -> None:
    rows = [("noise_refiner.1", "image", 0.4), ("context_refiner.1", "text", -0.2), ("layers.0", "image", 0.2)]
    table = pd.DataFrame(
        [
            {"place": p, "stream": s, "tokens": 9, "as it is": r, "orthogonal": 0.7, "linear": 0.8, "cka": 0.9}
            for p, s, r in rows
        ]
    )
    found: Any = SimpleNamespace(table=table)
    plot = plots.alignment_by_depth(found)
    lines = {line.get_label(): line for line in plot.axes.lines}
    assert lines["as it is, image"].get_xdata().tolist() == [0, 2]
    assert lines["as it is, image"].get_ydata().tolist() == [0.4, 0.2]
    assert lines["linear, text"].get_ydata().tolist() == [0.8]
    assert plot.axes.get_ylim()[0] < -0.2
    assert "text after context_refiner.1 -0.2 as it is and 0.8 by a linear map" in plot.alt

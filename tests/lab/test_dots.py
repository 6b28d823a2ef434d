from __future__ import annotations

import sys
from typing import Any

import pytest

from alkahest.lab.dots import clickable_dots
from alkahest.lab.trail import Drawn, Trail

DOTS = [{"x": 1.0, "y": 0.5, "label": "k at 1"}, {"x": 171.1, "y": 0.75, "label": "k at 171.1"}]


@pytest.fixture(params=["anywidget", "list"])
def curve(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "list":
        monkeypatch.setitem(sys.modules, "anywidget", None)
    return clickable_dots("what was drawn")


def test_a_dot_that_is_chosen_is_told(curve: Any) -> None:
    seen: list[int] = []
    curve.observe(lambda change: seen.append(change["new"]), "chosen")
    curve.dots = DOTS
    curve.y_label = "grid"
    assert curve.chosen == -1
    curve.chosen = 1
    assert seen == [1]
    assert curve.title == "what was drawn"


def test_without_anywidget_it_is_a_list_to_choose_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anywidget", None)
    curve = clickable_dots("what was drawn")
    curve.dots, curve.y_label = DOTS, "grid"
    assert [label for label, _ in curve.list.options] == ["k at 1, grid 0.5", "k at 171.1, grid 0.75"]
    assert curve.list.value is None
    curve.list.value = 1
    assert curve.chosen == 1
    curve.dots = [*DOTS, {"x": 2.0, "y": 0.0, "label": "k at 2"}]
    assert curve.list.value == 1


def test_a_picture_without_a_measure_is_no_zero() -> None:
    picked: list[Drawn] = []
    trail = Trail(["a"], picked.append)
    for k, measures in (
        (1.0, {"mine": 0.5}),
        (2.0, {"other": 0.1}),
        (3.0, {"mine": float("nan")}),
        (4.0, {"mine": 0.7}),
    ):
        trail.add(Drawn(f"a at {k}", {"a": k}, b"", measures))
    assert trail.measure.value == "mine"
    assert [(dot["x"], dot["y"]) for dot in trail.curve.dots] == [(1.0, 0.5), (4.0, 0.7)]
    assert "2 without this measure" in trail.note.value
    trail.curve.chosen = 1
    assert [one.values["a"] for one in picked] == [4.0]

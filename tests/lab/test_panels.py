from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import pytest
from waiting import until

import alkahest as ak
from alkahest.errors import AlgebraError
from alkahest.lab import panels
from alkahest.lab.explore import Explorer
from alkahest.lab.jobs import Job


@pytest.fixture
def three(trio: dict[str, Path]) -> tuple[ak.Weights, ak.Weights, ak.Weights]:
    return ak.open(trio["variant"]), ak.open(trio["base"]), ak.open(trio["bridge"]).protect("refiner")


def measured(box: Any) -> Any:
    """What a panel became when its delta had been measured."""
    (job,) = box.children
    assert isinstance(job, Job)
    job.start()
    job.wait(20)
    assert job.error is None
    assert not isinstance(box.children[0], Job)
    return box.children[0]


def test_the_delta_browser_measures_and_then_browses(three: tuple[Any, Any, Any]) -> None:
    v, b, w = three
    browser = measured(panels.delta_browser(v - b, on=w))
    assert isinstance(browser, Explorer)
    assert set(browser.controls) == {"statistic", "part", "view"}
    assert list(browser.controls["part"].options) == [
        "all",
        "embedders",
        "noise_refiner",
        "context_refiner",
        "layers",
        "final",
    ]
    assert "relative of each of 101 tensors" in browser.alt
    browser.controls["part"].value = "layers"
    browser.controls["statistic"].value = "changed"
    assert until(lambda: "changed of each of 30 tensors" in browser.alt)
    for view, words in (("heatmap", "modules over 2 blocks"), ("modules", "for 7 deltas")):
        browser.controls["view"].value = view
        assert until(lambda words=words: words in browser.alt), browser.status.value
    assert browser.status.value == ""
    at_once = panels.delta_browser(ak.delta_table(v - b))
    assert isinstance(at_once, Explorer)


def test_the_rank_panel_tries_rules(three: tuple[Any, Any, Any]) -> None:
    v, b, _ = three
    panel = measured(panels.rank_panel(v - b))
    assert list(panel.controls["rule"].options) == ["rank", "energy", "sum", "ratio"]
    assert "rank 39 to 64" in panel.alt
    panel.controls["value"].value = 0.5
    assert until(lambda: "(1 capped)" in panel.alt), panel.status.value
    panel.controls["rule"].value = "rank"
    assert until(lambda: "whole number" in panel.status.value)
    panel.controls["value"].value = 7.0
    assert until(lambda: "to 7, median 7" in panel.alt)
    with pytest.raises(AlgebraError, match="a delta or its table"):
        panels.rank_panel(v)


def test_the_multiplier_panel_computes_k_and_takes_any_other(three: tuple[Any, Any, Any]) -> None:
    v, b, w = three
    panel = measured(panels.multiplier_panel(v - b, on=w))
    expected = ak.needed_multiplier(v - b, on=w)
    assert panel.multiplier == expected
    controls = panel.explorer.controls
    assert controls["k"].value == float(expected)
    assert list(controls["basis"].options) == ["relative", "survival", "bridge"]
    assert f"k = {expected.value:.4g}" in panel.explorer.alt
    assert "subtract" in panel.words.value
    controls["basis"].value = "bridge"
    other = ak.needed_multiplier(v - b, on=w, basis="bridge")
    assert controls["target"].value == 1.0
    assert controls["k"].value == float(other)
    assert until(lambda: "basis bridge" in panel.words.value)
    controls["k"].value = 5000.5
    assert until(lambda: "k = 5000" in panel.explorer.alt or "k = 5001" in panel.explorer.alt)
    assert "lies outside the slider's" in panel.explorer.rows["k"].note.value
    controls["target"].value = -1.0
    assert until(lambda: "the target is out of range" in panel.explorer.status.value)
    assert panel._repr_mimebundle_()["text/plain"] == panel.explorer.alt
    at_once = panels.multiplier_panel(ak.delta_table(v - b))
    assert at_once.multiplier == ak.needed_multiplier(v - b)


def test_the_multiplier_panel_with_what_pictures_say() -> None:
    model = {name: ak.mini.load(name) for name in ("tb1", "base-variant", "base")}
    delta, on = model["base-variant"] - model["base"], model["tb1"].protect("refiner")
    seen = {"prompts": ["a cyan ball on a beach", "a cyan tree"], "count": 4, "steps": 3, "cfg": 3.0}
    panel = measured(panels.multiplier_panel(delta, on=on, **seen))
    expected = ak.needed_multiplier(delta, on=on, **seen)
    assert panel.multiplier == expected
    controls = panel.explorer.controls
    assert list(controls["basis"].options) == ["pictures", "relative", "survival", "bridge"]
    assert controls["k"].value == float(expected)
    assert "What k does to predictions" in panel.explorer.alt
    assert "as drawn" not in panel.words.value
    controls["k"].value = 25.0
    assert until(lambda: "k = 25 = subtract 10 x add 2.5, as drawn; computed is" in panel.words.value)
    assert "'practically 20x' if it means the multiplier in all" in html.unescape(panel.words.value)
    controls["basis"].value = "relative"
    assert until(lambda: "basis relative" in panel.words.value)
    assert controls["target"].value == 0.02
    assert controls["k"].value == 1.0


def test_bad_input(three: tuple[Any, Any, Any]) -> None:
    v, b, _ = three
    with pytest.raises(AlgebraError, match="a delta or its table is needed"):
        panels.delta_browser(v)
    with pytest.raises(AlgebraError, match="a delta or its table is needed"):
        panels.multiplier_panel(v)
    with pytest.raises(AlgebraError, match="cfg: this is for a multiplier by pictures"):
        panels.multiplier_panel(v - b, cfg=3.0)
    with pytest.raises(AlgebraError, match="a table draws no pictures"):
        panels.multiplier_panel(ak.delta_table(v - b), prompts=["a red ball"])
    box = panels.multiplier_panel(b - b)
    (job,) = box.children
    job.start()
    job.wait(10)
    assert "the delta is exactly zero" in job.status.value

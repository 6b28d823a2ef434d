from __future__ import annotations

import pytest

import alkahest as ak
from alkahest.lab.measure_words import WORDS, measures_table, words_of


def test_every_measure_of_ours_has_words() -> None:
    pipe = ak.pipeline(ak.mini.load("base"))
    images = ak.sample(pipe, ["a red ball"], steps=1, cfg=1, seed=0).images
    assert set(ak.picture_measures(images, pipe).columns) == set(WORDS)
    assert words_of("high_freq") == "how grainy (high_freq)"
    assert words_of("mine") == "mine"


@pytest.mark.parametrize(("value", "shown"), [(0.5, "0.5"), (0.1, "0.1 low"), (0.95, "0.95 high"), (0.9, "0.9")])
def test_what_lies_outside_the_usual_range_is_said(value: float, shown: str) -> None:
    table = measures_table({"now": {"lag1": value}, "a<b": {"grid": 1.0}}, {"lag1": (0.2, 0.9)}, "the bridge")
    assert f"<td>{shown}</td>" in table.replace("<b>", "").replace("</b>", "")
    assert ("<b>" in table) == (" " in shown)
    assert "<td>0.2 to 0.9</td>" in table
    assert "<th scope='col'>a&lt;b</th><th scope='col'>the bridge&#x27;s own</th>" in table
    assert ">how smooth (lag1)</th>" in table


def test_without_a_range_nothing_is_judged() -> None:
    table = measures_table({"now": {"lag1": 0.5}}, {}, "the bridge")
    assert "own" not in table
    assert "<b>" not in table

from __future__ import annotations

import math

import pytest

from alkahest.lab.number_slider import NumberSlider

RANGES = [(0.1, 1000.0, True), (0.0, 1000.0, False), (-5.0, 5.0, False)]


@pytest.fixture(params=RANGES, ids=["log", "linear", "negative"])
def number(request: pytest.FixtureRequest) -> NumberSlider:
    low, high, log = request.param
    return NumberSlider("k", 2.0, low, high, log)


def test_a_typed_number_moves_the_slider_and_stays_as_typed(number: NumberSlider) -> None:
    for typed in (3.3333, 1.711, 4.2):
        number.box.value = typed
        assert number.box.value == typed
        far = abs(math.log10(number.slider.value / typed)) if number.logarithmic else abs(number.slider.value - typed)
        assert far <= 0.51 * number.step
        assert number.note.value == ""


def test_outside_the_slider_goes_to_its_end_with_a_word(number: NumberSlider) -> None:
    for typed, end in ((5000.123, number.high), (-70.0, number.low)):
        number.box.value = typed
        assert number.box.value == typed
        assert number.slider.value == pytest.approx(end)
        assert f"k = {typed:g} lies outside the slider's {number.low:g} to {number.high:g}" in number.note.value
    number.box.value = 1.0
    assert number.note.value == ""
    number.box.value = float("nan")
    assert number.slider.value == pytest.approx(number.low)
    assert "k = nan" in number.note.value


def test_a_hand_on_the_slider_writes_the_box(number: NumberSlider) -> None:
    number.slider.value = 4.0
    assert number.box.value == 4.0
    moved = number.slider.value * 10**number.step if number.logarithmic else number.slider.value + number.step
    number.slider.value = moved  # an arrow key: one step
    assert number.box.value == pytest.approx(moved, rel=1e-3)


def test_a_slider_that_takes_its_own_step_leaves_the_box_alone() -> None:
    number = NumberSlider("k", 2.0, 0.1, 1000, log=True)
    number.box.value = 171.1
    number.slider.value = 10**2.23  # what a browser makes of it, on its grid of 0.01
    assert number.box.value == 171.1
    number.slider.value = 10**2.24
    assert number.box.value == pytest.approx(10**2.24, rel=1e-3)
    number.box.value = 5000.0
    number.slider.value = 999.9999  # the end, as a browser rounds it
    assert number.box.value == 5000.0


def test_it_begins_where_it_is_told() -> None:
    number = NumberSlider("k of a", 5570.0, 0.1, 1000, log=True)
    assert number.box.value == 5570.0
    assert number.slider.value == pytest.approx(1000)
    assert "k of a = 5570 lies outside" in number.note.value
    assert NumberSlider("strength", 0.0, 0.0, 2.0).note.value == ""

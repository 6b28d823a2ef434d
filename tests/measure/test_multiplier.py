from __future__ import annotations

import pytest

from alkahest.measure.multiplier import factors, limits_passed, short


def test_factors() -> None:
    assert factors(171.1) == (10.0, pytest.approx(17.11))
    assert factors(4.5) == (4.5, 1.0)
    assert factors(10) == (10.0, 1.0)
    assert factors(-30) == (-10.0, 3.0)
    assert factors(0.0) == (0.0, 1.0)
    assert factors(4.499999999) == (4.499999999, 1.0)  # a measured one, which is typed as 4.5


@pytest.mark.parametrize("k", [0.0753, 8.7e-06, 0.004, -0.015, 3.14159, 9.996])
def test_what_the_editor_would_round_goes_to_the_adding_node(k: float) -> None:
    assert factors(k) == (1.0, k)


@pytest.mark.parametrize("k", [171.1, 0.0753, 8.7e-06, 1234.5, -0.01, 4.5, 29.97, 2.5e-9, 3e7])
def test_the_pair_that_is_shown_is_the_multiplier(k: float) -> None:
    one, other = (float(short(factor)) for factor in factors(k))
    assert one * other == pytest.approx(k, rel=6e-4)
    assert abs(one) <= 10
    assert one == round(one, 2)
    assert "e" not in short(k) or abs(k) < 1e-6


@pytest.mark.parametrize("sign", [1, -1])
def test_the_article_s_limits_in_both_readings(sign: int) -> None:
    def said(k: float) -> str:
        return "\n".join(limits_passed(sign * k))

    assert said(10) == ""
    assert said(12).startswith("past 10.0, where ComfyUI's ModelMergeSubtract stops: subtract at ")
    assert "practically" not in said(20)
    # 171.1 = 10 x 17.11: past 20 and 100 in all, but not on the adding side.
    once = said(171.1)
    assert "past the article's 'practically 20x' if it means the multiplier in all; not if it means the adding" in once
    assert "side, 17.11 here" in once
    assert "past the article's 'designed to go up to 100x' if it means the multiplier in all" in once
    assert "'practically 20x' in both readings: in all, and on the adding side" in said(201)
    assert "'designed to go up to 100x' if it means the multiplier in all" in said(201)
    assert "'designed to go up to 100x' in both readings" in said(1001)

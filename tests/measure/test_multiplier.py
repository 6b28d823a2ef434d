from __future__ import annotations

import pytest

from alkahest.measure.multiplier import factors, limits_passed


def test_factors() -> None:
    assert factors(171.1) == (10.0, pytest.approx(17.11))
    assert factors(4.5) == (4.5, 1.0)
    assert factors(10) == (10.0, 1.0)
    assert factors(-30) == (-10.0, 3.0)
    assert factors(0.0) == (0.0, 1.0)


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

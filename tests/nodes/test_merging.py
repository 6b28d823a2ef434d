"""What the merging nodes say and refuse, on a stand-in for ComfyUI's model; what they compute is tested in a real one."""

from __future__ import annotations

from typing import Any

import pytest
from stand_in import Model, stand_in

from alkahest.errors import AlgebraError, UnknownNameError
from alkahest.nodes import AlkahestAdd, AlkahestMerge, AlkahestSubtract


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> tuple[Model, Model, Model]:
    stand_in(monkeypatch)
    return Model(1), Model(2), Model(3)


def said(out: dict[str, Any]) -> list[str]:
    (text,) = out["ui"]["text"]
    return str(text).splitlines()


def test_each_says_what_it_did_and_keeps(three: tuple[Model, Model, Model]) -> None:
    bridge, variant, base = three
    out = AlkahestMerge().merge(bridge, variant, base, 17.11)
    changed = out["result"][0].patches
    assert said(out)[:2] == [
        "bridge + 17.11 * (variant - base)",
        f"48 of {len(changed) + 48} weights stay the bridge's (refiner)",
    ]
    assert all("refiner" not in key for key in changed)
    out = AlkahestSubtract().merge(variant, base, 0.05)
    assert said(out)[0] == "0.05 * (model1 - model2)"
    assert said(AlkahestAdd().merge(bridge, out["result"][0], 1.0, keep_refiner=False))[1].startswith("all ")


def test_what_will_surprise_is_a_warning(three: tuple[Model, Model, Model]) -> None:
    merged = AlkahestMerge().merge(*three, 2.0, "refiner", "noise_refiner: 3, layers.0: 1.5, attention: 2")
    warned = [line for line in said(merged) if line.startswith("warning")]
    assert warned == [
        "warning: noise_refiner is named in parts, and protect keeps all of it",
        "warning: attention is named in parts, and protect keeps some of it",
    ]
    assert "warning: nothing changes" in said(AlkahestMerge().merge(*three, 0.0))
    assert "warning: nothing changes" in said(AlkahestMerge().merge(*three, 1.0, "all"))
    assert "warning: a difference of nothing" in said(AlkahestSubtract().merge(*three[1:], 0.0))
    assert "warning: nothing changes" in said(AlkahestAdd().merge(*three[:2], 0.0))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_multiplier_that_is_no_number_is_refused(number: float, three: tuple[Model, Model, Model]) -> None:
    for call in (
        lambda: AlkahestMerge().merge(*three, number),
        lambda: AlkahestSubtract().merge(*three[1:], number),
        lambda: AlkahestAdd().merge(*three[:2], number),
    ):
        with pytest.raises(AlgebraError, match=r"^Alkahest \w+: the multiplier is not a number"):
            call()


def test_patterns_that_take_nothing_say_what_was_meant(three: tuple[Model, Model, Model]) -> None:
    with pytest.raises(UnknownNameError, match=r"(?s)'REFINER' selects no tensor.*did you mean 'refiner'"):
        AlkahestMerge().merge(*three, 1.0, "REFINER")
    with pytest.raises(UnknownNameError, match=r"(?s)a comma with nothing beside it.*'refiner,'"):
        AlkahestMerge().merge(*three, 1.0, "refiner,")

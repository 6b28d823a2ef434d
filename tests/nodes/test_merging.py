"""What the merging nodes say and refuse, on a stand-in for ComfyUI's model; what they compute is tested in a real one."""

from __future__ import annotations

import copy
import sys
import types
from typing import Any

import pytest
import tiny
import torch

from alkahest.errors import AlgebraError, UnknownNameError
from alkahest.nodes import AlkahestAdd, AlkahestMerge, AlkahestSubtract


class Model:
    """The part of ComfyUI's ModelPatcher that the nodes use."""

    def __init__(self, seed: int) -> None:
        self.model = torch.nn.Module()
        self.model.diffusion_model = torch.nn.Module()
        for name, value in tiny.native(tiny.state(seed)).items():
            *path, last = name.split(".")
            place = self.model.diffusion_model
            for one in path:
                if one not in dict(place.named_children()):
                    place.add_module(one, torch.nn.Module())
                place = place.get_submodule(one)
            place.register_parameter(last, torch.nn.Parameter(value))
        self.patches: dict[str, list[Any]] = {}
        self.backup: dict[str, Any] = {}
        self.hook_backup: dict[str, Any] = {}
        self.attachments: dict[str, Any] = {}

    def clone(self) -> Model:
        found = copy.copy(self)
        found.patches, found.attachments = dict(self.patches), dict(self.attachments)
        return found

    def add_patches(self, patches: dict[str, Any], patch: float, model: float) -> None:
        for key, value in patches.items():
            self.patches[key] = [*self.patches.get(key, []), (patch, value, model, None, None)]

    def set_attachments(self, name: str, value: Any) -> None:
        self.attachments[name] = value


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> tuple[Model, Model, Model]:
    comfy, patcher = types.ModuleType("comfy"), types.ModuleType("comfy.model_patcher")
    patcher.get_key_weight = lambda model, key: (model.get_parameter(key), None, None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    monkeypatch.setitem(sys.modules, "comfy.model_patcher", patcher)
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

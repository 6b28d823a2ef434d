"""The multiplier by pictures, on the miniature family: few pictures and steps, so that it stays quick."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import alkahest as ak
from alkahest.engine.events import Event
from alkahest.errors import AlgebraError, FileFormatError, MismatchError, NonFiniteError, UnsupportedError
from alkahest.measure.text import two_digits
from alkahest.mini.scenes import held_out_prompts
from alkahest.pictures import by_pictures, evidence
from alkahest.pictures.needed import stream_needed_multiplier

CYAN = [replace(scene, colour="cyan").caption() for scene in held_out_prompts(8)]
QUICK: dict[str, Any] = {"count": 8, "steps": 6, "cfg": 3.0}


@pytest.fixture(scope="module")
def model() -> dict[str, ak.Checkpoint]:
    return {name: ak.mini.load(name) for name in ("base", "base-variant", "turbo", "tb1", "base-refiner-trained")}


@pytest.fixture(scope="module")
def on_its_own_base(model: dict[str, ak.Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALKAHEST_CACHE", str(tmp_path_factory.mktemp("curves")))
        delta = model["base-variant"] - model["base"]
        yield ak.needed_multiplier(delta, on=model["base"], prompts=CYAN, **QUICK)


def test_on_its_own_base_the_loss_is_least_about_one(on_its_own_base: Any) -> None:
    """There k = 1 is the variant, which drew the pictures."""
    k = on_its_own_base
    curve = k.curve
    assert 0.8 < curve.minimum < 1.8
    assert k == float(f"{2 * curve.minimum:.2g}")  # guidance of 3; two digits are what pictures know
    assert k.basis == "pictures"
    low, high = k.range
    assert low < curve.minimum < 2 * curve.minimum < high * 1.1
    assert k.bases["pictures"] == k
    assert k.bases["relative"] == pytest.approx(0.343, abs=0.001)
    assert np.interp(1.0, curve.ks, curve.along) == pytest.approx(1, abs=0.03)
    assert curve.new.shape == curve.rest.shape == (len(curve.ks), 8)
    np.testing.assert_allclose(curve.new[0], curve.base, rtol=1e-4)  # without the delta it is the base
    words = repr(k)
    assert f"take {k.value:g}: the loss of the new thing is least at {two_digits(curve.minimum)}" in words
    assert "with guidance of 3 up to 2 times that draws best" in words
    assert "what everything else loses is" in words
    assert "added to its own base, where k = 1 is the variant" in words
    assert (k.per_part.k[k.per_part.changed > 0] == k.value).all()


def test_without_guidance_the_minimum_is_what_to_take(model: dict[str, ak.Checkpoint], on_its_own_base: Any) -> None:
    from alkahest.measure.bases import sort_matrices

    matrices = sort_matrices(on_its_own_base.table, None)
    options = evidence.PictureOptions(prompts=CYAN, cfg=1.0)
    k = by_pictures.multiplier_by(on_its_own_base.curve, (), matrices, options)
    assert k == float(f"{on_its_own_base.curve.minimum:.2g}")
    assert "without guidance that is the k to take" in repr(k)


def test_what_was_measured_is_remembered(model: dict[str, ak.Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    delta, few = model["base-variant"] - model["base"], {"count": 2, "steps": 2}
    once = ak.needed_multiplier(delta, on=model["tb1"].protect("refiner"), prompts=CYAN, **few)
    assert any("by 2 pictures, too few for an interval: take 8 or more" in line for line in once.warnings)
    monkeypatch.setattr(by_pictures, "LiveModel", None)  # it would be needed
    again = ak.needed_multiplier(delta, on=model["tb1"].protect("refiner"), prompts=CYAN, **few)
    assert (again.value, again.range) == (once.value, once.range)
    assert again.warnings == once.warnings
    with pytest.raises(TypeError):  # other prompts
        ak.needed_multiplier(delta, on=model["tb1"].protect("refiner"), prompts=CYAN[::-1], **few)


def test_what_cannot_be_imported_gets_zero(model: dict[str, ak.Checkpoint]) -> None:
    bridge = model["tb1"].protect("refiner")
    wrong = ak.needed_multiplier(model["base-variant"] - model["turbo"], on=bridge, prompts=CYAN, **QUICK)
    assert wrong == 0
    assert "does not come over" in repr(wrong)
    assert "is it the right base? See nearest_base" in repr(wrong)
    nothing = ak.needed_multiplier(
        model["base"] - model["base-variant"], on=model["base-variant"], prompts=CYAN, **QUICK
    )
    # The base draws no cyan, so that its pictures ask for other balls: the delta takes away, and that is found.
    assert nothing > 0


def test_progress_is_of_one_kind_and_ends_in_the_number(model: dict[str, ak.Checkpoint]) -> None:
    delta = model["base-variant"] - model["base"]
    events = list(stream_needed_multiplier(delta, model["base"], prompts=CYAN, count=2, steps=1))
    assert all(type(event) is Event for event in events)
    shares = [event.done / event.total for event in events]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert [event.result for event in events[:-1]] == [None] * (len(events) - 1)
    assert any(event.key.startswith("drawing the new thing") for event in events)
    assert any(event.key.startswith("k = ") for event in events)


def test_pictures_that_are_there(model: dict[str, ak.Checkpoint], tmp_path: Path) -> None:
    delta, bridge = model["base-variant"] - model["base"], model["tb1"].protect("refiner")
    images = ak.sample(ak.pipeline(model["base-variant"]), CYAN[:3], steps=4, cfg=3).images
    given = ak.needed_multiplier(delta, on=bridge, pictures=images, prompts=CYAN[:3], steps=2)
    assert given.curve.new.shape[1] == given.curve.rest.shape[1] == 3
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(CYAN[number])
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    folder = ak.needed_multiplier(delta, on=bridge, pictures=tmp_path, steps=2)
    np.testing.assert_allclose(folder.curve.new, given.curve.new, rtol=1e-6)
    assert any("1 pictures were left out: no caption" in line for line in folder.warnings)
    wide = [image.resize((96, 64)) for image in images]
    cropped = ak.needed_multiplier(delta, on=bridge, pictures=wide, prompts=CYAN[:3], steps=1)
    assert any("3 pictures were cropped to 64 x 64" in line for line in cropped.warnings)
    assert not any("cropped" in line for line in given.warnings)
    with pytest.raises(AlgebraError, match="count is for drawn ones"):
        ak.needed_multiplier(delta, on=bridge, pictures=images, prompts=CYAN[:3], count=2)
    with pytest.raises(MismatchError, match="each picture needs its caption"):
        ak.needed_multiplier(delta, on=bridge, pictures=images)
    with pytest.raises(MismatchError, match="each picture needs its caption"):
        ak.needed_multiplier(delta, on=bridge, pictures=images, prompts=CYAN[:2])
    with pytest.raises(AlgebraError, match="a folder brings its own captions"):
        ak.needed_multiplier(delta, on=bridge, pictures=tmp_path, prompts=CYAN)
    with pytest.raises(FileFormatError, match="no such folder"):
        ak.needed_multiplier(delta, on=bridge, pictures=tmp_path / "gone")


def test_bad_input(model: dict[str, ak.Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    delta, bridge = model["base-variant"] - model["base"], model["tb1"].protect("refiner")
    for options, message in (
        ({"basis": "pictures"}, "pictures of what the variant learned are needed"),
        ({"prompts": "a cyan ball"}, "prompts are a list of texts"),
        ({"prompts": []}, "prompts are a list of texts"),
        ({"prompts": CYAN, "ordinary": []}, "ordinary is a list of texts"),
        ({"prompts": CYAN, "count": 0}, "at least one picture"),
        ({"prompts": CYAN, "target": 0.02}, "target means nothing to the basis pictures"),
        ({"prompts": CYAN, "basis": "relative"}, "prompts means nothing to the basis relative"),
        ({"basis": "survival", "steps": 4, "cfg": 3.0}, "steps, cfg mean nothing to the basis survival"),
    ):
        with pytest.raises(AlgebraError, match=message):
            ak.needed_multiplier(delta, on=bridge, **options)
    with pytest.raises(MismatchError, match="every matrix is protected"):
        ak.needed_multiplier(delta, on=bridge.protect("all"), prompts=CYAN)
    with pytest.raises(AlgebraError, match="the delta is exactly zero"):
        ak.needed_multiplier(model["base"] - model["base"], on=bridge, prompts=CYAN)
    with pytest.raises(AlgebraError, match="does not say what it is a difference from"):
        ak.needed_multiplier(ak.open_lora(ak.mini.lora("base-lora")), on=bridge, prompts=CYAN)

    def short(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(by_pictures, "predictions", short)
    with pytest.raises(UnsupportedError, match="too little memory") as told:
        ak.needed_multiplier(delta, on=bridge, prompts=CYAN, count=1, steps=1)
    assert "storage='fp8_e4m3fn'" in str(told.value)


def test_a_lora_with_the_base_that_it_was_made_for(model: dict[str, ak.Checkpoint]) -> None:
    lora = ak.open_lora(ak.mini.lora("base-lora"))
    k = ak.needed_multiplier(lora, on=model["base"], base=model["base"], prompts=CYAN[:2], count=2, steps=2)
    assert k.basis == "pictures"
    assert np.interp(1.0, k.curve.ks, k.curve.along) == pytest.approx(1, abs=0.1)  # base + 1 x LoRA is what drew
    with pytest.raises(
        AlgebraError, match=r"base \(on the command line --made-for\) means nothing to the basis relative"
    ):
        ak.needed_multiplier(lora, on=model["base"], base=model["base"])


def test_few_prompts_and_prompts_of_both_kinds_are_said(model: dict[str, ak.Checkpoint]) -> None:
    delta, bridge = model["base-variant"] - model["base"], model["tb1"].protect("refiner")
    k = ak.needed_multiplier(delta, on=bridge, prompts=CYAN[:1], ordinary=CYAN, count=4, steps=2)
    assert "drawn from 1 prompt: others may say otherwise" in repr(k)
    assert "1 of the ordinary prompts ask for the new thing too" in repr(k)


def test_nan_in_what_a_model_says(model: dict[str, ak.Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    from alkahest.pictures import evaluation

    monkeypatch.setattr(evaluation, "velocity", lambda model, batch, how: batch.target * torch.nan)
    with pytest.raises(NonFiniteError, match="NaN or infinity of the new thing"):
        ak.needed_multiplier(model["base-variant"] - model["base"], on=model["tb1"], prompts=CYAN, count=1, steps=1)

from __future__ import annotations

import base64
import html
import json
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from waiting import until

import alkahest as ak
from alkahest.errors import AlgebraError, UnknownNameError
from alkahest.lab.figure import image_tag
from alkahest.lab.live_merge import LiveMerge, live_merge
from alkahest.recipes.inputs import build
from alkahest.recipes.read import read_recipe

SAMPLING = {"steps": 2, "cfg": 1.0, "seed": 3}
PROMPTS = ["a red ball by day", "a blue house at night"]


@pytest.fixture
def parts() -> tuple[Any, Any, Any]:
    bridge, base, deturbo = (ak.mini.load(name) for name in ("tb1", "base", "deturbo"))
    return bridge, ak.mini.load("base-variant") - base, ak.mini.load("turbo-variant") - deturbo


@pytest.fixture
def panel(parts: tuple[Any, Any, Any]) -> LiveMerge:
    bridge, cyan, heart = parts
    lora = ak.open_lora(ak.mini.lora("turbo-lora"))
    return live_merge(
        bridge,
        {"cyan": cyan, "heart": heart},
        PROMPTS,
        loras={"style": lora},
        k={"cyan": 2.0, "heart": 0.0},
        sampling=SAMPLING,
    )


def drawn(weights: Any) -> list[bytes]:
    return [image.tobytes() for image in ak.sample(ak.pipeline(weights), PROMPTS, **SAMPLING).images]


def shown(panel: LiveMerge) -> list[bytes]:
    return [image.tobytes() for image in panel.images]


def test_the_picture_is_that_of_the_expression(panel: LiveMerge, parts: tuple[Any, Any, Any]) -> None:
    bridge, cyan, heart = parts
    assert panel.expression.text() == (bridge.protect("refiner") + 2.0 * cyan).text()
    assert shown(panel) == drawn(bridge.protect("refiner") + 2.0 * cyan)
    cyan_row, heart_row, style = panel.rows
    cyan_row.k.value, heart_row.k.value = 171.1, 1.5
    cyan_row.by_part.value = True
    cyan_row.parts["layers"].value = 0.5
    style.k.value = 0.25
    panel.wait(60)
    lora = style.delta
    wanted = bridge.protect("refiner") + 171.1 * cyan.scaled({"layers": 0.5}) + 1.5 * heart + 0.25 * lora
    assert panel.expression.text() == wanted.text()
    assert shown(panel) == drawn(wanted)
    assert "171.1" in panel.alt
    assert PROMPTS[1] in panel.alt
    panel.protect.value = False
    cyan_row.by_part.value = False
    panel.wait(60)
    assert shown(panel) == drawn(bridge + 171.1 * cyan + 1.5 * heart + 0.25 * lora)
    assert panel.measures == pytest.approx(ak.picture_measures(panel.images).mean().to_dict())


def test_the_whole_input_can_be_left_out(panel: LiveMerge, parts: tuple[Any, Any, Any]) -> None:
    panel.rows[0].k.value = 0.0
    panel.wait(60)
    assert panel.expression.text() == "tb1.protect('refiner')"
    assert shown(panel) == drawn(parts[0])


def test_pictures_are_kept_beside_what_comes(panel: LiveMerge) -> None:
    first = panel.measures
    panel.keep()
    panel.rows[0].k.value = 30.0
    panel.wait(60)
    assert panel.kept.recipe.tolist() == ["tb1.protect('refiner') + 2 * (base_variant - base)"]
    assert panel.kept.iloc[0]["lag1"] == first["lag1"] != panel.measures["lag1"]
    assert panel.beside.pictures.value.count("<img") == 1
    assert "kept 1" in panel.beside.table.value
    assert "how grainy (high_freq)" in panel.beside.table.value
    panel.forget()
    assert panel.beside.pictures.value == ""
    assert not len(panel.kept)


def test_what_was_drawn_is_a_dot_and_a_click_shows_it_beside(panel: LiveMerge) -> None:
    first = panel._png
    panel.rows[0].k.value = 30.0
    panel.wait(60)
    curve = panel.trail.curve
    assert [dot["x"] for dot in curve.dots] == [2.0, 30.0]
    assert [dot["y"] for dot in curve.dots] == [one.measures["lag1"] for one in panel.trail.drawn]
    assert curve.dots[0]["label"].startswith("cyan at 2: how smooth (lag1) 0.")
    assert panel.beside.pictures.value == ""
    curve.chosen = 0
    assert image_tag(first, panel.trail.drawn[0].recipe) in panel.beside.pictures.value
    assert panel.rows[0].k.value == 30.0
    panel.trail.measure.value = "grid"
    panel.trail.over.value = "heart"
    assert [dot["x"] for dot in curve.dots] == [0.0, 0.0]
    assert curve.dots[1]["y"] == panel.measures["grid"]
    panel.settings["seed"].value = 5
    panel.wait(60)
    panel.settings["seed"].value = 3
    panel.wait(60)
    assert len(curve.dots) == 3  # the same picture again is no other dot


def test_the_factor_pair_is_that_of_the_number_in_the_box(panel: LiveMerge) -> None:
    panel.rows[0].k.value = 171.1
    assert "subtract 10 x add 17.11" in panel.rows[0].pair.value
    panel.rows[0].k.value = 0.0753
    assert "subtract 1 x add 0.0753" in panel.rows[0].pair.value
    panel.rows[0].k.value = float("nan")
    assert panel.rows[0].pair.value == ""
    assert panel.rows[2].pair.value == ""  # a LoRA


def test_the_bridges_own_range_stands_beside(panel: LiveMerge, parts: tuple[Any, Any, Any]) -> None:
    panel.rows[0].k.value = 200.0
    panel.wait(60)
    panel.measure_bridge.start()
    panel.measure_bridge.wait(60)
    assert panel.measure_bridge.error is None
    rows = [
        ak.picture_measures(ak.sample(ak.pipeline(parts[0]), PROMPTS, **{**SAMPLING, "seed": seed}).images)
        for seed in range(3, 6)
    ]
    low, high = (getattr(pd.concat(rows).lag1, which)() for which in ("min", "max"))
    assert f"{low:.3g} to {high:.3g}" in panel.beside.table.value
    assert "the bridge's own" in panel.beside.table.value.replace("&#x27;", "'")
    assert (
        f"<b>{panel.measures['contrast']:.4g} " in panel.beside.table.value
    )  # 200 times too much is outside, and says so
    panel.settings["seed"].value = 9  # the range is over seeds
    panel.wait(60)
    assert f"{low:.3g} to {high:.3g}" in panel.beside.table.value
    panel.settings["steps"].value = 3
    panel.wait(60)
    assert f"{low:.3g} to {high:.3g}" not in panel.beside.table.value
    assert "is of other prompts or settings: measure it again" in panel.beside.table.value


def test_what_fails_is_said_and_the_picture_stays(panel: LiveMerge) -> None:
    before, alt = panel._png, panel.alt
    panel.settings["cfg"].value = 0.5
    panel.wait(60)
    assert "role='alert'" in panel.status.value
    assert "cfg counts as ComfyUI" in panel.status.value
    assert panel._png == before
    panel.settings["cfg"].value = 1.0
    panel.rows[0].k.value = 1e39
    panel.wait(60)
    assert "role='alert'" in panel.status.value
    panel.rows[0].k.value = 2.0
    panel.wait(60)
    assert (panel._png, panel.alt) == (before, alt)
    assert "tensors rewritten" in panel.status.value


def test_a_newer_number_and_cancel_stop_a_drawing(panel: LiveMerge) -> None:
    before = panel.alt
    panel.settings["steps"].value = 5000
    assert until(lambda: panel.bar.value > 0, 30)
    panel.cancel_button.click()
    panel.wait(30)
    assert "cancelled" in panel.status.value
    assert panel.alt == before
    assert html.escape(before) in panel.picture.value  # and no preview is left
    assert panel.cancel_button.disabled
    panel.settings["steps"].value = 4000
    assert until(lambda: panel.bar.value > 0, 30)
    panel.settings["steps"].value = 2
    panel.rows[0].k.value = 3.0
    panel.wait(30)
    assert "+ 3 * (base_variant" in panel.alt
    assert panel.bar.value == 0


def test_two_live_merges_take_turns(panel: LiveMerge, parts: tuple[Any, Any, Any]) -> None:
    other = live_merge(parts[0], {"heart": parts[2]}, PROMPTS, sampling=SAMPLING, k=1.5)
    panel.settings["steps"].value = 300
    assert until(lambda: panel.bar.value > 0, 30)
    other.rows[0].k.value = 2.0
    assert until(lambda: "another panel is drawing" in other.status.value, 30)
    panel.cancel()
    other.wait(60)
    assert shown(other) == drawn(parts[0].protect("refiner") + 2.0 * parts[2])


def test_the_recipe_and_the_model_are_saved(panel: LiveMerge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    panel.rows[2].k.value = 0.5
    panel.save_recipe.start_button.click()
    panel.save_recipe.wait(60)
    what, recipe = read_recipe(tmp_path / "merge.json")
    assert what == "a recipe"
    assert recipe.text == panel.expression.text()
    assert {entry["blake3"] for files in recipe.inputs.values() for entry in files} != set()
    panel.save_model.start_button.click()
    saved = panel.save_model.wait(60)
    assert "replaced" not in panel.save_recipe.status.value + panel.save_model.status.value
    for job in (panel.save_recipe, panel.save_model):
        job.start_button.click()
        job.wait(60)
        assert "replaced the file of that name" in job.status.value
    build(recipe, {}, tmp_path).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == Path(saved.path).read_bytes()
    panel.recipe_path.value = str(saved.path)  # a recipe must not replace a model
    panel.save_recipe.start_button.click()
    panel.save_recipe.wait(60)
    assert "a recipe is a .json file" in panel.save_recipe.status.value
    assert (tmp_path / "again.safetensors").read_bytes() == Path(saved.path).read_bytes()


def test_every_control_has_a_name_and_the_picture_goes_with_the_notebook(panel: LiveMerge) -> None:
    for control in (*panel.settings.values(), panel.protect, *(c for row in panel.rows for c in row.controls)):
        assert control.description
    bundle = panel._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert bundle["text/plain"] == panel.alt
    assert not [thread for thread in threading.enumerate() if not thread.daemon and "alkahest" in thread.name]
    json.dumps(bundle)


def test_bad_input(parts: tuple[Any, Any, Any]) -> None:
    bridge, cyan, _ = parts
    with pytest.raises(AlgebraError, match="cyan is no difference"):
        live_merge(bridge, {"cyan": bridge}, PROMPTS)
    with pytest.raises(UnknownNameError, match="did you mean 'cyan'"):
        live_merge(bridge, {"cyan": cyan}, PROMPTS, k={"cyna": 2.0})
    with pytest.raises(UnknownNameError, match="did you mean 'steps'"):
        live_merge(bridge, {"cyan": cyan}, PROMPTS, sampling={"step": 2})
    fixed = live_merge(bridge.protect("embedders"), {"cyan": cyan}, PROMPTS[0], sampling=SAMPLING)
    assert fixed.protect.disabled
    assert fixed.expression.text().startswith("tb1.protect('embedders')")

"""Measuring and saving from the files that a graph loads, where ComfyUI holds them in float32 as it does on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stand_in import Model, stand_in

import alkahest as ak
from alkahest.errors import MismatchError
from alkahest.nodes import AlkahestMultiplier, AlkahestSave, AlkahestSupplement

NAMES = ("bridge", "variant", "base")


def loader(name: str) -> dict[str, Any]:
    return {"class_type": "UNETLoader", "inputs": {"unet_name": f"{name}.safetensors", "weight_dtype": "default"}}


GRAPH = {
    **{str(n): loader(name) for n, name in enumerate(NAMES)},
    "9": {
        "class_type": "AlkahestMultiplier",
        "inputs": {"bridge": ["0", 0], "variant": ["1", 0], "base": ["2", 0], "basis": "survival", "target": 0.0},
    },
}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Three bf16 files that lie close together, and ComfyUI's float32 models of them."""
    folder = tmp_path / "diffusion_models"
    folder.mkdir()
    made = {
        "bridge": ak.made_up(layers=1, seed=1, width=64),
        "variant": ak.made_up(layers=1, seed=2, delta=0.0005, width=64),
        "base": ak.made_up(layers=1, seed=2, width=64),
    }
    for name, weights in made.items():
        weights.save(folder / f"{name}.safetensors")
    path = folder / "bridge.safetensors"  # larger than what is added to it, which bf16 then rounds away
    save_file({key: 64 * value for key, value in load_file(path).items()}, path)
    stand_in(monkeypatch, tmp_path)
    stored = {name: load_file(folder / f"{name}.safetensors") for name in NAMES}
    assert {value.dtype for value in stored["base"].values()} == {torch.bfloat16}
    return {name: Model({key: value.float() for key, value in values.items()}) for name, values in stored.items()}


def files(tmp_path: Path) -> dict[str, ak.Checkpoint]:
    return {name: ak.open(tmp_path / f"diffusion_models/{name}.safetensors") for name in NAMES}


def measure(models: dict[str, Any], prompt: Any) -> tuple[float, str]:
    out = AlkahestMultiplier().measure(**models, basis="survival", target=0.0, prompt=prompt, unique_id="9")
    value, report = out["result"]
    assert out["ui"]["text"] == [report]
    return value, report


def test_a_multiplier_is_that_of_the_files(models: dict[str, Any], tmp_path: Path) -> None:
    own = files(tmp_path)
    wanted = ak.needed_multiplier(own["variant"] - own["base"], on=own["bridge"].protect("refiner"), basis="survival")
    value, report = measure(models, GRAPH)
    assert value == wanted.value
    assert "warning" not in report
    held, warned = measure(models, None)
    assert (held, value > 2) == (1.0, True), "float32 hides nothing, so that nothing has to outlive it"
    for name in NAMES:
        assert f"warning: {name} is measured as ComfyUI holds it, in fp32" in warned


def test_one_unknown_model_leaves_the_others_their_files(models: dict[str, Any]) -> None:
    unknown = {"class_type": "SomebodyElses", "inputs": {"model": ["1", 0]}}
    graph = {**GRAPH, "5": unknown, "9": {**GRAPH["9"], "inputs": {**GRAPH["9"]["inputs"], "variant": ["5", 0]}}}
    _, report = measure(models, graph)
    assert "warning: variant is measured as ComfyUI holds it, in fp32" in report
    assert "SomebodyElses" in report
    assert "bridge is measured" not in report
    gone = {**GRAPH, "2": loader("gone")}
    assert "diffusion_models/gone.safetensors is not found" in measure(models, gone)[1]


def test_a_difference_is_no_model_to_measure(models: dict[str, Any]) -> None:
    subtract = {"class_type": "ModelMergeSubtract", "inputs": {"model1": ["1", 0], "model2": ["2", 0], "multiplier": 1}}
    graph = {**GRAPH, "5": subtract, "9": {**GRAPH["9"], "inputs": {**GRAPH["9"]["inputs"], "variant": ["5", 0]}}}
    with pytest.raises(MismatchError, match=r"^Alkahest Multiplier: variant is a difference, not a model"):
        measure(models, graph)


def test_what_samplers_alone_see_is_said(models: dict[str, Any]) -> None:
    beside = {
        "class_type": "LoraLoaderBypassModelOnly",
        "inputs": {"model": ["1", 0], "lora_name": "style.safetensors", "strength_model": 1.0},
    }
    graph = {**GRAPH, "5": beside, "9": {**GRAPH["9"], "inputs": {**GRAPH["9"]["inputs"], "variant": ["5", 0]}}}
    assert "note: node 5 (LoraLoaderBypassModelOnly) applies its LoRA while sampling only" in measure(models, graph)[1]
    save = {"class_type": "AlkahestSave", "inputs": {"model": ["5", 0], "filename_prefix": "one"}}
    out = AlkahestSave().save(models["variant"], "one", prompt={**graph, "9": save}, unique_id="9")
    assert "note: node 5 (LoraLoaderBypassModelOnly) applies its LoRA while sampling only" in out["result"][0]
    assert "recipe: variant" in out["result"][0]
    between = {"class_type": "SomebodyElses", "inputs": {"model": ["5", 0]}}
    save = {"class_type": "AlkahestSave", "inputs": {"model": ["6", 0], "filename_prefix": "two"}}
    out = AlkahestSave().save(models["variant"], "two", prompt={**graph, "6": between, "9": save}, unique_id="9")
    assert "no recipe, because" in out["result"][0]
    assert "warning: node 5 (LoraLoaderBypassModelOnly) applies its LoRA while sampling only" in out["result"][0]


def test_what_lies_in_a_file_beside_the_model_is_said(models: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "diffusion_models/variant.safetensors"
    save_file({**load_file(path), "stray.weight": torch.ones(2)}, path)
    save = {"class_type": "AlkahestSave", "inputs": {"model": ["1", 0], "filename_prefix": "one"}}
    out = AlkahestSave().save(models["variant"], "one", prompt={**GRAPH, "9": save}, unique_id="9")
    assert "stray.weight" in out["result"][0]
    assert "stray.weight" in measure(models, GRAPH)[1]


def test_a_supplement_is_extracted_from_the_files(models: dict[str, Any], tmp_path: Path) -> None:
    out = AlkahestSupplement().extract(
        models["base"], models["variant"], 0.9, 2, "refiner", "supplement", prompt=GRAPH, unique_id="9"
    )
    own = files(tmp_path)
    wanted = ak.extract_lora(own["variant"] - own["base"], energy=0.9, rank_max=2, exclude="refiner")
    wanted.save(tmp_path / "own.safetensors")
    made, same = load_file(next((tmp_path / "output").glob("*.safetensors"))), load_file(tmp_path / "own.safetensors")
    assert made.keys() == same.keys()
    assert all(torch.equal(made[key], same[key]) for key in made)
    assert "warning" not in out["result"][0]

"""Expressions written as graphs, read back: the same weights, and nothing that a ComfyUI server would refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import alkahest as ak
from alkahest.errors import AlgebraError, OutputError
from alkahest.recipes.inputs import build

PADS = ("x_pad_token", "cap_pad_token")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, base = tmp_path_factory.mktemp("models"), tiny.state(1)
    for name, state in {"a": tiny.state(2), "v": tiny.near(base, 0.02, 3), "b": base, "c": tiny.state(4)}.items():
        tiny.write(folder / f"{name}.safetensors", tiny.native(state), torch.float32)
    v, b = ak.open(folder / "v.safetensors"), ak.open(folder / "b.safetensors")
    ak.extract_lora((v - b).only("layers"), rank=2).save(folder / "lo.safetensors")
    ak.extract_lora((v - b).only("refiner"), rank=2).save(folder / "lr.safetensors")
    return folder


def opened(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {name: ak.open(folder / f"{name}.safetensors") for name in ("a", "v", "b", "c")}
    return found | {name: ak.open_lora(folder / f"{name}.safetensors") for name in ("lo", "lr")}


CASES: dict[str, Any] = {
    "a file": (lambda m: m["a"], {"UNETLoader"}),
    "a difference": (lambda m: m["a"] + 1.5 * (m["v"] - m["b"]), {"ModelMergeSubtract", "ModelMergeAdd"}),
    "171.1": (lambda m: m["a"] + 171.1 * (m["v"] - m["b"]), {"ModelMergeSubtract", "ModelMergeAdd"}),
    "two differences": (
        lambda m: m["a"] - 25 * ((m["v"] - m["b"]) + 0.1 * (m["c"] - m["b"])),
        {"ModelMergeSubtract", "ModelMergeAdd"},
    ),
    "lerp": (lambda m: ak.lerp(m["a"], m["c"], 0.3), {"ModelMergeSimple"}),
    "lerp past its end": (lambda m: ak.lerp(m["a"], m["c"], 1.5), {"ModelMergeSubtract", "ModelMergeAdd"}),
    "weighted sum": (
        lambda m: ak.weighted_sum([m["a"], m["c"], m["b"]], [0.5, 0.7, -0.2]),
        {"ModelMergeSubtract", "ModelMergeAdd"},
    ),
    "lora": (lambda m: m["a"] + 0.5 * m["lo"] - 0.25 * m["lr"], {"LoraLoaderModelOnly"}),
    "protected": (lambda m: m["a"].protect("refiner") + 171.1 * (m["v"] - m["b"]), {"AlkahestMerge"}),
    "protected lerp": (lambda m: ak.lerp(m["a"].protect("refiner"), m["c"], 0.3), {"AlkahestMerge"}),
    "protected lora": (
        lambda m: m["a"].protect("refiner") + 0.5 * m["lo"] + 2 * m["lr"],
        {"AlkahestMerge", "LoraLoaderModelOnly"},
    ),
    "parts": (
        lambda m: (
            m["a"].protect("refiner") + 3 * (m["v"] - m["b"]).scaled({"layers.0, layers.1": 2, "attention.qkv": 0.5})
        ),
        {"AlkahestMerge"},
    ),
    "only": (lambda m: m["a"] + 3 * (m["v"] - m["b"]).only("layers.0"), {"AlkahestMerge"}),
    "without": (lambda m: m["a"].protect("refiner") + 3 * (m["v"] - m["b"]).without("embedders"), {"AlkahestMerge"}),
    "everywhere twice": (
        lambda m: m["a"].protect("refiner") + 3 * (m["v"] - m["b"]).everywhere().without("layers").everywhere(),
        {"AlkahestMerge"},
    ),
    "everywhere": (lambda m: m["a"].protect("refiner") + 3 * (m["v"] - m["b"]).everywhere(), {"AlkahestMerge"}),
    "a parameter": (lambda m: m["a"] + ak.param("k", 4.0) * (m["v"] - m["b"]), {"ModelMergeSubtract", "ModelMergeAdd"}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_graph_read_back_is_the_same_model(name: str, folder: Path, tmp_path: Path) -> None:
    make, kinds = CASES[name]
    expression = make(opened(folder))
    notes = ak.write_workflow(expression, tmp_path / "graph.json", prefix="x/merged", form="api")
    graph = json.loads((tmp_path / "graph.json").read_text())
    assert {node["class_type"] for node in graph.values()} - {"UNETLoader", "ModelSave"} == kinds - {"UNETLoader"}
    for node in graph.values():  # what the server checks
        assert all(str(link[0]) in graph for link in node["inputs"].values() if isinstance(link, list))
        if node["class_type"] == "ModelMergeSubtract":
            assert abs(node["inputs"]["multiplier"]) <= 10
    (recipe,) = ak.read_workflow(tmp_path / "graph.json")
    assert recipe.saved_as == "x/merged"
    build(replace(recipe, text=recipe.plain), recipe.locate(folder)).save(
        tmp_path / "plain.safetensors", layout="native"
    )
    assert ak.write_workflow(expression, tmp_path / "editor.json", prefix="x/merged") == notes
    assert ak.read_workflow(tmp_path / "editor.json")[0].text == recipe.text
    build(recipe, recipe.locate(folder)).save(tmp_path / "back.safetensors", **recipe.output)
    expression.save(tmp_path / "own.safetensors", layout="native")
    own, back, plain, first = (
        ak.open(path)
        for path in (
            *(tmp_path / f"{one}.safetensors" for one in ("own", "back", "plain")),
            folder / "a.safetensors",
        )
    )
    for key in own:
        wanted = first[key] if key in PADS else own[key]
        torch.testing.assert_close(back[key], wanted, rtol=2e-5, atol=2e-5, msg=key)
        if key not in PADS:
            torch.testing.assert_close(plain[key], wanted, rtol=2e-5, atol=2e-5, msg=key)
    assert (name != "a file" and "lora" not in name) <= any("pad tokens" in note for note in notes)


def test_names_below_comfyuis_folders(tmp_path: Path) -> None:
    (tmp_path / "models/diffusion_models/z").mkdir(parents=True)
    path = tiny.write(tmp_path / "models/diffusion_models/z/a.safetensors", tiny.native(tiny.state(2)))
    ak.write_workflow(ak.open(path), tmp_path / "graph.json", form="api")
    assert json.loads((tmp_path / "graph.json").read_text())["1"]["inputs"]["unet_name"] == "z/a.safetensors"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: m["a"] + ak.ties([m["v"] - m["b"], m["c"] - m["b"]]), AlgebraError, "no ComfyUI node says this"),
        (lambda m: ak.slerp(m["a"], m["c"]), AlgebraError, "no ComfyUI node says this"),
        (lambda m: ak.made_up(1, width=96), AlgebraError, "no ComfyUI node says this"),
        (lambda m: m["a"] + 200 * m["lo"], AlgebraError, "at most 100"),
        (lambda m: m["a"].protect("refiner") + 2e6 * (m["v"] - m["b"]), AlgebraError, "at most 1e"),
        (lambda m: m["v"] - m["b"], AlgebraError, "complete model"),
        (
            lambda m: m["a"] + (m["v"] - m["b"]).only("layers").only("attention"),
            AlgebraError,
            "no ComfyUI node says this",
        ),
    ],
)
def test_what_no_node_says(make: Any, error: Any, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        ak.write_workflow(make(opened(folder)), tmp_path / "graph.json")
    assert not (tmp_path / "graph.json").exists()


def test_a_checkpoint_that_comfyui_cannot_load(folder: Path, tmp_path: Path) -> None:
    split = ak.open(tiny.write(tmp_path / "split.safetensors", tiny.state(1)))
    with pytest.raises(OutputError, match=r"(?s)cannot load this checkpoint.*alkahest convert"):
        ak.write_workflow(split, tmp_path / "graph.json")


def test_the_command(folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from alkahest.cli import app

    done = CliRunner().invoke(
        app,
        [
            "workflow",
            "a + 20 * (v - b)",
            *(part for name in "avb" for part in (f"--{name}", str(folder / f"{name}.safetensors"))),
            "-o",
            str(tmp_path / "graph.json"),
        ],
    )
    assert done.exit_code == 0, done.output
    assert ak.read_recipe(tmp_path / "graph.json")[1].text == "a + ((10 * (v - b)).scaled({'all': 2}) - 2 * (b - b))"
    done = CliRunner().invoke(
        app,
        [
            "workflow",
            "a + k * (v - b)",
            "--k",
            "auto",
            *(part for name in "avb" for part in (f"--{name}", str(folder / f"{name}.safetensors"))),
            "-o",
            str(tmp_path / "auto.json"),
        ],
    )
    assert done.exit_code == 0, done.output
    models = opened(folder)
    k = float(ak.needed_multiplier(models["v"] - models["b"], on=models["a"]))
    (subtract,) = [
        one for one in json.loads((tmp_path / "auto.json").read_text())["nodes"] if one["type"] == "ModelMergeSubtract"
    ]
    assert subtract["widgets_values"][0] == pytest.approx(k, rel=1e-6)

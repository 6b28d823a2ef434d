"""Workflows inside files: pictures as Pillow writes them, checkpoints as ComfyUI saves them, and the command line."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_translate import LOADERS, SAVE, SUBTRACT, node
from typer.testing import CliRunner

import alkahest as ak
from alkahest.cli import app
from alkahest.errors import RecipeError

GRAPH = {**LOADERS, "8": SUBTRACT, "9": node("ModelMergeAdd", model1="#1", model2="#8"), "10": SAVE}
TEXT = "bridge + 1.1 * (variant - base)"


@pytest.fixture
def comfyui(trio: dict[str, Path], tmp_path: Path) -> Path:
    (tmp_path / "ComfyUI/models/diffusion_models").mkdir(parents=True)
    for path in trio.values():
        shutil.copy(path, tmp_path / "ComfyUI/models/diffusion_models")
    return tmp_path / "ComfyUI"


def picture(path: Path, **texts: str) -> Path:
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.new("RGB", (7, 5)).save(path, pnginfo=info)
    return path


def test_a_picture(tmp_path: Path) -> None:
    graph = {**GRAPH, "12": node("KSampler", model="#9", seed=float("nan"))}
    del graph["10"]
    path = picture(tmp_path / "picture.png", parameters="x", prompt=json.dumps(graph), workflow="{}")
    what, recipe = ak.read_recipe(path)
    assert (what, recipe.text) == ("a picture with a workflow in it", TEXT)
    content = path.read_bytes()
    for cut in range(0, len(content), 97):  # cut short anywhere, it is refused or read, and nothing else
        path.write_bytes(content[:cut])
        try:
            ak.read_workflow(path)
        except ak.AlkahestError:
            continue
    path = picture(tmp_path / "odd.png", prompt="{", other="x" * 100)
    with pytest.raises(RecipeError, match="not valid JSON"):
        ak.read_workflow(path)
    with pytest.raises(RecipeError, match="no workflow in this file"):
        ak.read_recipe(picture(tmp_path / "plain.png"))


@pytest.mark.parametrize("kind", [b"iTXt", b"zTXt", b"packed"])
def test_other_text_chunks(kind: bytes, tmp_path: Path) -> None:
    text = json.dumps({**GRAPH, "10": {**SAVE, "_meta": {"title": "ü"}}}, ensure_ascii=kind == b"zTXt").encode()
    rest = {
        b"iTXt": b"\0\0\0\0\0" + text,
        b"zTXt": b"\0\0" + zlib.compress(text),
        b"packed": b"\0\1\0\0\0" + zlib.compress(text),
    }[kind]
    data, name = b"prompt" + rest, b"iTXt" if kind == b"packed" else kind
    chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    path = picture(tmp_path / "picture.png")
    content = path.read_bytes()
    path.write_bytes(content[:33] + chunk + content[33:])  # behind the IHDR chunk
    assert ak.read_recipe(path)[1].text == TEXT


def test_a_checkpoint_that_comfyui_saved(tmp_path: Path) -> None:
    graph = {**GRAPH, "11": node("ModelSave", model="#2", filename_prefix="models/other")}
    metadata = {"prompt": json.dumps(graph), "workflow": json.dumps({"nodes": []})}
    state = tiny.native(tiny.state(1))
    for name, text in (("merged_00001_", TEXT), ("other_00012_", "variant")):
        path = tiny.write(tmp_path / f"{name}.safetensors", state, prefix="model.diffusion_model.", metadata=metadata)
        what, recipe = ak.read_recipe(path)
        assert what == "a checkpoint that ComfyUI saved, with its workflow inside"
        assert recipe.text == text
    path = tiny.write(tmp_path / "renamed.safetensors", state, metadata=metadata)
    with pytest.raises(RecipeError, match="several models"):
        ak.read_recipe(path)


def test_half_a_character_in_a_checkpoints_metadata(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "x.safetensors", tiny.native(tiny.state(1)), metadata={"prompt": "SURROGATE"})
    content = path.read_bytes()
    path.write_bytes(content.replace(b"SURROGATE", b'{"\\ud8"}'.ljust(9)))
    with pytest.raises(ak.AlkahestError):
        ak.read_workflow(path)


def test_recipes_and_merges_on_the_command_line(comfyui: Path, tmp_path: Path) -> None:
    def run(*arguments: Any) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    workflow = tmp_path / "workflow.json"
    workflow.write_text(json.dumps(GRAPH))
    shown = run("recipe", workflow)
    assert shown.exit_code == 0
    assert TEXT in shown.output
    assert "#   variant: diffusion_models/variant.safetensors, loaded by node 2 (UNETLoader)" in shown.output
    names = json.loads(run("recipe", workflow, "--json").stdout)
    assert (names["recipe"], names["node"], names["files"]["base"]) == (TEXT, "10", "diffusion_models/base.safetensors")
    done = run("merge", "--recipe", workflow, "--models-dir", comfyui, "-o", tmp_path / "out.safetensors", "-q")
    assert done.exit_code == 0, done.output
    bridge, variant, base, out = (
        ak.open(path)
        for path in [
            *(comfyui / f"models/diffusion_models/{name}.safetensors" for name in ("bridge", "variant", "base")),
            tmp_path / "out.safetensors",
        ]
    )
    key = "layers.0.attention.to_q.weight"
    wanted = bridge[key].float() + (variant[key].float() * 1.1 + -1.1 * base[key].float())
    assert torch.equal(out[key], wanted.bfloat16())
    # As JSON it has the files' hashes, and is a recipe like any other.
    found = run("recipe", workflow, "--models-dir", comfyui / "models", "--json")
    (tmp_path / "recipe.json").write_text(found.stdout)
    done = run(
        "merge",
        "--recipe",
        tmp_path / "recipe.json",
        *(
            part
            for name in ("bridge", "variant", "base")
            for part in (f"--{name}", comfyui / f"models/diffusion_models/{name}.safetensors")
        ),
        "-o",
        tmp_path / "again.safetensors",
        "-q",
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()
    # A file given by name takes the place of the folder's.
    other = tiny.write(tmp_path / "other.safetensors", tiny.native(tiny.state(9)))
    done = run(
        "merge", "--recipe", workflow, "--models-dir", comfyui, "--base", other, "-o", tmp_path / "o.safetensors", "-q"
    )
    assert done.exit_code == 0
    assert (tmp_path / "o.safetensors").read_bytes() != (tmp_path / "out.safetensors").read_bytes()
    (comfyui / "models/diffusion_models/base.safetensors").unlink()
    done = run("merge", "--recipe", workflow, "--models-dir", comfyui, "-o", tmp_path / "none.safetensors")
    assert done.exit_code == 1
    assert "node 3 (UNETLoader) loads a file that is not here" in done.output
    for wrong in (["bridge", "--models-dir", comfyui], ["--recipe", tmp_path / "recipe.json", "--models-dir", comfyui]):
        done = run("merge", *wrong, "-o", tmp_path / "none.safetensors")
        assert done.exit_code == 1
        assert "workflow" in done.output
    assert not (tmp_path / "none.safetensors").exists()


def test_a_multiplier_that_the_graph_computes_is_computed(comfyui: Path, tmp_path: Path) -> None:
    computes = node("AlkahestMultiplier", variant="#2", base="#3", bridge="#1", basis="relative", target=0)
    merge = node("AlkahestMerge", bridge="#1", variant="#2", base="#3", multiplier="#7", protect="refiner", parts="")
    (tmp_path / "w.json").write_text(json.dumps({**GRAPH, "7": computes, "9": merge}))
    shown = CliRunner().invoke(app, ["recipe", str(tmp_path / "w.json"), "--models-dir", str(comfyui)])
    assert shown.exit_code == 1
    assert "--k_auto auto" in shown.output
    done = CliRunner().invoke(
        app,
        [
            "merge",
            "--recipe",
            str(tmp_path / "w.json"),
            "--models-dir",
            str(comfyui),
            "--k_auto",
            "auto",
            "-o",
            str(tmp_path / "out.safetensors"),
        ],
    )
    assert done.exit_code == 0, done.output
    bridge, variant, base = (
        ak.open(comfyui / f"models/diffusion_models/{name}.safetensors") for name in ("bridge", "variant", "base")
    )
    k = float(ak.needed_multiplier((variant - base).without("refiner, pad_tokens"), on=bridge))
    assert f"{k:.6g}"[:5] in ak.read_recipe(tmp_path / "out.safetensors")[1].text


def test_too_long_and_not_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w.json").write_text("{" * 100_000)
    with pytest.raises(RecipeError, match="not valid JSON"):
        ak.read_recipe(tmp_path / "w.json")
    (tmp_path / "w.json").write_text('{"a": ' + "9" * 5000 + "}")
    with pytest.raises(RecipeError, match="not valid JSON"):
        ak.read_workflow(tmp_path / "w.json")
    monkeypatch.setattr("alkahest.workflow.graph.MAX_BYTES", 10)
    with pytest.raises(RecipeError, match="too long for a workflow"):
        ak.read_workflow(tmp_path / "w.json")

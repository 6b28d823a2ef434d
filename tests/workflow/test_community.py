"""Shapes of other people's graphs: their loaders, LoRA nodes, switches and merges, and what ComfyUI's editor sends."""

from __future__ import annotations

import json
from importlib.metadata import files
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_translate import LOADERS, SAVE, loader, node, recipe, write
from typer.testing import CliRunner

import alkahest as ak
from alkahest.cli import app
from alkahest.errors import RecipeError
from alkahest.recipes.inputs import build
from alkahest.workflow.editor import Absent, Link
from alkahest.workflow.graph import read_graph
from alkahest.workflow.passing import PASSING

LINE = {"on": True, "lora": "l.safetensors", "strength": 0.125, "strengthTwo": None}
CR = node("CR LoRA Stack", switch_1="On", lora_name_1="l.safetensors", model_weight_1=0.5, clip_weight_1=1.0)
CR_OFF = {"switch_2": "Off", "lora_name_2": "m.safetensors", "model_weight_2": 1.0, "switch_3": "On"}
CR["inputs"] |= {**CR_OFF, "lora_name_3": "None"}
RATIOS = dict.fromkeys(("cap_embedder.", "t_embedder.", "x_embedder.", "final_layer.", "layers.0."), 1.0)
SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "LoRA by rgthree": (
        {"9": node("Power Lora Loader (rgthree)", model="#1", lora_1=LINE, lora_2={**LINE, "on": False})},
        "bridge + 0.125 * l",
    ),
    "two LoRAs of a line each": (
        {"9": node("Power Lora Loader (rgthree)", model="#1", lora_10={**LINE, "lora": "m.safetensors"}, lora_2=LINE)},
        "bridge + 0.125 * l + 0.125 * m",
    ),
    "a stack by rgthree": (
        {
            "9": node(
                "Lora Loader Stack (rgthree)",
                model="#1",
                lora_01="l.safetensors",
                strength_01=0.5,
                lora_02="None",
                strength_02=1.0,
            )
        },
        "bridge + 0.5 * l",
    ),
    "a stack by Comfyroll": (
        {"7": CR, "9": node("CR Apply LoRA Stack", model="#1", lora_stack="#7")},
        "bridge + 0.5 * l",
    ),
    "LoRAs by LoraManager": (
        {
            "9": node(
                "Lora Loader (LoraManager)",
                model="#1",
                text="<lora:l:0.5>",
                loras={
                    "__value__": [
                        {"name": "l", "strength": "0.5", "active": True},
                        {"name": "m", "strength": 1, "active": False},
                    ]
                },
            )
        },
        "bridge + 0.5 * l",
    ),
    "a loader by KJ": (
        {"9": node("DiffusionModelLoaderKJ", model_name="kj.safetensors", weight_dtype="default")},
        "kj",
    ),
    "a switch that is on": (
        {"9": node("ComfySwitchNode", switch=True, on_false="#2", on_true="#1")},
        "bridge",
    ),
    "a switch by a primitive, the other branch unreadable": (
        {
            "6": node("PrimitiveBoolean", value=False),
            "7": node("MyPackMagic", model="#2"),
            "9": node("ComfySwitchNode", switch="#6", on_false="#1", on_true="#7"),
        },
        "bridge",
    ),
    "a switched number": (
        {
            "6": node("ComfySwitchNode", switch=True, on_false=1.0, on_true="#5"),
            "5": node("PrimitiveFloat", value=2.5),
            "8": node("ModelMergeSubtract", model1="#2", model2="#3", multiplier="#6"),
            "9": node("ModelMergeAdd", model1="#1", model2="#8"),
        },
        "bridge + 2.5 * (variant - base)",
    ),
    "any switch": (
        {"9": node("Any Switch (rgthree)", any_02="#2", any_01=None)},
        "variant",
    ),
    "sampling nodes in a row": (
        {
            "5": node("APG", model="#1", eta=1.0),
            "6": node("PatchSageAttentionKJ", model="#5", sage_attention="auto"),
            "7": node("Epsilon Scaling", model="#6", scaling_factor=1.005),
            "9": node("ZImageFunControlnet", model="#7", strength=1.0),
        },
        "bridge",
    ),
    "blocks of Z-Image": (
        {"9": node("EasygoingNodes_ModelMergeZImage", model1="#1", model2="#2", **{**RATIOS, "layers.3.": 0.25})},
        "bridge + (variant - bridge).without('pad_tokens').scaled({'all': 0, 'layers.3': 0.75})",
    ),
    "groups of Z-Image Turbo": (
        {"9": node("ModelMergeZIT", model1="#1", model2="#2", early=0.5, refiners=0.0)},
        "bridge + (variant - bridge).without('pad_tokens').scaled({'all': 1, 'layers.0-5': 0.5, 'refiner': 0})",
    ),
    "layers of Z-Image Turbo": (
        {"9": node("ModelMergeZIT", model1="#1", model2="#2", granularity="blocks", early=0.5, layer_7=0.5)},
        "bridge + (variant - bridge).without('pad_tokens').scaled({'all': 1, 'layers.7': 0.5})",
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_graphs_of_other_people(name: str, tmp_path: Path) -> None:
    graph, text = SHAPES[name]
    assert recipe(tmp_path, graph).text == text


REFUSED = {
    "another file laid over": (
        {"9": node("DiffusionModelLoaderKJ", model_name="kj.safetensors", extra_state_dict="x.safetensors")},
        r"node 9 .*lays another file over the model",
    ),
    "a LoRA of the graph's own": ({"9": node("LoraModelLoader", model="#1", lora="#2")}, "trained in the graph"),
    "a strength that is none": (
        {"9": node("Power Lora Loader (rgthree)", model="#1", lora_1={**LINE, "strength": "much"})},
        "the strength of 'l.safetensors' is not a number",
    ),
    "a stack of another's": (
        {"9": node("CR Apply LoRA Stack", model="#1", lora_stack="#2")},
        "what its stack of LoRAs holds is not known",
    ),
    "another family's": ({"9": node("ModelMergeKrea2", model1="#1", model2="#2")}, "another family of models"),
    "a switch of text": ({"9": node("ComfySwitchNode", switch="yes", on_true="#1")}, "neither on nor off"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name: str, tmp_path: Path) -> None:
    graph, message = REFUSED[name]
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, graph)


def test_a_lora_beside_the_weights_is_sampled_with_and_not_saved(tmp_path: Path) -> None:
    bypass = node("LoraLoaderBypassModelOnly", model="#1", lora_name="l.safetensors", strength_model=0.5)
    saved = recipe(tmp_path, {"9": bypass})
    assert saved.text == "bridge"
    assert "applies its LoRA while sampling only" in saved.notes[0]
    graph = {**LOADERS, "9": bypass, "10": node("KSampler", model="#9", seed=1)}
    (sampled,) = ak.read_workflow(write(tmp_path / "graph.json", graph))
    assert sampled.text == "bridge + 0.5 * l"


@pytest.mark.parametrize("strength", ["nan", float("inf"), 10**400])
def test_a_strength_without_a_value_is_refused(strength: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not a number"):
        recipe(tmp_path, {"9": node("Power Lora Loader (rgthree)", model="#1", lora_1={**LINE, "strength": strength})})


def test_a_ratio_beyond_float32_and_pads_are_told(tmp_path: Path) -> None:
    far = recipe(tmp_path, {"9": node("ModelMergeSimple", model1="#1", model2="#2", ratio=1e300)})
    assert far.text == "lerp(bridge, variant, -1e+300)"
    notes = recipe(tmp_path, {"9": node("ModelMergeZIT", model1="#1", model2="#2", other=0.5)}).notes
    assert any("pad tokens stay model1's whatever their ratio" in note for note in notes)


def test_a_stack_that_changes_the_text_encoder_too_says_so(tmp_path: Path) -> None:
    clip = node("CLIPLoader", clip_name="q.safetensors", type="lumina2")
    merged = node("Power Lora Loader (rgthree)", model="#1", clip="#4", lora_1=LINE)
    notes = recipe(tmp_path, {"4": clip, "9": merged}).notes
    assert any("may also change the text encoder" in note for note in notes)


def test_files_that_alkahest_does_not_read_are_said(tmp_path: Path) -> None:
    for kind, field in (("UnetLoaderGGUF", "unet_name"), ("UNETLoader", "unet_name")):
        for name in ("z.gguf", "z.ckpt"):
            notes = recipe(tmp_path, {"9": node(kind, **{field: name})}).notes
            assert any(f"loads {name}: Alkahest reads no .{name[2:]} files" in note for note in notes)


def test_an_output_without_a_model_spoils_no_other(tmp_path: Path) -> None:
    graph = {
        **LOADERS,
        "4": node("KSampler", model="#1", seed=1),
        "5": node("KSamplerAdvanced", noise_seed=1),
        "6": node("KSampler", model="#7", seed=1),
        "7": node("MyPackMagic", model="#1"),
    }
    (found,) = ak.read_workflow(write(tmp_path / "graph.json", graph))
    assert found.text == "bridge"
    assert [note for note in found.notes if "is not read" in note] == [
        "node 5 (KSamplerAdvanced) is not read: node 5 (KSamplerAdvanced): model is missing: nothing is connected to it",
        "node 6 (KSampler) is not read: node 7 (MyPackMagic): what this node does to a model is not known, and node 6 "
        "(KSampler) takes its output",
    ]


def test_the_family_is_never_assumed(tmp_path: Path) -> None:
    unsaid = "no text encoder in the graph says that this is Z-Image: the files do when they are opened"
    for kind, told in (("lumina2", True), (None, False)):
        clip = node("CLIPLoader", clip_name="q.safetensors", **({"type": kind} if kind else {}))
        graph = {**LOADERS, "4": clip, "5": node("CLIPTextEncode", clip="#4", text="")}
        graph["6"] = node("KSampler", model="#1", positive="#5", seed=1)
        (found,) = ak.read_workflow(write(tmp_path / "graph.json", graph))
        assert (unsaid not in found.notes) == told
    graph["4"] = node("CLIPLoaderGGUF", clip_name="q.gguf", type="flux")
    with pytest.raises(RecipeError, match=r"another family of models"):
        ak.read_workflow(write(tmp_path / "graph.json", graph))


def test_an_extraction_is_read(tmp_path: Path) -> None:
    graph = {
        **LOADERS,
        "8": node("ModelMergeSubtract", model1="#2", model2="#3", multiplier=1.0),
        "10": node("LoraSave", model_diff="#8", rank=16, lora_type="standard", bias_diff=True, filename_prefix="l"),
    }
    (found,) = ak.read_workflow(write(tmp_path / "graph.json", graph))
    assert found.text == "extract_lora(variant - base, rank=16)"
    assert found.saved_as == "l"
    with pytest.raises(RecipeError, match="makes a LoRA, not a checkpoint"):
        build(found, {})
    graph["10"]["inputs"]["lora_type"] = "full_diff"
    with pytest.raises(RecipeError, match="only its standard LoRAs"):
        ak.read_workflow(write(tmp_path / "graph.json", graph))


def test_blocks_are_computed_as_their_source_says(tmp_path: Path) -> None:
    """``r * model1 + (1 - r) * model2``, r by the longest name that the weight's name begins with, else the first."""
    (tmp_path / "diffusion_models").mkdir()
    states = {name: tiny.native(tiny.state(seed)) for seed, name in enumerate(("bridge", "variant"))}
    for name, state in states.items():
        tiny.write(tmp_path / f"diffusion_models/{name}.safetensors", state)
    ratios = {"cap_embedder.": 0.9, "layers.0.": 0.25, "layers.1.": 0.5, "context_refiner.1.": 0.0}
    merge = node("ModelMergeZImage", model1="#1", model2="#2", **{**ratios, "cap_pad_token": 0.0})
    found = recipe(tmp_path, {"9": merge, "1": loader("bridge"), "2": loader("variant")})
    build(found, found.locate(tmp_path)).save(tmp_path / "out.safetensors", dtype="fp32", layout="native")
    made = load_file(tmp_path / "out.safetensors")
    assert set(made) == set(states["bridge"])
    for key, value in made.items():
        ratio = max(((len(name), r) for name, r in ratios.items() if key.startswith(name)), default=(0, 1.0))[1]
        ratio = 1.0 if "pad_token" in key else ratio
        one, two = (states[name][key].bfloat16().float() for name in ("bridge", "variant"))
        torch.testing.assert_close(value, ratio * one + (1 - ratio) * two, rtol=1e-5, atol=1e-6, msg=key)


RECORDED = json.loads((Path(__file__).parent / "prompts.json").read_text())["templates"]


def test_widgets_have_the_values_that_comfyuis_editor_sends() -> None:
    """Over the official templates: loaders, LoRAs, samplers and what shifts them, against its ``graphToPrompt``."""
    found = {path.name: path for path in files("comfyui-workflow-templates-json") or []}
    kinds = {kind for rows in RECORDED.values() for kind, _ in rows}
    compared = 0
    for name, rows in RECORDED.items():
        if f"{name}.json" not in found:  # a later edition of the package
            continue
        graph = read_graph(json.loads(Path(str(found[f"{name}.json"].locate())).read_text()))
        mine = [
            (one.kind, {n: v for n, v in one.inputs.items() if not isinstance(v, Link | Absent)})
            for one in graph.values()
            if one.kind in kinds
        ]
        for kind, literals in rows:
            fitting = [one for one in mine if one[0] == kind and literals.items() <= one[1].items()]
            assert fitting, (name, kind, literals)
            mine.remove(fitting[0])
            compared += len(literals)
    assert compared > 1000


def test_an_unknown_node_is_passed_through_where_somebody_says_so(tmp_path: Path) -> None:
    graph = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "bridge.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "SomebodyElses", "inputs": {"model": ["1", 0], "amount": 0.3}},
        "3": {"class_type": "ModelSave", "inputs": {"model": ["2", 0], "filename_prefix": "out"}},
    }
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(graph))
    with pytest.raises(RecipeError, match=r"if it changes no weights: --passing 'SomebodyElses'"):
        ak.read_workflow(path)
    (recipe,) = ak.read_workflow(path, passing=["SomebodyElses"])
    assert recipe.text == "bridge"
    assert recipe.notes == ["node 2 (SomebodyElses) is passed through because you said that it changes no weights"]
    assert ak.read_recipe(path, passing=["SomebodyElses"])[1].text == "bridge"
    said = CliRunner().invoke(app, ["recipe", str(path), "--passing", "SomebodyElses", "--json"])
    found = json.loads(said.stdout)
    assert (found["recipe"], found["plain"], found["notes"]) == ("bridge", "bridge", recipe.notes)
    refused = CliRunner().invoke(app, ["merge", "a", "--passing", "X", "-o", str(tmp_path / "x.safetensors")])
    assert refused.exit_code == 1
    assert "--passing are for a workflow" in refused.output


def test_no_node_is_both_passed_through_and_read() -> None:
    from alkahest.workflow.community import COMMUNITY
    from alkahest.workflow.core_nodes import CORE
    from alkahest.workflow.own_nodes import OWN

    assert not PASSING & (COMMUNITY.keys() | CORE.keys() | OWN.keys())
    assert len(COMMUNITY) + len(CORE) + len(OWN) == len({**COMMUNITY, **CORE, **OWN})
    assert SAVE["class_type"] not in PASSING

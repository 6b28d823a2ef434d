"""Graphs as ComfyUI evaluates them (float32, in the order of its patches), against the recipes read from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import alkahest as ak
from alkahest.errors import AlkahestError, NonFiniteError, RecipeError
from alkahest.recipes.inputs import build, output_for

PADS = ("x_pad_token", "cap_pad_token")
REFINERS = ("noise_refiner", "context_refiner")


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """Inputs such as ``"#4"`` are links to output 0 of node 4."""
    return {
        "class_type": kind,
        "inputs": {
            name: [value[1:], 0] if isinstance(value, str) and value.startswith("#") else value
            for name, value in inputs.items()
        },
    }


def loader(name: str) -> dict[str, Any]:
    return node("UNETLoader", unet_name=f"{name}.safetensors", weight_dtype="default")


LOADERS = {"1": loader("bridge"), "2": loader("variant"), "3": loader("base")}
SAVE = node("ModelSave", model="#9", filename_prefix="merged")


def write(path: Path, graph: dict[str, Any]) -> Path:
    path.write_text(json.dumps(graph))
    return path


def recipe(tmp_path: Path, graph: dict[str, Any], **more: Any) -> Any:
    (found,) = ak.read_workflow(write(tmp_path / "graph.json", {**LOADERS, "10": SAVE, **graph, **more}))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comfyui") / "models"
    (folder / "diffusion_models/z").mkdir(parents=True)
    base = tiny.state(1)
    for name, state in {"bridge": tiny.state(2), "variant": tiny.near(base, 0.02, 3), "base": base}.items():
        tiny.write(folder / f"diffusion_models/{name}.safetensors", tiny.native(state))
    return folder


# Every graph with the arithmetic that ComfyUI's patches come to; D of V, B and A are float32 and contiguous.
def subtract_add(a: Any, v: Any, b: Any) -> Any:
    return a + (v * 1.1 + -1.1 * b)


def add_to_difference(a: Any, v: Any, b: Any) -> Any:
    return (v * 1.1 + -1.1 * b) + a


def sums(a: Any, v: Any, b: Any) -> Any:
    return a + v + -1.0 * b


def two(a: Any, v: Any, b: Any) -> Any:
    return a + ((v * 1.1 + -1.1 * b) + (a * -0.3 + 0.3 * b))


def twice(a: Any, v: Any, b: Any) -> Any:
    return a + ((v * 10.0 + -10.0 * b) * 1.711 + -1.711 * (b * 1.0 + -1.0 * b))


def simple(a: Any, v: Any, b: Any) -> Any:
    return a * 0.3 + (1 - 0.3) * v


def simple_of_differences(a: Any, v: Any, b: Any) -> Any:
    return a + ((v - b) * 0.25 + 0.75 * (a - b))


SUBTRACT = node("ModelMergeSubtract", model1="#2", model2="#3", multiplier=1.1)
CASES: dict[str, tuple[dict[str, Any], str, Any]] = {
    "subtract, add": (
        {"8": SUBTRACT, "9": node("ModelMergeAdd", model1="#1", model2="#8")},
        "bridge + 1.1 * (variant - base)",
        subtract_add,
    ),
    "add to the difference": (
        {"8": SUBTRACT, "9": node("ModelMergeAdd", model1="#8", model2="#1")},
        "weighted_sum([variant, base, bridge], [1.1, -1.1, 1])",
        add_to_difference,
    ),
    "sum, then subtract": (
        {
            "8": node("ModelMergeAdd", model1="#1", model2="#2"),
            "9": node("ModelMergeSubtract", model1="#8", model2="#3", multiplier=1),
        },
        "weighted_sum([bridge, variant, base], [1, 1, -1])",
        sums,
    ),
    "two differences": (
        {
            "6": SUBTRACT,
            "7": node("ModelMergeSubtract", model1="#1", model2="#3", multiplier=-0.3),
            "8": node("ModelMergeAdd", model1="#6", model2="#7"),
            "9": node("ModelMergeAdd", model1="#1", model2="#8"),
        },
        "bridge + (1.1 * (variant - base) - 0.3 * (bridge - base))",
        two,
    ),
    "multiplied twice": (
        {
            "6": node("ModelMergeSubtract", model1="#2", model2="#3", multiplier=10.0),
            "7": node("ModelMergeSubtract", model1="#3", model2="#3", multiplier=1.0),
            "8": node("ModelMergeSubtract", model1="#6", model2="#7", multiplier=1.711),
            "9": node("ModelMergeAdd", model1="#1", model2="#8"),
        },
        "bridge + ((10 * (variant - base)).scaled({'all': 1.711}) - 1.711 * (base - base))",
        twice,
    ),
    "simple": (
        {"9": node("ModelMergeSimple", model1="#1", model2="#2", ratio=0.3)},
        "lerp(bridge, variant, 0.7)",
        simple,
    ),
    "blocks": (
        {"9": node("ModelMergeBlocks", model1="#1", model2="#2", input=0.3, middle=0.5, out=0.9)},
        "lerp(bridge, variant, 0.7)",
        simple,
    ),
    "simple of differences": (
        {
            "5": node("ModelMergeSubtract", model1="#2", model2="#3", multiplier=1.0),
            "6": node("ModelMergeSubtract", model1="#1", model2="#3", multiplier=1.0),
            "8": node("ModelMergeSimple", model1="#5", model2="#6", ratio=0.25),
            "9": node("ModelMergeAdd", model1="#1", model2="#8"),
        },
        "bridge + (0.25 * (variant - base) + 0.75 * (bridge - base))",
        simple_of_differences,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_has_the_bits_of_comfyuis_arithmetic(name: str, models: Path, tmp_path: Path) -> None:
    graph, text, arithmetic = CASES[name]
    found = recipe(tmp_path, graph)
    assert found.text == text
    assert found.output == {"comfy_compatible": True, "layout": "native"}
    assert (found.node, found.saved_as) == ("10", "merged")
    weights = build(found, found.locate(models))
    assert build(found, found.locate(models.parent)).text() == weights.text()
    weights.save(tmp_path / "out.safetensors", **output_for(found, weights))
    bridge, variant, base, out = (
        ak.open(path)
        for path in [
            *(models / f"diffusion_models/{one}.safetensors" for one in ("bridge", "variant", "base")),
            tmp_path / "out.safetensors",
        ]
    )
    leads = variant if name == "add to the difference" else bridge
    for key in out:
        wanted = arithmetic(*(one[key].float() for one in (bridge, variant, base))).bfloat16()
        wanted = leads[key] if key in PADS else wanted
        assert torch.equal(out[key].view(torch.int16), wanted.view(torch.int16)), key


OURS: dict[str, tuple[dict[str, Any], str]] = {
    "merge": (
        {
            "9": node(
                "AlkahestMerge", bridge="#1", variant="#2", base="#3", multiplier=171.1, protect="refiner", parts=""
            )
        },
        "bridge + 171.1 * (variant - base).without('refiner, pad_tokens')",
    ),
    "nothing protected": (
        {"9": node("AlkahestMerge", bridge="#1", variant="#2", base="#3", multiplier=2, protect="", parts=" ")},
        "bridge + 2 * (variant - base).without('pad_tokens')",
    ),
    "parts": (
        {
            "9": node(
                "AlkahestMerge",
                bridge="#1",
                variant="#2",
                base="#3",
                multiplier=4,
                protect="refiner",
                parts="layers.0: 1.5, embedders: 0",
            )
        },
        "bridge + 4 * (variant - base).without('refiner, pad_tokens').scaled({'layers.0': 1.5, 'embedders': 0})",
    ),
    "subtract, core add": (
        {
            "8": node("AlkahestSubtract", model1="#2", model2="#3", multiplier=12.5, keep_refiner=True),
            "9": node("ModelMergeAdd", model1="#1", model2="#8"),
        },
        "bridge + 12.5 * (variant - base).without('refiner, pad_tokens')",
    ),
    "core subtract, add": (
        {
            "8": node("ModelMergeSubtract", model1="#2", model2="#3", multiplier=10.0),
            "9": node("AlkahestAdd", model1="#1", model2="#8", multiplier=17.11, keep_refiner=True),
        },
        "bridge + 17.11 * (10 * (variant - base)).without('refiner')",
    ),
    "subtract, add": (
        {
            "8": node("AlkahestSubtract", model1="#2", model2="#3", multiplier=10.0, keep_refiner=False),
            "9": node("AlkahestAdd", model1="#1", model2="#8", multiplier=17.11, keep_refiner=False),
        },
        "bridge + (10 * (variant - base).without('pad_tokens')).scaled({'all': 17.11})",
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_our_nodes_in_a_recipe(name: str, models: Path, tmp_path: Path) -> None:
    graph, text = OURS[name]
    found = recipe(tmp_path, graph)
    assert found.text == text
    weights = build(found, found.locate(models))
    weights.save(tmp_path / "out.safetensors", **found.output)
    bridge, out = ak.open(models / "diffusion_models/bridge.safetensors"), ak.open(tmp_path / "out.safetensors")
    for key in out:
        if key in PADS or (key.startswith(REFINERS) and "without('refiner" in text):
            assert torch.equal(out[key].view(torch.int16), bridge[key].view(torch.int16)), key
    assert not torch.equal(out["layers.1.attention.to_q.weight"], bridge["layers.1.attention.to_q.weight"])


def test_protection_does_not_reach_what_later_nodes_do(models: Path, tmp_path: Path) -> None:
    graph = OURS["merge"][0] | {
        "9": {**OURS["merge"][0]["9"]},
        "11": node("ModelMergeSimple", model1="#9", model2="#2", ratio=0.5),
    }
    found = recipe(tmp_path, graph, **{"10": node("ModelSave", model="#11", filename_prefix="merged")})
    build(found, found.locate(models)).save(tmp_path / "out.safetensors", **found.output)
    key = "noise_refiner.0.attention.to_q.weight"
    bridge, variant, out = (
        ak.open(path)[key].float()
        for path in (
            models / "diffusion_models/bridge.safetensors",
            models / "diffusion_models/variant.safetensors",
            tmp_path / "out.safetensors",
        )
    )
    assert torch.equal(out, (bridge * 0.5 + 0.5 * variant).bfloat16().float())


def test_a_multiplier_that_the_graph_computes(models: Path, tmp_path: Path) -> None:
    computes = node("AlkahestMultiplier", variant="#2", base="#3", bridge="#1", basis="relative", target=0)
    merge = node("AlkahestMerge", bridge="#1", variant="#2", base="#3", multiplier="#7", protect="refiner", parts="")
    found = recipe(tmp_path, {"7": computes, "9": merge})
    assert found.text == "bridge + k_auto * (variant - base).without('refiner, pad_tokens')"
    assert found.computed == ("k_auto",)
    assert any("--k_auto auto" in note for note in found.notes)
    build(found, {**found.locate(models), "k_auto": 3.0})
    with pytest.raises(RecipeError, match="nothing is given for 'k_auto'"):
        build(found, found.locate(models))
    found = recipe(tmp_path, {"7": computes, "9": {**merge, "inputs": {**merge["inputs"], "parts": "layers: 2"}}})
    assert found.text == "bridge + k_auto * (variant - base).without('refiner, pad_tokens').scaled({'layers': 2})"


def test_a_negative_multiple_of_a_difference_of_differences(models: Path, tmp_path: Path) -> None:
    one, two = (node("ModelMergeSubtract", model1=first, model2="#3", multiplier=1) for first in ("#2", "#1"))
    for factor in (-2.0, -1.0):
        graph = {
            "5": one,
            "6": two,
            "8": node("ModelMergeSubtract", model1="#5", model2="#6", multiplier=factor),
            "9": node("ModelMergeAdd", model1="#1", model2="#8"),
        }
        found = recipe(tmp_path, graph)
        build(found, found.locate(models)).save(tmp_path / "out.safetensors", **found.output)
        key = "layers.0.attention.to_q.weight"
        a, v, b = (
            ak.open(models / f"diffusion_models/{name}.safetensors")[key].float()
            for name in ("bridge", "variant", "base")
        )
        wanted = a + ((v - b) * factor + -factor * (a - b))
        assert torch.equal(ak.open(tmp_path / "out.safetensors")[key], wanted.bfloat16()), found.text


def test_loras(models: Path, tmp_path: Path) -> None:
    (models / "loras").mkdir(exist_ok=True)
    base, variant = (ak.open(models / f"diffusion_models/{name}.safetensors") for name in ("base", "variant"))
    ak.extract_lora((variant - base).only("layers"), rank=2).save(models / "loras/style.safetensors")
    graph = {
        "7": node(
            "LoraLoader",
            model="#1",
            clip=["6", 1],
            lora_name="style.safetensors",
            strength_model=-0.5,
            strength_clip=1.0,
        ),
        "8": node("LoraLoaderModelOnly", model="#7", lora_name="style.safetensors", strength_model=0.0),
        "9": node("ModelSamplingAuraFlow", model="#8", shift=10.0),
    }
    found = recipe(tmp_path, graph)
    assert found.text == "bridge - 0.5 * style"
    assert [str(file) for file in found.files.values()] == [
        "diffusion_models/bridge.safetensors",
        "loras/style.safetensors",
    ]
    assert any("shift = 10" in note for note in found.notes)
    assert any("text encoder" in note for note in found.notes)
    build(found, found.locate(models)).save(tmp_path / "out.safetensors", **found.output)
    (
        ak.open(models / "diffusion_models/bridge.safetensors") - 0.5 * ak.open_lora(models / "loras/style.safetensors")
    ).save(tmp_path / "own.safetensors", comfy_compatible=True)
    own, out = ak.open(tmp_path / "own.safetensors"), ak.open(tmp_path / "out.safetensors")
    assert all(torch.equal(own[key], out[key]) for key in own)


def test_several_outputs_are_several_recipes(tmp_path: Path) -> None:
    graph = {
        **LOADERS,
        "8": SUBTRACT,
        "9": node("ModelMergeAdd", model1="#1", model2="#8"),
        "10": SAVE,
        "11": node("ModelSave", model="#2", filename_prefix="other"),
        "12": node("KSampler", model="#3", seed=1),
    }
    path = write(tmp_path / "graph.json", graph)
    assert [(one.node, one.text) for one in ak.read_workflow(path)] == [
        ("10", "bridge + 1.1 * (variant - base)"),
        ("11", "variant"),
    ]
    with pytest.raises(RecipeError, match=r"(?s)makes several models.*10 \(merged\), 11 \(other\)"):
        ak.read_recipe(path)
    what, found = ak.read_recipe(path, node="11")
    assert (what, found.text) == ("a ComfyUI workflow", "variant")
    with pytest.raises(RecipeError, match="no node 3 saves"):
        ak.read_recipe(path, node="3")
    graph["9"] = node("MyPackMagic", model="#1")  # what one node saves is still told when another's cannot be
    (other,) = ak.read_workflow(write(path, graph))
    assert other.text == "variant"
    assert "node 10 (ModelSave) is not read: node 9 (MyPackMagic)" in other.notes[-1]
    with pytest.raises(RecipeError, match="MyPackMagic"):
        ak.read_recipe(path, node="10")
    graph = {
        **LOADERS,
        "12": node("KSampler", model="#3", seed=1),
        "13": node("KSamplerAdvanced", model="#3"),
        "14": node("BasicGuider", model="#2"),
    }
    assert [one.text for one in ak.read_workflow(write(path, graph))] == ["base", "variant"]


def test_all_in_one_files(tmp_path: Path) -> None:
    check = node("CheckpointLoaderSimple", ckpt_name="aio.safetensors")
    save = {
        "class_type": "CheckpointSave",
        "inputs": {"model": ["9", 0], "clip": ["4", 1], "vae": ["5", 0], "filename_prefix": "x"},
    }
    graph = {
        "4": check,
        "5": node("VAELoader", vae_name="ae"),
        "9": node("ModelMergeSimple", model1="#4", model2="#2", ratio=0.5),
    }
    found = recipe(tmp_path, graph, **{"10": save})
    assert found.output == {"comfy_compatible": True}
    assert str(found.files["aio"]) == "checkpoints/aio.safetensors"
    save["inputs"]["clip"] = ["11", 1]  # of another file than the one that leads
    other = recipe(tmp_path, {**graph, "11": node("CheckpointLoaderSimple", ckpt_name="b.safetensors")}, **{"10": save})
    assert any("saves a clip from node 11" in note for note in other.notes)
    assert [note for note in found.notes if "node 10" in note] == [
        "node 10 (CheckpointSave) also saves a vae from node 5 (VAELoader), which a recipe does not carry"
    ]


def test_names_of_files_become_names_of_recipes(tmp_path: Path) -> None:
    names = [
        "a/model.safetensors",
        "b/model.safetensors",
        "lambda.safetensors",
        "模型 v1.safetensors",
        "12².safetensors",
        "ﬁne.safetensors",
        "k_auto.safetensors",
    ]
    graph: dict[str, Any] = {}
    for number, name in enumerate(names):
        graph[f"l{number}"] = node("UNETLoader", unet_name=name, weight_dtype="default")
        graph[f"m{number}"] = node(
            "ModelMergeSimple", model1=f"#{f'm{number - 1}' if number else 'l0'}", model2=f"#l{number}", ratio=0.5
        )
    found = recipe(tmp_path, graph, **{"10": node("ModelSave", model=f"#m{len(names) - 1}", filename_prefix="")})
    assert len(found.files) == len(names)
    given = {name: ak.made_up(1, width=96, seed=number) for number, name in enumerate(found.files)}
    from alkahest.recipes.text import parse

    parse(found.text, given)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a loop": (
        {"8": node("ModelMergeAdd", model1="#9", model2="#2"), "9": node("ModelMergeAdd", model1="#8", model2="#3")},
        r"(?s)in a circle.*9 -> 8 -> 9",
    ),
    "an unknown node between": (
        {"8": node("MyPackMagic", model="#1"), "9": node("ModelMergeAdd", model1="#8", model2="#2")},
        r"node 8 \(MyPackMagic\): what this node does",
    ),
    "another family's node": (
        {"9": node("ModelMergeFlux1", model1="#1", model2="#2")},
        r"node 9 \(ModelMergeFlux1\): .*another family",
    ),
    "a difference saved": ({"9": SUBTRACT}, "the model that arrives is a difference"),
    "a sum saved": (
        {"9": node("ModelMergeAdd", model1="#1", model2="#2")},
        "a sum of models, whose factors do not add up to 1",
    ),
    "a sum with a LoRA": (
        {
            "8": node("ModelMergeAdd", model1="#1", model2="#2"),
            "9": node("LoraLoaderModelOnly", model="#8", lora_name="x", strength_model=1),
        },
        "node 9 .*a LoRA on a sum",
    ),
    "a missing input": ({"9": node("ModelMergeAdd", model1="#1")}, r"node 9 \(ModelMergeAdd\): model2 is missing"),
    "a link to nowhere": (
        {"9": node("ModelMergeAdd", model1="#1", model2="#77")},
        "model2 comes from node 77, which does not exist",
    ),
    "a number that is none": (
        {"9": node("ModelMergeSimple", model1="#1", model2="#2", ratio="half")},
        "ratio is not a number",
    ),
    "a number beyond all": (
        {"9": node("ModelMergeSimple", model1="#1", model2="#2", ratio=10**400)},
        "ratio is not a number",
    ),
    "a number that is infinite": (
        {"9": node("ModelMergeSimple", model1="#1", model2="#2", ratio=1e999)},
        "ratio is not a number",
    ),
    "a computed number": (
        {"7": node("MathExpression"), "9": node("ModelMergeSimple", model1="#1", model2="#2", ratio="#7")},
        r"(?s)ratio is computed while the graph runs.*MathExpression",
    ),
    "a name that is none": (
        {"1": node("UNETLoader", unet_name=7), "9": node("ModelMergeAdd", model1="#1", model2="#2")},
        "unet_name is not a file's name",
    ),
    "parts that are none": (
        {"9": node("AlkahestMerge", bridge="#1", variant="#2", base="#3", multiplier=1, protect="", parts="layers")},
        "(?s)parts.*cannot be read",
    ),
    "a text encoder as a model": (
        {
            "4": node("CheckpointLoaderSimple", ckpt_name="a"),
            "9": {"class_type": "ModelMergeAdd", "inputs": {"model1": ["4", 1], "model2": ["2", 0]}},
        },
        "takes output 1 of node 4",
    ),
    "a group node": ({"9": node("workflow>mine", model="#1")}, "(?s)what this node does.*unpack it"),
    "adding a model": (
        {"9": node("AlkahestAdd", model1="#1", model2="#2", multiplier=1)},
        "adds a difference to a model",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_said_is_named(name: str, tmp_path: Path) -> None:
    graph, message = BAD[name]
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, graph)


@pytest.mark.parametrize(
    "graph",
    [
        {
            "5": node("DualCLIPLoader", clip_name1="a", clip_name2="b", type="flux"),
            "6": node("CLIPTextEncode", clip="#5", text="x"),
            "7": node("KSampler", model="#1", positive="#6"),
        },
        {
            "5": node("CLIPLoader", clip_name="a", type="wan"),
            "6": node("CLIPTextEncode", clip="#5", text="x"),
            "7": node("KSampler", model="#1", positive="#6"),
        },
    ],
    ids=["dual", "wan"],
)
def test_a_workflow_of_another_family(graph: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"node 5 .*for another family of models"):
        ak.read_workflow(write(tmp_path / "graph.json", {**LOADERS, **graph}))


def test_chains_and_diamonds_without_end(tmp_path: Path) -> None:
    chain = {f"c{n}": node("ModelSamplingAuraFlow", model=f"#c{n - 1}" if n else "#1", shift=3) for n in range(3000)}
    with pytest.raises(RecipeError, match="too deep"):
        recipe(tmp_path, chain, **{"10": node("ModelSave", model="#c2999", filename_prefix="")})
    diamond = {
        f"d{n}": node(
            "ModelMergeSimple", model1=f"#d{n - 1}" if n else "#1", model2=f"#d{n - 1}" if n else "#2", ratio=0.5
        )
        for n in range(60)
    }
    with pytest.raises(RecipeError, match="too long"):
        recipe(tmp_path, diamond, **{"10": node("ModelSave", model="#d59", filename_prefix="")})


def test_files_that_are_not_here_or_not_ours(models: Path, tmp_path: Path) -> None:
    def locate(name: str) -> Any:
        graph = {"1": loader(name), "9": node("ModelMergeSimple", model1="#1", model2="#2", ratio=0.5)}
        return recipe(tmp_path, graph).locate(models)

    with pytest.raises(AlkahestError, match=r"(?s)node 1 .*not here.*did you mean 'bridge.safetensors'"):
        locate("bridgee")
    with pytest.raises(AlkahestError, match="the folder of models does not exist"):
        recipe(tmp_path, {"9": loader("base")}).locate(tmp_path / "nowhere")
    for name in (
        "../../base",
        "/etc/passwd",
        "C:\\models\\base",
        "z\\..\\..\\base",
        "\\\\server\\share\\x",
        "a//b",
        "./base",
        "a\0b",
    ):
        with pytest.raises(RecipeError, match="outside the models folder"):
            locate(name)
    with pytest.raises(AlkahestError, match="not here"):
        locate("x" * 300)
    tiny.write(models / "diffusion_models/z/deep.safetensors", tiny.native(tiny.state(1)))
    assert locate("z\\deep")["deep"] == models / "diffusion_models/z/deep.safetensors"


def test_nan_and_quantised_models(models: Path, tmp_path: Path) -> None:
    found = recipe(tmp_path, CASES["subtract, add"][0])
    state = tiny.native(tiny.state(1))
    state["layers.0.ffn_norm1.weight"] = torch.full((96,), float("nan"))
    bad = tiny.write(tmp_path / "nan.safetensors", state)
    weights = build(found, {**found.locate(models), "base": bad})
    with pytest.raises(NonFiniteError, match="holds NaN"):
        weights.save(tmp_path / "out.safetensors", **output_for(found, weights))
    quantised = tiny.write_scaled(tmp_path / "q.safetensors", tiny.native(tiny.state(1)), "comfy_quant")
    weights = build(found, {**found.locate(models), "base": quantised})
    assert output_for(found, weights) == {"layout": "native"}
    weights.save(tmp_path / "out.safetensors", **output_for(found, weights))


READABLE = {
    "bridge + 171.1 * (variant - base)": {
        "5": node("ModelMergeSubtract", model1="#2", model2="#3", multiplier=10.0),
        "6": node("ModelMergeSubtract", model1="#3", model2="#3", multiplier=1.0),
        "7": node("ModelMergeSubtract", model1="#5", model2="#6", multiplier=10.0),
        "8": node("ModelMergeSubtract", model1="#7", model2="#6", multiplier=1.711),
        "9": node("ModelMergeAdd", model1="#1", model2="#8"),
    },
    "bridge + 1.1 * (variant - base)": {
        "8": SUBTRACT,
        "9": node("ModelMergeAdd", model1="#8", model2="#1"),
    },
    "bridge + 2.2 * (variant - base)": {
        "8": SUBTRACT,
        "7": node("ModelMergeAdd", model1="#1", model2="#8"),
        "9": node("ModelMergeAdd", model1="#7", model2="#8"),
    },
    "bridge - 1.1 * (variant - base)": {
        "8": node("ModelMergeSubtract", model1="#2", model2="#3", multiplier=-1.1),
        "9": node("ModelMergeAdd", model1="#1", model2="#8"),
    },
    "bridge + 171.1 * (variant - base).without('pad_tokens')": {
        "8": node("AlkahestSubtract", model1="#2", model2="#3", multiplier=10.0, keep_refiner=False),
        "9": node("AlkahestAdd", model1="#1", model2="#8", multiplier=17.11, keep_refiner=False),
    },
    "lerp(bridge, variant, 0.3333)": {"9": node("ModelMergeSimple", model1="#1", model2="#2", ratio=0.6667)},
}


@pytest.mark.parametrize("text", READABLE)
def test_a_recipe_is_printed_as_a_person_would_write_it(text: str, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from alkahest.cli import app

    found = recipe(tmp_path, READABLE[text])
    assert found.plain == text
    printed = CliRunner().invoke(app, ["recipe", str(tmp_path / "graph.json")]).output.splitlines()
    assert printed[1] == text
    assert (f"#   in ComfyUI's order, bit for bit: {found.text}" in printed) == (found.text != text)

"""The nodes in a real ComfyUI, and recipes against what it saves: real-width models, every value compared.

Run with COMFYUI_PATH=/path/to/ComfyUI (0.14 or later), and COMFYUI_PYTHON if its Python lies elsewhere. Elsewhere
these are reported as not run: nothing stands in for ComfyUI here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import alkahest as ak
from alkahest.engine.events import result_of
from alkahest.recipes.inputs import build, output_for
from alkahest.recipes.verify import stream_verdict

pytestmark = pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="not run: COMFYUI_PATH names no ComfyUI")
PREFIX = "model.diffusion_model."


OTHERS = """
class SomebodyElses:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "change", "others"

    def change(self, model):
        changed = model.clone()
        keys = [key for key in model.get_key_patches("diffusion_model.layers.") if key.endswith(".w1.weight")]
        changed.add_patches({key: ("diff", (model.get_key_patches()[key][0][0],)) for key in keys}, 0.25)
        return (changed,)


NODE_CLASS_MAPPINGS = {"SomebodyElses": SomebodyElses}
"""


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from comfyui import started

    base = tmp_path_factory.mktemp("comfyui")
    (base / "models/diffusion_models/z").mkdir(parents=True)
    places = {name: base / f"models/diffusion_models/{name}.safetensors" for name in ("bridge", "z/variant", "base")}
    ak.made_up(layers=1, seed=1).save(places["bridge"])
    ak.made_up(layers=1, seed=2, delta=0.02).save(places["z/variant"])
    ak.made_up(layers=1, seed=2).save(places["base"])
    (base / "custom_nodes/others").mkdir(parents=True)
    (base / "custom_nodes/others/__init__.py").write_text(OTHERS)
    with started(base, "--bf16-unet") as server:
        yield server


def loader(name: str) -> dict[str, Any]:
    return {"class_type": "UNETLoader", "inputs": {"unet_name": f"{name}.safetensors", "weight_dtype": "default"}}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {
        "class_type": kind,
        "inputs": {
            name: [value, 0] if isinstance(value, str) and value.startswith("n") else value
            for name, value in inputs.items()
        },
    }


LOADERS = {"n1": loader("bridge"), "n2": loader("z/variant"), "n3": loader("base")}
SUBTRACT = node("ModelMergeSubtract", model1="n2", model2="n3", multiplier=1.1)
SAVE = {"nsave": node("ModelSave", model="nout", filename_prefix="out/core")}
GRAPHS: dict[str, dict[str, Any]] = {
    "subtract, add": {"nd": SUBTRACT, "nout": node("ModelMergeAdd", model1="n1", model2="nd")},
    "add to the difference": {"nd": SUBTRACT, "nout": node("ModelMergeAdd", model1="nd", model2="n1")},
    "simple": {"nout": node("ModelMergeSimple", model1="n1", model2="n2", ratio=0.3)},
    "blocks": {"nout": node("ModelMergeBlocks", model1="n1", model2="n2", input=0.7, middle=0.1, out=0.2)},
    "two differences": {
        "nd": SUBTRACT,
        "ne": node("ModelMergeSubtract", model1="n1", model2="n3", multiplier=-0.3),
        "nf": node("ModelMergeAdd", model1="nd", model2="ne"),
        "nout": node("ModelMergeAdd", model1="n1", model2="nf"),
    },
    "our merge": {
        "nout": node(
            "AlkahestMerge", bridge="n1", variant="n2", base="n3", multiplier=171.1, protect="refiner", parts=""
        )
    },
    "our merge, by part": {
        "nout": node(
            "AlkahestMerge",
            bridge="n1",
            variant="n2",
            base="n3",
            multiplier=17.3,
            protect="refiner, embedders",
            parts="layers.0: 1.7, attention.qkv: 0.3",
        ),
    },
    "our subtract, core add": {
        "nd": node("AlkahestSubtract", model1="n2", model2="n3", multiplier=12.3, keep_refiner=True),
        "nout": node("ModelMergeAdd", model1="n1", model2="nd"),
    },
    "core subtract, our add": {
        "nd": node("ModelMergeSubtract", model1="n2", model2="n3", multiplier=10.0),
        "nout": node("AlkahestAdd", model1="n1", model2="nd", multiplier=17.11, keep_refiner=True),
    },
    "our subtract, our add": {
        "nd": node("AlkahestSubtract", model1="n2", model2="n3", multiplier=10.0, keep_refiner=False),
        "nout": node("AlkahestAdd", model1="n1", model2="nd", multiplier=17.11, keep_refiner=False),
    },
}


def differing(one: Path, other: Path) -> dict[str, int]:
    """Values that differ in their bits, by tensor; names are compared without ComfyUI's prefix."""
    found = {}
    with safe_open(one, "pt") as a, safe_open(other, "pt") as b:
        names = {name.removeprefix(PREFIX): name for name in a.keys()}  # noqa: SIM118
        others = {name.removeprefix(PREFIX): name for name in b.keys()}  # noqa: SIM118
        assert names.keys() == others.keys()
        for name in names:
            left, right = a.get_tensor(names[name]), b.get_tensor(others[name])
            assert left.dtype == right.dtype == torch.bfloat16, name
            if count := int((left.view(torch.int16) != right.view(torch.int16)).sum()):
                found[name] = count
    return found


def merged(comfyui: Any, path: Path, to: Path) -> str:
    """Run the recipe in a file that ComfyUI saved; its text."""
    what, recipe = ak.read_recipe(path)
    assert what.startswith("a checkpoint that ComfyUI saved")
    weights = build(recipe, recipe.locate(comfyui.models))  # type: ignore[attr-defined]
    weights.save(to, **output_for(recipe, weights))
    return str(recipe.text)


@pytest.mark.parametrize("name", GRAPHS)
def test_what_comfyui_saves_is_what_its_recipe_gives(comfyui: Any, tmp_path: Path, name: str) -> None:
    comfyui.run({**LOADERS, **GRAPHS[name], **SAVE})
    path = comfyui.saved("out/core")
    text = merged(comfyui, path, tmp_path / "recipe.safetensors")
    assert differing(path, tmp_path / "recipe.safetensors") == {}, text
    with (
        safe_open(path, "pt") as file,
        safe_open(comfyui.models / "diffusion_models/bridge.safetensors", "pt") as bridge,
    ):
        kept = "noise_refiner.0.attention.qkv.weight"
        same = torch.equal(file.get_tensor(PREFIX + kept), bridge.get_tensor(kept))
        leads = torch.equal(file.get_tensor(f"{PREFIX}x_pad_token"), bridge.get_tensor("x_pad_token"))
    assert leads == (name != "add to the difference")
    assert same == (name.startswith("our merge") or name in ("our subtract, core add", "core subtract, our add"))
    path.unlink()


def test_the_protected_pads_of_our_merge_are_those_of_our_own_expression(comfyui: Any, tmp_path: Path) -> None:
    comfyui.run({**LOADERS, **GRAPHS["our merge"], **SAVE})
    bridge, variant, base = (
        ak.open(comfyui.models / f"diffusion_models/{name}.safetensors") for name in ("bridge", "z/variant", "base")
    )
    (bridge.protect("refiner, pad_tokens") + 171.1 * (variant - base)).save(tmp_path / "own.safetensors")
    assert differing(comfyui.saved("out/core"), tmp_path / "own.safetensors") == {}
    comfyui.saved("out/core").unlink()


def test_recipe_save_streams_what_the_graph_says_and_verifies(comfyui: Any, tmp_path: Path) -> None:
    graph = {
        **LOADERS,
        "nk": node("AlkahestMultiplier", variant="n2", base="n3", bridge="n1", basis="relative", target=0.05),
        "nout": {
            "class_type": "AlkahestMerge",
            "inputs": {
                "bridge": ["n1", 0],
                "variant": ["n2", 0],
                "base": ["n3", 0],
                "multiplier": ["nk", 0],
                "protect": "refiner",
                "parts": "",
            },
        },
        "nsave": node("AlkahestSave", model="nout", filename_prefix="out/streamed"),
        "ncore": node("ModelSave", model="nout", filename_prefix="out/core"),
    }
    said = comfyui.run(graph)
    bridge, variant, base = (
        ak.open(comfyui.models / f"diffusion_models/{name}.safetensors") for name in ("bridge", "z/variant", "base")
    )
    k = float(ak.needed_multiplier(variant - base, on=bridge.protect("refiner"), target=0.05))
    assert f"Multiplier {k:.4g}" in said["nk"]["text"][0]
    streamed = comfyui.saved("out/streamed")
    what, recipe = ak.read_recipe(streamed)
    assert what == "a checkpoint with a recipe inside"
    assert "relative" in said["nk"]["text"][0]
    number = float(recipe.text.split(" * ")[0].split(" + ")[1])
    assert number == pytest.approx(k, rel=1e-6)
    assert differing(streamed, comfyui.saved("out/core")) == {}
    given = {
        name: comfyui.models / f"diffusion_models/{place}.safetensors"
        for name, place in {"bridge": "bridge", "variant": "z/variant", "base": "base"}.items()
    }
    verdict = result_of(stream_verdict(streamed, given, recompute=True))
    assert (verdict.ok, verdict.differing) == (True, []), verdict
    # The graph that ComfyUI itself recorded has a multiplier that only running it can tell.
    (other,) = [one for one in ak.read_workflow(comfyui.saved("out/core")) if one.node == "ncore"]
    assert other.computed == ("k_auto",)
    for path in (streamed, comfyui.saved("out/core")):
        path.unlink()


def test_recipe_save_of_a_graph_that_no_recipe_tells(comfyui: Any) -> None:
    graph = {
        **LOADERS,
        "nm": GRAPHS["our merge"]["nout"],
        "nout": node("SomebodyElses", model="nm"),
        "nsave": node("AlkahestSave", model="nout", filename_prefix="out/streamed"),
        "ncore": node("ModelSave", model="nout", filename_prefix="out/core"),
    }
    said = comfyui.run(graph)
    assert "SomebodyElses" in said["nsave"]["text"][0]
    assert differing(comfyui.saved("out/streamed"), comfyui.saved("out/core")) == {}
    with pytest.raises(ak.AlkahestError, match="SomebodyElses"):
        ak.read_recipe(comfyui.saved("out/streamed"))
    for name in ("streamed", "core"):
        comfyui.saved(f"out/{name}").unlink()


@pytest.mark.parametrize("spelling", ["comfy_quant", "fp8_e4m3fn"])
def test_fp8_models_as_variant_and_base(comfyui: Any, tmp_path: Path, spelling: str) -> None:
    folder = comfyui.models / "diffusion_models"
    bridge = ak.open(folder / "bridge.safetensors")
    for name in ("z/variant", "base"):
        ak.open(folder / f"{name}.safetensors").save(
            folder / f"{spelling}-{Path(name).name}.safetensors", dtype=spelling
        )
    graph = {
        "n1": loader("bridge"),
        "n2": loader(f"{spelling}-variant"),
        "n3": loader(f"{spelling}-base"),
        "nout": GRAPHS["our merge"]["nout"] | {"inputs": GRAPHS["our merge"]["nout"]["inputs"] | {"multiplier": 2.0}},
        "nsave": node("AlkahestSave", model="nout", filename_prefix="out/streamed"),
        "ncore": node("ModelSave", model="nout", filename_prefix="out/core"),
    }
    comfyui.run(graph)
    variant, base = (ak.open(folder / f"{spelling}-{name}.safetensors") for name in ("variant", "base"))
    (bridge.protect("refiner, pad_tokens") + 2 * (variant - base)).save(tmp_path / "own.safetensors")
    assert differing(comfyui.saved("out/core"), tmp_path / "own.safetensors") == {}
    assert differing(comfyui.saved("out/streamed"), tmp_path / "own.safetensors") == {}
    for path in (comfyui.saved("out/streamed"), comfyui.saved("out/core"), variant.path, base.path):
        path.unlink()


def test_input_scales_and_nvfp4_in_the_variant(comfyui: Any, tmp_path: Path) -> None:
    """Quantised layers have parameters that are no weights, and shapes that are not those of what they stand for."""
    import comfy_kitchen as ck

    folder = comfyui.models / "diffusion_models"
    quantised = ak.open(folder / "z/variant.safetensors").save(tmp_path / "q.safetensors", dtype="comfy_quant").path
    stored = load_file(quantised)
    module = "layers.0.feed_forward.w1"
    weight = load_file(folder / "z/variant.safetensors")[f"{module}.weight"].float()
    scale = weight.abs().max() / (448 * 6)
    stored[f"{module}.weight"], stored[f"{module}.weight_scale"] = ck.quantize_nvfp4(weight, scale)
    stored[f"{module}.weight_scale_2"] = scale
    stored[f"{module}.comfy_quant"] = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    stored["layers.0.feed_forward.w2.input_scale"] = torch.tensor(0.5)
    save_file(stored, folder / "mixed.safetensors")
    graph = {
        "n1": loader("bridge"),
        "n2": loader("mixed"),
        "n3": loader("base"),
        "nd": node("AlkahestSubtract", model1="n2", model2="n3", multiplier=2.0, keep_refiner=True),
        "nout": node("AlkahestAdd", model1="n1", model2="nd", multiplier=1.0, keep_refiner=True),
        "nk": node("AlkahestMultiplier", variant="n2", base="n3", bridge="n1", basis="relative", target=0.0),
        **SAVE,
    }
    said = comfyui.run(graph)
    assert "Multiplier" in said["nk"]["text"][0]
    bridge, variant, base = (ak.open(folder / f"{name}.safetensors") for name in ("bridge", "mixed", "base"))
    (bridge.protect("refiner, pad_tokens") + 2 * (variant - base)).save(tmp_path / "own.safetensors")
    path = comfyui.saved("out/core")
    found = differing(path, tmp_path / "own.safetensors")
    assert found.pop(f"{module}.weight", 0) < 100  # ComfyUI decodes nvfp4 in bf16 or float32, as its version has it
    assert found == {}
    path.unlink()
    (folder / "mixed.safetensors").unlink()


def test_a_supplement_is_what_the_package_extracts(comfyui: Any) -> None:
    graph = {
        **LOADERS,
        "nout": node(
            "AlkahestSupplement",
            base="n3",
            variant="n2",
            energy=0.9,
            rank_max=4,
            exclude="refiner, embedders, final, feed_forward",
            filename_prefix="loras/supplement",
        ),
    }
    comfyui.run(graph)
    path = comfyui.saved("loras/supplement")
    variant, base = (ak.open(comfyui.models / f"diffusion_models/{name}.safetensors") for name in ("z/variant", "base"))
    own = ak.extract_lora(variant - base, energy=0.9, rank_max=4, exclude="refiner, embedders, final, feed_forward")
    made, wanted = ak.open_lora(path), own.report.dropna(subset=["rank"])
    assert made.summary()["targets"] == len(wanted[wanted["rank"] > 0])
    own.save(path.with_name("own.safetensors"))
    with safe_open(path, "pt") as a, safe_open(path.with_name("own.safetensors"), "pt") as b:
        assert set(a.keys()) == set(b.keys())
        for name in a.keys():  # noqa: SIM118
            torch.testing.assert_close(a.get_tensor(name), b.get_tensor(name), rtol=1e-4, atol=1e-5)


def test_loras_are_close(comfyui: Any, tmp_path: Path) -> None:
    """ComfyUI multiplies the factors of q, k and v with its own blocking, so the last bit may differ, and no more."""
    variant, base = (ak.open(comfyui.models / f"diffusion_models/{name}.safetensors") for name in ("z/variant", "base"))
    lora = ak.extract_lora((variant - base).only("attention, feed_forward.w2"), rank=4)
    lora.save(comfyui.models / "loras/style.safetensors")
    lora = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": ["nm", 0], "lora_name": "style.safetensors", "strength_model": 1.7},
    }
    comfyui.run({**LOADERS, "nm": GRAPHS["our merge"]["nout"], "nout": lora, **SAVE})
    path = comfyui.saved("out/core")
    text = merged(comfyui, path, tmp_path / "recipe.safetensors")
    assert text == "bridge + 171.1 * (variant - base).without('refiner, pad_tokens') + 1.7 * style"
    with safe_open(path, "pt") as a, safe_open(tmp_path / "recipe.safetensors", "pt") as b:
        for name in b.keys():  # noqa: SIM118
            one, other = a.get_tensor(PREFIX + name), b.get_tensor(name)
            same = one == other
            assert float(same.float().mean()) > 0.9995, name
            torch.testing.assert_close(one[~same].float(), other[~same].float(), rtol=2**-7, atol=1e-6)
    path.unlink()


def test_errors_reach_the_person(comfyui: Any) -> None:
    from comfyui import Refused

    cases = {
        "selects no tensor": {
            "nout": GRAPHS["our merge"]["nout"]
            | {"inputs": GRAPHS["our merge"]["nout"]["inputs"] | {"protect": "refinr"}}
        },
        "cannot be read": {
            "nout": GRAPHS["our merge"]["nout"]
            | {"inputs": GRAPHS["our merge"]["nout"]["inputs"] | {"parts": "layers"}}
        },
        "that ComfyUI has as one": {
            "nout": GRAPHS["our merge"]["nout"]
            | {"inputs": GRAPHS["our merge"]["nout"]["inputs"] | {"protect": "to_q"}}
        },
        "exactly zero": {
            "nout": node("AlkahestMultiplier", variant="n3", base="n3", bridge="n1", basis="relative", target=0.0)
        },
    }
    for message, graph in cases.items():
        ends = (
            {}
            if message == "exactly zero"
            else {"nsave": node("AlkahestSave", model="nout", filename_prefix="out/none")}
        )
        with pytest.raises(Refused, match=message):
            comfyui.run({**LOADERS, **graph, **ends})
    assert not list((comfyui.base / "output").glob("**/none*"))

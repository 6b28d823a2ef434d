"""Workflows as the editor saves them: against the API form that the same graph has, and ComfyUI's own templates."""

from __future__ import annotations

import copy
import json
from importlib.metadata import files
from pathlib import Path
from typing import Any

import pytest

import alkahest as ak
from alkahest.errors import RecipeError
from alkahest.workflow.graph import read_graph

MODEL = "MODEL"


def node(
    one: Any, kind: str, inputs: list[tuple[str, Any]] = (), outputs: int = 1, values: Any = None, **more: Any
) -> dict[str, Any]:  # type: ignore[assignment]
    """Inputs are (name, link) for sockets and (name, link, "widget") for widgets."""
    slots = [
        {
            "name": name,
            "type": MODEL if not rest else "FLOAT",
            "link": link,
            **({"widget": {"name": name}} if rest else {}),
        }
        for name, link, *rest in inputs
    ]
    return {
        "id": one,
        "type": kind,
        "mode": 0,
        "inputs": slots,
        "outputs": [{"name": MODEL, "type": MODEL}] * outputs,
        "widgets_values": values or [],
        **more,
    }


def loaders(first: int = 1) -> list[dict[str, Any]]:
    return [
        node(first + n, "UNETLoader", values=[f"{name}.safetensors", "default"])
        for n, name in enumerate(("bridge", "variant", "base"))
    ]


def flat() -> dict[str, Any]:
    """bridge + 1.1 * (variant - base), saved."""
    return {
        "nodes": [
            *loaders(),
            node(4, "ModelMergeSubtract", [("model1", 12), ("model2", 13)], values=[1.1]),
            node(5, "ModelMergeAdd", [("model1", 11), ("model2", 14)]),
            node(6, "ModelSave", [("model", 15)], 0, ["merged"]),
            node(7, "MarkdownNote", outputs=0, values=["words"]),
        ],
        "links": [
            [11, 1, 0, 5, 0, MODEL],
            [12, 2, 0, 4, 0, MODEL],
            [13, 3, 0, 4, 1, MODEL],
            [14, 4, 0, 5, 1, MODEL],
            [15, 5, 0, 6, 0, MODEL],
        ],
        "version": 0.4,
    }


def texts(workflow: dict[str, Any], tmp_path: Path) -> list[str]:
    (tmp_path / "w.json").write_text(json.dumps(workflow))
    return [one.text for one in ak.read_workflow(tmp_path / "w.json")]


def by_id(workflow: dict[str, Any], one: Any) -> dict[str, Any]:
    return next(node for node in workflow["nodes"] if node["id"] == one)


WANTED = "bridge + 1.1 * (variant - base)"


def test_a_plain_workflow(tmp_path: Path) -> None:
    assert texts(flat(), tmp_path) == [WANTED]
    graph = read_graph(flat())
    assert "7" not in graph
    assert graph["4"].inputs["multiplier"] == 1.1


def test_links_that_were_taken_out_are_null(tmp_path: Path) -> None:
    workflow = flat()
    workflow["links"].insert(1, None)
    assert texts(workflow, tmp_path) == [WANTED]


def test_reroutes_primitives_and_stored_names(tmp_path: Path) -> None:
    workflow = flat()
    workflow["nodes"] += [
        node(20, "Reroute", [("", 13)]),
        node(21, "Reroute", [("", 30)]),
        node(22, "PrimitiveNode", values=[2.5, "fixed"]),
        node(23, "PrimitiveFloat", values=[-4.5]),
        node(24, "SetNode", [("MODEL", 34)], values=["kept"]),
        node(25, "GetNode", values=["kept"]),
    ]
    by_id(workflow, 4)["inputs"] = [
        {"name": "model1", "type": MODEL, "link": 12},
        {"name": "model2", "type": MODEL, "link": 31},
        {"name": "multiplier", "type": "FLOAT", "link": 32, "widget": {"name": "multiplier"}},
    ]
    by_id(workflow, 5)["inputs"][0]["link"] = 35
    workflow["links"] += [
        [30, 20, 0, 21, 0, MODEL],
        [31, 21, 0, 4, 1, MODEL],
        [32, 22, 0, 4, 2, "FLOAT"],
        [34, 1, 0, 24, 0, MODEL],
        [35, 25, 0, 5, 0, MODEL],
    ]
    assert texts(workflow, tmp_path) == ["bridge + 2.5 * (variant - base)"]
    workflow["links"][-3] = [32, 23, 0, 4, 2, "FLOAT"]
    assert texts(workflow, tmp_path) == ["bridge - 4.5 * (variant - base)"]
    by_id(workflow, 25)["widgets_values"] = ["other"]
    with pytest.raises(RecipeError, match="asks for 'other', which no SetNode stores"):
        texts(workflow, tmp_path)


def test_bypassed_and_muted_nodes(tmp_path: Path) -> None:
    workflow = flat()
    by_id(workflow, 5)["mode"] = 4  # passes its first input on
    assert texts(workflow, tmp_path) == ["bridge"]
    by_id(workflow, 5)["inputs"][0] |= {"type": "CLIP"}  # the first of the same type is the second
    by_id(workflow, 4)["mode"] = 4
    assert texts(workflow, tmp_path) == ["variant"]
    workflow = flat()
    by_id(workflow, 4)["mode"] = 2
    with pytest.raises(
        RecipeError, match=r"node 5 \(ModelMergeAdd\): model2 is missing: node 4 \(ModelMergeSubtract\) is muted"
    ):
        texts(workflow, tmp_path)
    by_id(workflow, 6)["mode"] = 2
    with pytest.raises(RecipeError, match="neither saves nor samples"):
        texts(workflow, tmp_path)


def nested() -> dict[str, Any]:
    """The subtraction in a subgraph, whose multiplier and file are promoted to its outside."""
    inner = {
        "id": "inner",
        "name": "Difference",
        "inputs": [
            {"name": "variant", "type": MODEL},
            {"name": "strength", "type": "FLOAT"},
            {"name": "file", "type": "COMBO"},
        ],
        "outputs": [{"name": "delta", "type": MODEL}],
        "nodes": [
            node(3, "UNETLoader", [("unet_name", 4, "widget")], values=["base.safetensors", "default"]),
            node(4, "ModelMergeSubtract", [("model1", 1), ("model2", 2), ("multiplier", 3, "widget")], values=[1.1]),
        ],
        "links": [
            {"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 4, "target_slot": 0, "type": MODEL},
            {"id": 2, "origin_id": 3, "origin_slot": 0, "target_id": 4, "target_slot": 1, "type": MODEL},
            {"id": 3, "origin_id": -10, "origin_slot": 1, "target_id": 4, "target_slot": 2, "type": "FLOAT"},
            {"id": 4, "origin_id": -10, "origin_slot": 2, "target_id": 3, "target_slot": 0, "type": "COMBO"},
            {"id": 5, "origin_id": 4, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": MODEL},
        ],
    }
    workflow = flat()
    workflow["nodes"] = [one for one in workflow["nodes"] if one["id"] not in (3, 4)]
    workflow["nodes"].append(node(8, "inner", [("variant", 12)]))
    workflow["links"] = [
        [11, 1, 0, 5, 0, MODEL],
        [12, 2, 0, 8, 0, MODEL],
        [14, 8, 0, 5, 1, MODEL],
        [15, 5, 0, 6, 0, MODEL],
    ]
    return {**workflow, "definitions": {"subgraphs": [inner]}}


def test_a_subgraph_and_its_promoted_widgets(tmp_path: Path) -> None:
    workflow = nested()
    assert texts(workflow, tmp_path) == [WANTED]  # nothing is set outside: what is set inside counts
    assert sorted(read_graph(workflow)) == ["1", "2", "5", "6", "8:3", "8:4"]
    outside = by_id(workflow, 8)
    outside["widgets_values"] = [7.5, "other.safetensors"]  # the newest form: in the order of the promoted inputs
    assert texts(workflow, tmp_path) == ["bridge + 7.5 * (variant - other)"]
    outside["properties"] = {"proxyWidgets": [["-1", "file"], ["-1", "strength"]]}
    outside["widgets_values"] = ["third.safetensors", 2]
    assert texts(workflow, tmp_path) == ["bridge + 2 * (variant - third)"]
    outside["properties"] = {"proxyWidgets": [["3", "unet_name"], ["4", "multiplier"]]}  # widgets of nodes inside
    assert texts(workflow, tmp_path) == ["bridge + 2 * (variant - third)"]
    for link in (3, 4):  # now they are promoted by the proxies alone
        workflow["definitions"]["subgraphs"][0]["links"] = [
            one for one in workflow["definitions"]["subgraphs"][0]["links"] if one["id"] != link
        ]
    for one in workflow["definitions"]["subgraphs"][0]["nodes"]:
        one["inputs"] = [slot for slot in one["inputs"] if "widget" not in slot]
    assert texts(workflow, tmp_path) == ["bridge + 2 * (variant - third)"]
    outside["mode"] = 4  # the instance is bypassed: its first MODEL goes on
    with pytest.raises(RecipeError, match="factors do not add up to 1"):
        texts(workflow, tmp_path)


def test_a_linked_widget_of_a_subgraph(tmp_path: Path) -> None:
    workflow = nested()
    workflow["nodes"].append(node(9, "PrimitiveFloat", values=[3.5]))
    by_id(workflow, 8)["inputs"].append(
        {"name": "strength", "type": "FLOAT", "link": 40, "widget": {"name": "strength"}}
    )
    workflow["links"].append([40, 9, 0, 8, 1, "FLOAT"])
    assert texts(workflow, tmp_path) == ["bridge + 3.5 * (variant - base)"]
    by_id(workflow, 8)["mode"] = 2
    with pytest.raises(RecipeError, match=r"node 8 \(inner\) is muted"):
        texts(workflow, tmp_path)


def test_a_subgraph_in_a_subgraph(tmp_path: Path) -> None:
    workflow = nested()
    outer = {
        "id": "outer",
        "inputs": [{"name": "variant", "type": MODEL}, {"name": "how much", "type": "FLOAT"}],
        "outputs": [{"name": "delta", "type": MODEL}],
        "nodes": [node(8, "inner", [("variant", 1), ("strength", 2, "widget")], values=[9.5, "base.safetensors"])],
        "links": [
            {"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 8, "target_slot": 0, "type": MODEL},
            {"id": 2, "origin_id": -10, "origin_slot": 1, "target_id": 8, "target_slot": 1, "type": "FLOAT"},
            {"id": 3, "origin_id": 8, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": MODEL},
        ],
    }
    workflow["definitions"]["subgraphs"].append(outer)
    by_id(workflow, 8)["type"] = "outer"
    assert texts(workflow, tmp_path) == ["bridge + 9.5 * (variant - base)"]
    by_id(workflow, 8)["widgets_values"] = [6.5]
    assert texts(workflow, tmp_path) == ["bridge + 6.5 * (variant - base)"]
    assert "8:8:4" in read_graph(workflow)


def test_what_has_no_end_is_refused(tmp_path: Path) -> None:
    workflow = nested()
    workflow["definitions"]["subgraphs"][0]["nodes"].append(node(99, "inner"))
    with pytest.raises(RecipeError, match="nested without end"):
        texts(workflow, tmp_path)
    workflow["definitions"]["subgraphs"][0]["links"][-1]["origin_id"] = 99
    with pytest.raises(RecipeError, match="nested without end"):
        texts(workflow, tmp_path)
    laughs = nested()
    laughs["definitions"]["subgraphs"] = [
        {"id": f"s{n}", "nodes": [node(i, f"s{n + 1}") for i in range(10)], "links": []} for n in range(20)
    ]
    by_id(laughs, 8)["type"] = "s0"
    with pytest.raises(RecipeError, match="too many nodes"):
        texts(laughs, tmp_path)
    workflow = flat()
    workflow["nodes"] += [node(20, "Reroute", [("", 31)]), node(21, "Reroute", [("", 30)])]
    workflow["links"] += [[30, 20, 0, 21, 0, MODEL], [31, 21, 0, 20, 0, MODEL], [32, 21, 0, 6, 0, MODEL]]
    by_id(workflow, 6)["inputs"][0]["link"] = 32
    with pytest.raises(RecipeError, match="links run in a circle"):
        texts(workflow, tmp_path)
    workflow["nodes"] += [node(100 + n, "Reroute", [("", 100 + n)]) for n in range(2000)]
    workflow["links"] += [[100 + n, 99 + n if n else 1, 0, 100 + n, 0, MODEL] for n in range(2000)] + [
        [33, 2099, 0, 6, 0, MODEL]
    ]
    by_id(workflow, 6)["inputs"][0]["link"] = 33
    with pytest.raises(RecipeError, match="too deep"):
        texts(workflow, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"nodes": [1]},
        {"nodes": [{"type": "ModelSave"}]},
        {"nodes": [{"id": 1}]},
        {"links": [[{}]]},
        {"links": "x"},
        {"links": [[11, None, 0, 5, 0]]},
        {"nodes": [{"id": 6, "type": "ModelSave", "inputs": 7}]},
        {"links": [7]},
    ],
    ids=str,
)
def test_damage_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        texts({**flat(), **change}, tmp_path)


TEMPLATES = [
    ("image_z_image", "z_image_bf16"),
    ("image_z_image_int8", "z_image_int8_convrot"),
    ("image_z_image_turbo", "z_image_turbo_bf16"),
    ("image_z_image_turbo_int8", "z_image_turbo_int8_convrot"),
    ("utility_z_image_turbo_2k_upscaler.app", "z_image_turbo_bf16"),
]


def template(name: str) -> dict[str, Any]:
    (path,) = [one for one in files("comfyui-workflow-templates-json") or [] if one.name == f"{name}.json"]
    return dict(json.loads(Path(str(path.locate())).read_text()))


@pytest.mark.parametrize(("name", "file"), TEMPLATES)
def test_comfyuis_own_templates(name: str, file: str, tmp_path: Path) -> None:
    assert texts(template(name), tmp_path) == [file]


@pytest.mark.parametrize(("name", "file"), TEMPLATES)
def test_a_merge_spliced_into_a_template(name: str, file: str, tmp_path: Path) -> None:
    """Inside its subgraph the loader's model goes through a merge, and from there on to a saver too."""
    workflow = copy.deepcopy(template(name))
    (graph,) = [
        one for one in workflow["definitions"]["subgraphs"] if any(n["type"] == "UNETLoader" for n in one["nodes"])
    ]
    (loaded,) = [one for one in graph["nodes"] if one["type"] == "UNETLoader"]
    leaving = [link for link in graph["links"] if link["origin_id"] == loaded["id"]]
    for link in leaving:
        link["origin_id"] = 903
    ends = {901: "variant", 902: "base"}
    graph["nodes"] += [node(one, "UNETLoader", values=[f"{name}.safetensors", "default"]) for one, name in ends.items()]
    graph["nodes"] += [
        node(904, "ModelMergeSubtract", [("model1", 9001), ("model2", 9002)], values=[10]),
        node(903, "ModelMergeAdd", [("model1", 9003), ("model2", 9004)]),
        node(905, "ModelSave", [("model", 9005)], 0, ["merged"]),
    ]
    for one, origin, target, slot in (
        (9001, 901, 904, 0),
        (9002, 902, 904, 1),
        (9003, loaded["id"], 903, 0),
        (9004, 904, 903, 1),
        (9005, 903, 905, 0),
    ):
        graph["links"].append(
            {"id": one, "origin_id": origin, "origin_slot": 0, "target_id": target, "target_slot": slot, "type": MODEL}
        )
    (tmp_path / "w.json").write_text(json.dumps(workflow))
    (recipe,) = ak.read_workflow(tmp_path / "w.json")
    assert recipe.text == f"{file} + 10 * (variant - base)"
    assert recipe.node.endswith(":905")
    (instance,) = [one for one in workflow["nodes"] if one["type"] == graph["id"]]
    (slot,) = [one for one in instance["inputs"] if one["name"].startswith("unet_name")] or [{}]
    if slot:  # the file is promoted: chosen on the outside by a primitive, it counts
        workflow["nodes"].append(node(990, "PrimitiveNode", values=["chosen.safetensors"]))
        workflow["links"].append([9900, 990, 0, instance["id"], instance["inputs"].index(slot), "COMBO"])
        slot["link"] = 9900
        assert texts(workflow, tmp_path) == ["chosen + 10 * (variant - base)"]


def test_templates_of_other_families_are_refused_or_plain(tmp_path: Path) -> None:
    """No template of the whole package, of whatever family, makes anything but a recipe or an AlkahestError."""
    read = 0
    for path in files("comfyui-workflow-templates-json") or []:
        if path.name.endswith(".json"):
            try:
                read += len(ak.read_workflow(Path(str(path.locate()))))
            except ak.AlkahestError:
                continue
    assert read > 10

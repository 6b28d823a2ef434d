"""A graph in the API form -> the form that ComfyUI's editor saves: with positions, links, and values of widgets.

The editor opens both, but of the API form it rounds every number to its widget's step (1.711 becomes 1.71), and keeps
``widgets_values`` as they are. Source: workflow format 0.4, and ComfyUI_frontend's ``loadApiJson``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_WIDTH, _ROW, _SLOT, _GAP = 340, 48, 24, 60  # pixels


@dataclass(frozen=True)
class Shape:
    """The sockets and widgets of a node: names with types, in order."""

    inputs: Mapping[str, str] = field(default_factory=dict)
    widgets: Mapping[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("MODEL",)


_TWO = {"model1": "MODEL", "model2": "MODEL"}
SHAPES = {
    "UNETLoader": Shape({}, {"unet_name": "COMBO", "weight_dtype": "COMBO"}),
    "CheckpointLoaderSimple": Shape({}, {"ckpt_name": "COMBO"}, ("MODEL", "CLIP", "VAE")),
    "ModelMergeSubtract": Shape(_TWO, {"multiplier": "FLOAT"}),
    "ModelMergeAdd": Shape(_TWO),
    "ModelMergeSimple": Shape(_TWO, {"ratio": "FLOAT"}),
    "LoraLoaderModelOnly": Shape({"model": "MODEL"}, {"lora_name": "COMBO", "strength_model": "FLOAT"}),
    "ModelSave": Shape({"model": "MODEL"}, {"filename_prefix": "STRING"}, ()),
    "AlkahestMerge": Shape(
        {"bridge": "MODEL", "variant": "MODEL", "base": "MODEL"},
        {"multiplier": "FLOAT", "protect": "STRING", "parts": "STRING"},
    ),
    "AlkahestSave": Shape({"model": "MODEL"}, {"filename_prefix": "STRING"}, ("STRING",)),
    "CLIPLoader": Shape({}, {"clip_name": "COMBO", "type": "COMBO", "device": "COMBO"}, ("CLIP",)),
    "VAELoader": Shape({}, {"vae_name": "COMBO"}, ("VAE",)),
    "ModelSamplingAuraFlow": Shape({"model": "MODEL"}, {"shift": "FLOAT"}),
    "CLIPTextEncode": Shape({"clip": "CLIP"}, {"text": "STRING"}, ("CONDITIONING",)),
    "EmptySD3LatentImage": Shape({}, {"width": "INT", "height": "INT", "batch_size": "INT"}, ("LATENT",)),
    "KSampler": Shape(
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        {
            "seed": "INT",
            "steps": "INT",
            "cfg": "FLOAT",
            "sampler_name": "COMBO",
            "scheduler": "COMBO",
            "denoise": "FLOAT",
        },
        ("LATENT",),
    ),
    "VAEDecode": Shape({"samples": "LATENT", "vae": "VAE"}, {}, ("IMAGE",)),
    "SaveImage": Shape({"images": "IMAGE"}, {"filename_prefix": "STRING"}, ()),
}
_AFTER_SEED = "fixed"  # the editor keeps what becomes of a seed after a run behind it


def to_editor(graph: Mapping[str, Any]) -> dict[str, Any]:
    """The editor's form of a graph whose nodes are those of `SHAPES`.

    >>> to_editor({"1": {"class_type": "UNETLoader", "inputs": {...}}, ...})["nodes"][0]["widgets_values"]
    ['base.safetensors', 'default']
    """
    links: list[list[Any]] = []
    nodes = {name: _node(int(name), about, links) for name, about in graph.items()}
    for number, origin, slot, *_ in links:
        output = nodes[str(origin)]["outputs"][slot]
        output["links"] = [*(output["links"] or []), number]
    _place(nodes, links)
    return {
        "last_node_id": max(map(int, nodes), default=0),
        "last_link_id": len(links),
        "nodes": list(nodes.values()),
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _node(number: int, about: Mapping[str, Any], links: list[list[Any]]) -> dict[str, Any]:
    kind, values = about["class_type"], about["inputs"]
    shape = SHAPES[kind]
    inputs: list[dict[str, Any]] = []
    for slot, (name, socket) in enumerate(shape.inputs.items()):
        origin, output = values[name]
        links.append([len(links) + 1, int(origin), output, number, slot, socket])
        inputs.append({"name": name, "type": socket, "link": len(links)})
    inputs += [
        {"name": name, "type": socket, "widget": {"name": name}, "link": None} for name, socket in shape.widgets.items()
    ]
    title = about.get("_meta", {}).get("title", kind)
    return {
        "id": number,
        "type": kind,
        **({} if title == kind else {"title": title}),
        "pos": [0, 0],
        "size": [_WIDTH, _ROW + _SLOT * max(len(shape.inputs), len(shape.outputs)) + _SLOT * len(shape.widgets)],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": inputs,
        "outputs": [{"name": socket, "type": socket, "links": None} for socket in shape.outputs],
        "properties": {"Node name for S&R": kind},
        "widgets_values": list(_widget_values(values, shape)),
    }


def _widget_values(values: Mapping[str, Any], shape: Shape) -> Iterator[Any]:
    for name in shape.widgets:
        yield values[name]
        if name == "seed":
            yield _AFTER_SEED


def _place(nodes: Mapping[str, dict[str, Any]], links: list[list[Any]]) -> None:
    """Columns such that every link runs to the right, and what feeds a node stands as near to it as it can."""
    column = dict.fromkeys(nodes, 0)
    for name, node in nodes.items():  # a node comes after what feeds it
        feeding = [str(origin) for _, origin, _, target, *_ in links if target == node["id"]]
        column[name] = 1 + max((column[one] for one in feeding), default=-1)
    for name, node in reversed(list(nodes.items())):
        fed = [str(target) for _, origin, _, target, *_ in links if origin == node["id"]]
        column[name] = min((column[one] for one in fed), default=column[name] + 1) - 1
    below: dict[int, float] = {}
    for name, node in nodes.items():
        at = column[name]
        node["pos"] = [_GAP + at * (_WIDTH + _GAP), below.get(at, _GAP)]
        below[at] = node["pos"][1] + node["size"][1] + _GAP

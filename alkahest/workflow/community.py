"""Loaders, LoRA nodes and merges that others made, or that core added later, as values of `alkahest.workflow.values`.

Sources: rgthree-comfy's ``power_lora_loader.py``, ``lora_loader_stack.py`` and ``any_switch.py``; ComfyUI-KJNodes'
``model_optimization_nodes.py``; ComfyUI_Comfyroll's ``nodes_lora.py``; ComfyUI-Lora-Manager's ``lora_loader.py``;
ComfyUI-GGUF's ``nodes.py``; EasygoingNodes' and ComfyUI-DonutNodes' merges for Z-Image, whose ratios are shares of the
first model (as ModelMergeBlocks') and of the second one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from alkahest.engine.scalars import text_of
from alkahest.workflow import values
from alkahest.workflow.editor import Absent, Link
from alkahest.workflow.values import WEIGHTS, Value, rest_of
from alkahest.workflow.widgets import OTHERS

if TYPE_CHECKING:
    from alkahest.workflow.graph import Node
    from alkahest.workflow.reading import Reading

_GROUPS = {
    "early": "layers.0-5",
    "lowmid": "layers.6-14",
    "upmid": "layers.15-23",
    "late": "layers.24-29",
    "refiners": "refiner",
    "final": "final_layer",
}
_COMPONENTS = ("x_embedder", "t_embedder", "cap_embedder")


def kj_loader(reading: Reading, node: Node) -> Value:
    """DiffusionModelLoaderKJ: a diffusion model, and a state dict that it may lay over it."""
    extra = node.inputs.get("extra_state_dict")
    if not (isinstance(extra, Absent) or extra in (None, "")):
        raise reading.refusal(
            node,
            "it lays another file over the model, which no recipe says from here",
            found=f"extra_state_dict: {extra}"[:200],
            fix="base.with_parts_of(ak.open_part(FILE)), saved as a file, and start from that",
        )
    dtype = reading.literal(node, "weight_dtype", "default")
    if dtype != "default":
        reading.notes.append(f"{node} loads in {dtype}; the recipe takes the file as it is")
    return values.model(reading.file(node, "diffusion_models", "model_name"))


def gguf_loader(reading: Reading, node: Node) -> Value:
    return values.model(reading.file(node, "diffusion_models", "unet_name"))


def bypass_lora(reading: Reading, node: Node) -> Value:
    """LoraLoaderBypass: the LoRA runs beside the weights, and no saver writes it."""
    weights = reading.model(node, "model")
    if reading.saves:
        reading.notes.append(
            f"{node} applies its LoRA while sampling only: ComfyUI's savers leave it out, and so does the recipe; "
            "LoraLoaderModelOnly merges it"
        )
        return weights
    return reading.plus_lora(node, weights, reading.literal(node, "lora_name"), reading.number(node, "strength_model"))


def trained_lora(reading: Reading, node: Node) -> Value:
    raise reading.refusal(
        node,
        "its LoRA is trained in the graph and is in no file",
        fix="save it with SaveLoRA, and load that file with LoraLoaderModelOnly",
    )


def power_lora(reading: Reading, node: Node) -> Value:
    """Power Lora Loader: lines ``lora_N`` with on, lora, strength."""
    weights = reading.model(node, "model")
    for name, line in sorted(node.inputs.items(), key=lambda item: _number(item[0])):
        if name.lower().startswith("lora_") and isinstance(line, Mapping) and line.get("on"):
            weights = _line(reading, node, weights, line.get("lora"), line.get("strength"))
    return weights


def lora_stack(reading: Reading, node: Node) -> Value:
    """Lora Loader Stack: four names and strengths."""
    weights = reading.model(node, "model")
    for number in range(1, 5):
        lora = node.inputs.get(f"lora_{number:02}")
        if isinstance(lora, str | Link) and lora != "None":
            strength = reading.number(node, f"strength_{number:02}", 1.0)
            weights = reading.plus_lora(node, weights, reading.literal(node, f"lora_{number:02}"), strength)
    return weights


def comfyroll_stack(reading: Reading, node: Node) -> Value:
    """CR Apply LoRA Stack, and the CR LoRA Stack nodes behind it."""
    weights = reading.model(node, "model")
    for lora, strength in _comfyroll(reading, node, 0):
        weights = reading.plus_lora(node, weights, lora, strength)
    return weights


def _comfyroll(reading: Reading, node: Node, depth: int) -> Iterator[tuple[str, float]]:
    link = node.inputs.get("lora_stack")
    if not isinstance(link, Link) or depth > 40:
        return
    stack = reading.graph.get(link.node)
    if stack is None or stack.kind != "CR LoRA Stack":
        raise reading.refusal(node, "what its stack of LoRAs holds is not known", found=str(stack or link.node))
    yield from _comfyroll(reading, stack, depth + 1)
    for number in range(1, 4):
        lora = stack.inputs.get(f"lora_name_{number}")
        if reading.literal(stack, f"switch_{number}", "Off") == "On" and lora not in (None, "None"):
            name = reading.literal(stack, f"lora_name_{number}")
            yield name, reading.number(stack, f"model_weight_{number}", 1.0)


def manager_loras(reading: Reading, node: Node) -> Value:
    """Lora Loader (LoraManager): rows with name, strength and active; names without an ending."""
    weights, loras = reading.model(node, "model"), node.inputs.get("loras")
    if isinstance(node.inputs.get("lora_stack"), Link):
        raise reading.refusal(node, "what its stack of LoRAs holds is not known", fix="list them in the node itself")
    rows = loras.get("__value__", []) if isinstance(loras, Mapping) else loras or []
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise reading.refusal(node, "its list of LoRAs cannot be read", found=str(loras)[:200])
    for row in rows:
        if row.get("active", True):
            name = row.get("name")
            name = f"{name}.safetensors" if isinstance(name, str) and "." not in name[-12:] else name
            weights = _line(reading, node, weights, name, row.get("strength"))
    return weights


def first_of(reading: Reading, node: Node) -> Value:
    """Any Switch: the first input that is connected."""
    names = sorted((name for name, value in node.inputs.items() if isinstance(value, Link)), key=_number)
    if not names:
        raise reading.refusal(node, "nothing is connected to it")
    return reading.model(node, names[0])


def z_image_blocks(reading: Reading, node: Node) -> Value:
    """ModelMergeZImage: a ratio for each block, the first model's share, the first for what no name begins with."""
    ratios = {name: reading.number(node, name, 1.0) for name in OTHERS["ModelMergeZImage"]}
    shares = {name.rstrip("."): rest_of(ratio) for name, ratio in ratios.items() if "pad_token" not in name}
    return _by_parts(reading, node, shares)


def zit_blocks(reading: Reading, node: Node) -> Value:
    """ModelMergeZIT: ratios by group or by layer, the second model's share."""
    if reading.literal(node, "granularity", "grouped") == "blocks":
        names = {f"layer_{n}": f"layers.{n}" for n in range(30)}
        names |= {name: name for name in ("context_refiner", "noise_refiner", "final_layer")}
    else:
        names = dict(_GROUPS)
    names |= {name: name for name in _COMPONENTS}
    return _by_parts(reading, node, {part: reading.number(node, name, 1.0) for name, part in names.items()})


def _by_parts(reading: Reading, node: Node, shares: Mapping[str, float]) -> Value:
    """``model1 + (model2 - model1)`` with a share for each part; pad tokens stay, as ComfyUI patches none."""
    first, second = reading.model(node, "model1"), reading.model(node, "model2")
    for name, value in (("model1", first), ("model2", second)):
        if value.kind != WEIGHTS:
            raise reading.refusal(node, f"{name} is {value.kind}, not a model", found=value.text)
    reading.notes.append(f"{node} adds r * model1 + (1 - r) * model2; the recipe says it as a difference, which rounds")
    reading.notes.append(f"{node}: pad tokens stay model1's whatever their ratio, because ComfyUI patches none")
    delta = values.difference(second, first, "pad_tokens")
    common, _ = Counter(shares.values()).most_common(1)[0]
    others = {part: share for part, share in shares.items() if share != common}
    if not others:
        return values.plus(first, values.times(common, delta))
    inside = ", ".join(f"{part!r}: {text_of(share)}" for part, share in {"all": common, **others}.items())
    return values.plus(first, values.named_delta(f"{delta.text}.scaled({{{inside}}})"))


def _line(reading: Reading, node: Node, weights: Value, lora: Any, strength: Any) -> Value:
    if not isinstance(lora, str) or lora in ("", "None"):
        return weights
    try:
        number = float(strength)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise reading.refusal(node, f"the strength of {lora!r} is not a number", found=repr(strength)[:80])
    return reading.plus_lora(node, weights, lora, number)


def _number(name: str) -> tuple[int, str]:
    digits = "".join(letter for letter in name if letter.isdecimal())
    return int(digits[:9] or 0), name


def _table(names: Iterable[str], how: Callable[[Reading, Node], Value]) -> dict[str, Callable[[Reading, Node], Value]]:
    return dict.fromkeys(names, how)


COMMUNITY: Mapping[str, Callable[[Reading, Node], Value]] = {
    "DiffusionModelLoaderKJ": kj_loader,
    "UnetLoaderGGUF": gguf_loader,
    **_table(("LoraLoaderBypassModelOnly", "LoraLoaderBypass"), bypass_lora),
    "LoraModelLoader": trained_lora,
    "Power Lora Loader (rgthree)": power_lora,
    "Lora Loader Stack (rgthree)": lora_stack,
    "CR Apply LoRA Stack": comfyroll_stack,
    "Lora Loader (LoraManager)": manager_loras,
    "Any Switch (rgthree)": first_of,
    **_table(("ModelMergeZImage", "EasygoingNodes_ModelMergeZImage"), z_image_blocks),
    "ModelMergeZIT": zit_blocks,
}

"""What ComfyUI's own loaders, merges and LoRA nodes make of a model, as values of `alkahest.workflow.values`.

Sources: ComfyUI's ``comfy_extras/nodes_model_merging.py``, ``nodes.py`` and ``comfy/lora.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from alkahest.workflow import values
from alkahest.workflow.editor import Absent
from alkahest.workflow.values import DELTA, WEIGHTS, Value

if TYPE_CHECKING:
    from alkahest.workflow.graph import Node
    from alkahest.workflow.reading import Reading

CLIP_TOO = "{} may also change the text encoder, which is not part of a recipe"


def _unet(reading: Reading, node: Node) -> Value:
    dtype = reading.literal(node, "weight_dtype", "default")
    if dtype != "default":
        reading.notes.append(
            f"{node} loads in {dtype}; the recipe takes the file as it is, so results differ by that rounding"
        )
    return values.model(reading.file(node, "diffusion_models", "unet_name"))


def _checkpoint(reading: Reading, node: Node) -> Value:
    return values.model(reading.file(node, "checkpoints", "ckpt_name"))


def _subtract(reading: Reading, node: Node) -> Value:
    return values.subtract(
        reading.model(node, "model1"), reading.model(node, "model2"), reading.number(node, "multiplier")
    )


def _add(reading: Reading, node: Node) -> Value:
    first, second = reading.model(node, "model1"), reading.model(node, "model2")
    made = values.add(first, second)
    if first.kind == DELTA and second.kind == WEIGHTS and not first.terms:
        reading.notes.append(
            f"{node} has the difference as model1, so ComfyUI would keep that one's pad tokens; the recipe keeps "
            "model2's"
        )
    return made


def _simple(reading: Reading, node: Node, ratio: str = "ratio") -> Value:
    return values.mix(reading.model(node, "model1"), reading.model(node, "model2"), reading.number(node, ratio))


def _blocks(reading: Reading, node: Node) -> Value:
    # Its ratios are for tensors that begin with input, middle or out. Z-Image has none, so the first is for all.
    if len({reading.number(node, name, 1.0) for name in ("input", "middle", "out")}) > 1:
        reading.notes.append(
            f"{node}: no tensor of Z-Image is called input, middle or out, so the first ratio is used for all, in "
            "ComfyUI too"
        )
    return _simple(reading, node, "input")


def _lora(reading: Reading, node: Node) -> Value:
    weights, strength = reading.model(node, "model"), reading.number(node, "strength_model")
    if node.kind == "LoraLoader" and not isinstance(node.inputs.get("clip"), Absent):
        reading.notes.append(CLIP_TOO.format(node))
    return reading.plus_lora(node, weights, reading.literal(node, "lora_name"), strength)


def _switch(reading: Reading, node: Node) -> Value:
    return reading.model(node, reading.switched(node))


CORE: Mapping[str, Callable[[Reading, Node], Value]] = {
    "UNETLoader": _unet,
    "CheckpointLoaderSimple": _checkpoint,
    "ModelMergeSubtract": _subtract,
    "ModelMergeAdd": _add,
    "ModelMergeSimple": _simple,
    "ModelMergeBlocks": _blocks,
    "LoraLoaderModelOnly": _lora,
    "LoraLoader": _lora,
    "ComfySwitchNode": _switch,
}

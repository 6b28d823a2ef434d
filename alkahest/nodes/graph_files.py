"""The expressions behind a node's models, of the files that the graph loads: their storage, hashes and every bit.

ComfyUI may hold a checkpoint in another form than its file has, float32 on a CPU. What depends on the form, such as
how much of a difference survives rounding, is that of the files; only where a graph cannot be read is it the model's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alkahest.algebra.weights import Weights
from alkahest.engine.readable import Leading
from alkahest.errors import AlkahestError, MismatchError, RecipeError
from alkahest.nodes.merging import NOTED
from alkahest.workflow.editor import Link
from alkahest.workflow.folders import ModelFile
from alkahest.workflow.graph import Graph, Node, read_graph
from alkahest.workflow.values import WEIGHTS

_BESIDE = ("LoraLoaderBypass", "LoraLoaderBypassModelOnly")  # a LoRA beside the weights, which no saver writes


@dataclass
class Found:
    """The models of a node as expressions, and what is to be said of them."""

    weights: dict[str, Weights] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    files: dict[str, ModelFile] = field(default_factory=dict)  # by their names in the expressions
    opened: dict[str, Any] = field(default_factory=dict)


def weights_behind(operation: str, models: Mapping[str, Any], prompt: Any, node: str) -> Found:
    """An expression for each model that arrives at a node: of files where the graph says which, else as it is held.

    ``models`` maps the node's inputs to ComfyUI's MODELs. Raises MismatchError for one that the graph shows to be a
    difference.
    """
    from alkahest.nodes.model import ModelWeights

    found = Found()
    for name, model in models.items():
        try:
            found.weights[name] = _from_files(operation, with_used(prompt, model), node, name, found)
        except MismatchError:
            raise
        except AlkahestError as error:
            held = ModelWeights(model, name)
            forms = ", ".join(sorted(set(held.storage.values())))
            found.weights[name] = held
            found.notes += [
                f"warning: {name} is measured as ComfyUI holds it, in {forms}, because the files behind it are not "
                f"known: {error.problem}. Where they are stored more coarsely, less of a difference outlives rounding",
                *left_beside(prompt, node),
            ]
    found.notes = list(dict.fromkeys(found.notes))
    return found


def _from_files(operation: str, prompt: Any, node: str, name: str, found: Found) -> Weights:
    from alkahest.recipes.text import names_in, parse
    from alkahest.sources.lora import open_input
    from alkahest.workflow.reading import Reading

    graph = read_graph(prompt)
    reading = Reading(graph, None)
    reading.files = found.files
    value = reading.model(graph.get(str(node)) or Node(str(node), "node", {}), name)
    if value.kind != WEIGHTS:
        raise MismatchError(operation, f"{name} is {value.kind}, not a model", expected="a model", found=value.plain)
    for one, file in found.files.items():
        if one not in found.opened:
            found.opened[one] = open_input(path_of(file.folder, file.name), name=one)
            found.notes += _oddities(found.opened[one])
    weights = parse(value.text, {one: found.opened[one] for one in names_in(value.text)})
    if not isinstance(weights, Weights):
        raise RecipeError(operation, f"what is behind {name} is no complete model", found=value.plain)
    found.notes += [f"note: {note}" for note in reading.notes]
    return weights


def _oddities(opened: Any) -> list[str]:
    """What is unusual about a file, in lines; a LoRA's own are in its recipe."""
    if not isinstance(opened, Leading):
        return []
    lines = [f"note: {opened.name}: {text}" for text in opened.oddities]
    if opened.extras:
        names = ", ".join(list(opened.extras)[:3])
        lines.append(f"note: {opened.name}: {len(opened.extras)} tensors are no part of the model: {names}")
    return lines


def left_beside(prompt: Any, node: str) -> list[str]:
    """Warnings of the LoRAs that the models of a node sample with and do not contain."""
    try:
        graph = read_graph(prompt)
    except AlkahestError:
        return []
    beside = [one for one in _upstream(graph, str(node)) if one.kind in _BESIDE]
    return [f"warning: {one} applies its LoRA while sampling only, and it is not in these weights" for one in beside]


def _upstream(graph: Graph, node: str) -> list[Node]:
    found, waiting = dict[str, Node](), [node]
    while waiting:
        one = graph.get(waiting.pop())
        if one is not None and one.id not in found:
            found[one.id] = one
            waiting += [link.node for link in one.inputs.values() if isinstance(link, Link)]
    return list(found.values())


def with_used(prompt: Any, model: Any) -> Any:
    """The graph with the multipliers that our nodes used in place of links to nodes that computed them."""
    used = model.attachments.get(NOTED) or {}
    copied = json.loads(json.dumps(prompt))
    for node, multiplier in used.items():
        if isinstance(copied, dict) and isinstance(copied.get(node), dict):
            copied[node].setdefault("inputs", {})["multiplier"] = multiplier
    return copied


def path_of(folder: str, name: str) -> str:
    """Where ComfyUI finds a model file."""
    import folder_paths

    try:
        return str(folder_paths.get_full_path_or_raise(folder, name))
    except FileNotFoundError as error:
        raise RecipeError("workflow", f"{folder}/{name} is not found", found=str(error)[:200]) from None

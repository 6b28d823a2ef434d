"""Follow a ComfyUI graph backwards from an input: which model arrives there, of which files, and what is lost."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from alkahest.algebra.expression import identifier
from alkahest.errors import AlkahestError, RecipeError
from alkahest.workflow import values
from alkahest.workflow.community import COMMUNITY
from alkahest.workflow.core_nodes import CLIP_TOO, CORE
from alkahest.workflow.editor import Absent, Link
from alkahest.workflow.folders import ModelFile
from alkahest.workflow.graph import Graph, Node
from alkahest.workflow.own_nodes import OWN
from alkahest.workflow.passing import PASSING
from alkahest.workflow.values import TOTAL, Value, numbered

_OTHER_FAMILIES = (
    "ModelMergeSD",
    "ModelMergeFlux",
    "ModelMergeAuraflow",
    "ModelMergeMochi",
    "ModelMergeLTXV",
    "ModelMergeCosmos",
    "ModelMergeWAN",
    "ModelMergeQwen",
    "ModelMergeKrea2",
    "DonutModelMergeKrea2",
    "EasygoingNodes_ModelMergeKrea2",
    "ImageOnlyCheckpointLoader",
)
_READABLE = (".safetensors", ".sft")  # of a file that a recipe can be run with
_MAX_DEPTH = 140  # nodes in a row; an expression nests as deep as that
_KINDS = {**COMMUNITY, **CORE, **OWN}


class Reading:
    """Follows the graph backwards from one node."""

    def __init__(self, graph: Graph, source: Path | None, saves: bool = True, passing: Collection[str] = ()) -> None:
        self.graph, self.source, self.saves = graph, source, saves
        self.passing = frozenset(passing)  # kinds of nodes of which the caller says that they change no weights
        self.files: dict[str, ModelFile] = {}
        self.notes: list[str] = []
        self.computed: dict[str, str] = {}  # id of a node that computes a multiplier -> the name it has in the recipe
        self._known: dict[Link, Value] = {}
        self._path: list[str] = []

    def model(self, node: Node, name: str) -> Value:
        """What arrives at an input of type MODEL."""
        link = node.inputs.get(name)
        if not isinstance(link, Link):
            why = link.why if isinstance(link, Absent) else "nothing is connected to it"
            raise self.refusal(node, f"{name} is missing: {why}")
        if link in self._known:
            return self._known[link]
        origin = self.graph.get(link.node)
        if origin is None:
            raise self.refusal(node, f"{name} comes from node {link.node}, which does not exist")
        if link.slot != 0:
            raise self.refusal(
                node, f"{name} takes output {link.slot} of {origin}, which is no model", expected="output 0"
            )
        if origin.id in self._path:
            circle = " -> ".join([*self._path[self._path.index(origin.id) :], origin.id])
            raise self.refusal(
                node,
                "the graph runs in a circle",
                found=circle,
                fix="ComfyUI cannot run this either; take the loop out",
            )
        if len(self._path) >= _MAX_DEPTH:
            raise self.refusal(node, "the graph is too deep", expected=f"at most {_MAX_DEPTH} nodes in a row")
        self._path.append(origin.id)
        self._known[link] = found = self.of(origin, node)
        self._path.pop()
        return found

    def of(self, node: Node, after: Node) -> Value:
        """What a node puts out as MODEL."""
        if how := _KINDS.get(node.kind):
            return how(self, node)
        if node.kind in PASSING:
            self.pass_through(node)
            return self.model(node, "model")
        if node.kind in self.passing:
            self.notes.append(f"{node} is passed through because you said that it changes no weights")
            return self.model(node, "model")
        if node.kind.startswith(_OTHER_FAMILIES):
            raise self.refusal(node, "this node is for another family of models", expected="Z-Image")
        raise self.refusal(
            node,
            f"what this node does to a model is not known, and {after} takes its output",
            expected=", ".join([*CORE, *OWN, "..."]),
            fix="it is a group node of an older editor: unpack it there and save again"
            if node.kind.startswith("workflow")
            else f"if it changes no weights: --passing {node.kind!r}, or passing= in Python; else save the model "
            "before it and start from that file",
        )

    def pass_through(self, node: Node) -> None:
        settings = ", ".join(
            f"{name} = {value}" for name, value in node.inputs.items() if isinstance(value, (int, float))
        )
        self.notes.append(
            f"{node} changes how the model is sampled, not its weights{f': {settings}' if settings else ''}"
        )
        if node.kind == "ModelSamplingSD3":
            self.notes.append(
                f"{node} is wrong for Z-Image: it passes times a thousand times too large; use ModelSamplingAuraFlow"
            )

    def number(self, node: Node, name: str, default: float | None = None) -> float:
        value = self.literal(node, name, default)
        try:
            number = float(value) if type(value) in (int, float) else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.refusal(
                node,
                f"{name} is not a number",
                found=f"{value!r:.200}" if number != math.inf else "more than a number can be",
            )
        return number

    def literal(self, node: Node, name: str, default: Any = None) -> Any:
        """The value of a widget, through nodes that hold one."""
        value, seen = node.inputs.get(name, default), 0
        while isinstance(value, Link) and seen < _MAX_DEPTH:
            origin, seen = self.graph.get(value.node), seen + 1
            if origin is not None and origin.kind == "ComfySwitchNode" and seen < 20:
                value = origin.inputs.get(self.switched(origin))
                continue
            if origin is None or not origin.kind.startswith("Primitive"):
                raise self.refusal(
                    node,
                    f"{name} is computed while the graph runs",
                    found=f"it comes from {origin or 'node ' + value.node}",
                    fix="type the number in",
                )
            value = origin.inputs.get("value")
        if isinstance(value, Absent):
            raise self.refusal(node, f"{name} is missing: {value.why}")
        if value is None or isinstance(value, Link):
            raise self.refusal(node, f"{name} is missing")
        return value

    def switched(self, node: Node) -> str:
        """The input that a switch lets through."""
        on = self.literal(node, "switch", False)
        if type(on) is not bool:
            raise self.refusal(node, "its switch is neither on nor off", found=repr(on)[:80])
        return "on_true" if on else "on_false"

    def plus_lora(self, node: Node, weights: Value, lora: Any, strength: float) -> Value:
        """Weights with a LoRA's file at a strength, as ComfyUI loads it: nothing at zero."""
        if strength == 0.0:
            return weights
        if isinstance(node.inputs.get("clip"), Link):
            self.notes.append(CLIP_TOO.format(node))
        name = self.named_file(node, "loras", lora)
        if weights.kind == TOTAL:
            raise self.refusal(node, "a LoRA on a sum of models that is none yet", found=weights.text)
        return values.plus(weights, values.times(strength, values.named_delta(name)))

    def file(self, node: Node, folder: str, name: str) -> str:
        """The name in the recipe of the file that a loader loads."""
        return self.named_file(node, folder, self.literal(node, name), name)

    def named_file(self, node: Node, folder: str, text: Any, name: str = "the LoRA") -> str:
        if not isinstance(text, str):
            raise self.refusal(node, f"{name} is not a file's name", found=str(text)[:200])
        suffix = Path(text).suffix.lower()
        if suffix and suffix not in _READABLE and len(suffix) < 8:
            self.notes.append(
                f"{node} loads {text}: Alkahest reads no {suffix} files; convert it to .safetensors first"
            )
        for known, file in self.files.items():
            if (file.folder, file.name) == (folder, text):
                return known
        chosen = next(one for one in numbered(identifier(Path(text.replace("\\", "/")))) if one not in self.files)
        self.files[chosen] = ModelFile(folder, text, str(node))
        return chosen

    def refusal(self, node: Node, problem: str, **facts: Any) -> AlkahestError:
        return RecipeError("workflow", f"{node}: {problem}", file=self.source, **facts)

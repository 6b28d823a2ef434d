"""A ComfyUI graph -> the recipes of the models that it saves, or else draws with.

Sources: ComfyUI's ``comfy_extras/nodes_model_merging.py``, ``nodes.py`` and ``comfy/lora.py`` for what the nodes do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alkahest.algebra.expression import identifier
from alkahest.engine.record import Recipe
from alkahest.engine.scalars import text_of
from alkahest.errors import AlkahestError, RecipeError, nearest
from alkahest.workflow import values
from alkahest.workflow.community import COMMUNITY
from alkahest.workflow.editor import Absent, Link
from alkahest.workflow.folders import ModelFile, find_model
from alkahest.workflow.graph import Graph, Node
from alkahest.workflow.passing import PASSING
from alkahest.workflow.values import DELTA, TOTAL, WEIGHTS, Value

# And the layout that they write.
SAVERS = {"ModelSave": "native", "CheckpointSave": None, "AlkahestSave": "native"}
EXTRACTORS = ("LoraSave",)
# Nodes that draw: the input through which their model comes.
_SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "CFGGuider", "BasicGuider", "DualCFGGuider")
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
_OTHER_ENCODERS = (
    "DualCLIPLoader",
    "TripleCLIPLoader",
    "QuadrupleCLIPLoader",
    "DualCLIPLoaderGGUF",
    "TripleCLIPLoaderGGUF",
    "QuadrupleCLIPLoaderGGUF",
)
_ENCODERS = ("CLIPLoader", "CLIPLoaderGGUF")
_READABLE = (".safetensors", ".sft")  # of a file that a recipe can be run with
# With these ComfyUI makes of qwen_3_4b what Z-Image needs.
_ENCODER_TYPES = ("lumina2", "stable_diffusion", "qwen_image")
CLIP_TOO = "{} may also change the text encoder, which is not part of a recipe"
_MAX_DEPTH = 140  # nodes in a row; an expression nests as deep as that


@dataclass(frozen=True)
class WorkflowRecipe(Recipe):
    """The recipe of one model in a workflow: text, the file behind each name, and what could not be said in it.

    ``node`` is the id of the node that saves the model or draws with it, ``saved_as`` a saver's prefix. ``output``
    asks for ``comfy_compatible``, so that an unquantised merge has the bits that ComfyUI gives it on a CPU.
    """

    node: str = ""
    saved_as: str = ""
    files: dict[str, ModelFile] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    plain: str = ""  # the text as a person would write it, with factors multiplied out; the same model to a rounding
    computed: tuple[str, ...] = ()  # names of multipliers that the graph computes while it runs
    source: Path | None = None

    def locate(self, models: Any) -> dict[str, Path]:
        """Where each of its files lies in ComfyUI's models folder; see `alkahest.workflow.folders.find_model`."""
        return {name: find_model(file, models, self.source) for name, file in self.files.items()}


def recipes_of(graph: Graph, source: Path | None = None, node: str | None = None) -> list[WorkflowRecipe]:
    """One recipe for every node that saves a model, or for one of them; if there is none, for every model that is
    sampled.
    """
    found = [node for node in graph.values() if node.kind in SAVERS or node.kind in EXTRACTORS]
    found = found or [node for node in graph.values() if node.kind in _SAMPLERS]
    if not found:
        raise RecipeError(
            "workflow",
            "the workflow neither saves nor samples a model",
            file=source,
            expected=", ".join([*SAVERS, *_SAMPLERS[:3]]),
            found=", ".join(sorted({node.kind for node in graph.values()}))[:500],
        )
    chosen = [one for one in found if node in (None, one.id)]
    if not chosen:
        raise RecipeError(
            "workflow", f"no node {node} saves a model", file=source, fix=nearest(str(node), [one.id for one in found])
        )
    made, failed = _each(graph, source, chosen)
    if not made:
        errors = [error for _, error in failed]
        raise next((error for error in errors if "is missing" not in error.problem), errors[0])
    notes = [f"{one} is not read: {error.problem}" for one, error in failed]
    made = [replace(recipe, notes=[*recipe.notes, *notes]) for recipe in made]
    if found[0].kind not in _SAMPLERS:
        return made
    return list({recipe.text: recipe for recipe in reversed(made)}.values())[::-1]  # two samplers, one model


def _each(
    graph: Graph, source: Path | None, chosen: list[Node]
) -> tuple[list[WorkflowRecipe], list[tuple[Node, AlkahestError]]]:
    """The recipes of outputs, and why others have none: one that cannot be read spoils no other."""
    made: list[WorkflowRecipe] = []
    failed: list[tuple[Node, AlkahestError]] = []
    for one in chosen:
        try:
            made.append(Reading(graph, source, saves=one.kind not in _SAMPLERS).recipe(one))
        except AlkahestError as error:
            failed.append((one, error))
    return made, failed


class Reading:
    """Follows the graph backwards from one node."""

    def __init__(self, graph: Graph, source: Path | None, saves: bool = True) -> None:
        self.graph, self.source, self.saves = graph, source, saves
        self.files: dict[str, ModelFile] = {}
        self.notes: list[str] = []
        self.computed: dict[str, str] = {}  # id of a node that computes a multiplier -> the name it has in the recipe
        self._known: dict[Link, Value] = {}
        self._path: list[str] = []

    def recipe(self, node: Node) -> WorkflowRecipe:
        if node.kind in EXTRACTORS:
            return self.extraction(node)
        value = self.model(node, "model")
        if value.kind != WEIGHTS:
            what = "which is no model yet; add it to one" if value.kind == DELTA else "whose factors do not add up to 1"
            raise self.refusal(node, f"the model that arrives is {value.kind}, {what}", found=value.text)
        output: dict[str, Any] = {"comfy_compatible": True}
        if layout := SAVERS.get(node.kind):
            output["layout"] = layout
        if node.kind == "CheckpointSave":
            self.companions(node)
        self.require_family(node)
        return self.written(node, value.text, output, value.plain)

    def extraction(self, node: Node) -> WorkflowRecipe:
        """LoraSave: a LoRA of the difference that arrives."""
        value = self.model(node, "model_diff")
        if value.kind != DELTA:
            raise self.refusal(node, f"what arrives is {value.kind}, not a difference", found=value.text)
        kind, rank = self.literal(node, "lora_type", "standard"), self.number(node, "rank", 8)
        if kind != "standard":
            raise self.refusal(node, "only its standard LoRAs are read", found=f"lora_type: {kind}")
        self.notes.append(
            f"{node} rounds the difference first, clamps its factors and adds .diff of norms and biases: a LoRA from "
            "alkahest extract-lora is nearer to it, and another file"
        )
        self.require_family(node)
        return self.written(node, f"extract_lora({value.text}, rank={rank:.0f})", {})

    def written(self, node: Node, text: str, output: dict[str, Any], plain: str = "") -> WorkflowRecipe:
        saved_as = node.inputs.get("filename_prefix", "") if self.saves else ""
        return WorkflowRecipe(
            text,
            output=output,
            node=node.id,
            saved_as=saved_as if isinstance(saved_as, str) else "",
            files=self.files,
            notes=list(dict.fromkeys(self.notes)),
            plain=plain or text,
            computed=tuple(self.computed.values()),
            source=self.source,
        )

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
        if how := _NODES.get(node.kind) or COMMUNITY.get(node.kind):
            return how(self, node)
        if node.kind in PASSING:
            self.pass_through(node)
            return self.model(node, "model")
        if node.kind.startswith(_OTHER_FAMILIES):
            raise self.refusal(node, "this node is for another family of models", expected="Z-Image")
        raise self.refusal(
            node,
            f"what this node does to a model is not known, and {after} takes its output",
            expected=", ".join([*_NODES, "..."]),
            fix="it is a group node of an older editor: unpack it there and save again"
            if node.kind.startswith("workflow")
            else "take it out, or save the model before it and start from that file",
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
        chosen = next(one for one in _number_names(identifier(Path(text.replace("\\", "/")))) if one not in self.files)
        self.files[chosen] = ModelFile(folder, text, str(node))
        return chosen

    def companions(self, node: Node) -> None:
        """CheckpointSave also writes a text encoder and a VAE; a recipe carries those of its leading file."""
        leading = next(iter(self.files.values()), None)
        for name in ("clip", "vae"):
            link = node.inputs.get(name)
            origin = self.graph.get(link.node) if isinstance(link, Link) else None
            led = (
                origin and leading and (leading.folder, leading.name) == ("checkpoints", origin.inputs.get("ckpt_name"))
            )
            if origin is None or origin.kind != "CheckpointLoaderSimple" or not led:
                self.notes.append(
                    f"{node} also saves a {name} from {origin or 'nowhere'}, which a recipe does not carry"
                )

    def require_family(self, node: Node) -> None:
        """Refuse a model that is used with a text encoder as Z-Image has none; its own files are not opened here."""
        waiting, seen, told = [node.id], {node.id}, False
        while waiting:
            for link in self.graph[waiting.pop()].inputs.values():
                origin = self.graph.get(link.node) if isinstance(link, Link) else None
                if origin is None or origin.id in seen:
                    continue
                kind = origin.inputs.get("type") if origin.kind in _ENCODERS else None
                told = told or kind in _ENCODER_TYPES
                if origin.kind in _OTHER_ENCODERS or (isinstance(kind, str) and kind not in _ENCODER_TYPES):
                    raise self.refusal(
                        origin,
                        "this text encoder is for another family of models",
                        expected="Z-Image: CLIPLoader with type lumina2",
                        found=f"{origin.kind} {kind}",
                    )
                seen.add(origin.id)
                waiting.append(origin.id)
        if not told and not self.saves:
            self.notes.append(
                "no text encoder in the graph says that this is Z-Image: the files do when they are opened"
            )

    def refusal(self, node: Node, problem: str, **facts: Any) -> AlkahestError:
        return RecipeError("workflow", f"{node}: {problem}", file=self.source, **facts)


def _number_names(stem: str) -> Iterator[str]:
    yield stem
    number = 2
    while True:
        yield f"{stem}_{number}"
        number += 1


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


def _our_merge(reading: Reading, node: Node) -> Value:
    bridge, variant, base = (reading.model(node, name) for name in ("bridge", "variant", "base"))
    for name, value in (("bridge", bridge), ("variant", variant), ("base", base)):
        if value.kind != WEIGHTS:
            raise reading.refusal(node, f"{name} is {value.kind}, not a model", found=value.text)
    # Zero on what is protected, and not .protect(): that would hold for what later nodes add as well.
    delta = values.difference(variant, base, _and_pads(str(reading.literal(node, "protect", "refiner"))))
    factor, parts = _factor(reading, node), str(reading.literal(node, "parts", ""))
    if not parts.strip():
        return values.plus(bridge, values.times(factor, delta))
    inside = ", ".join(f"{pattern!r}: {text_of(value)}" for pattern, value in parts_of(parts).items())
    return values.plus(bridge, values.times(factor, values.named_delta(f"{delta.text}.scaled({{{inside}}})")))


def _our_subtract(reading: Reading, node: Node) -> Value:
    first, second = reading.model(node, "model1"), reading.model(node, "model2")
    if not first.kind == second.kind == WEIGHTS:
        raise reading.refusal(node, "this node subtracts a model from a model", found=f"{first.kind} and {second.kind}")
    kept = "refiner" if reading.literal(node, "keep_refiner", True) else ""
    return values.times(_factor(reading, node), values.difference(first, second, _and_pads(kept)))


def _our_add(reading: Reading, node: Node) -> Value:
    first, second = reading.model(node, "model1"), reading.model(node, "model2")
    if (first.kind, second.kind) != (WEIGHTS, DELTA):
        raise reading.refusal(
            node,
            "this node adds a difference to a model",
            expected="model1 a model, model2 a difference",
            found=f"{first.kind} and {second.kind}",
        )
    kept = values.without(second, "refiner") if reading.literal(node, "keep_refiner", True) else second
    return values.plus(first, values.times(_factor(reading, node), kept))


def _and_pads(pattern: str) -> str:
    """ComfyUI never merges pad tokens: they are parameters of a module that has others below it."""
    return f"{pattern.strip()}, pad_tokens" if pattern.strip() else "pad_tokens"


def _factor(reading: Reading, node: Node) -> float | str:
    """A multiplier: a number, or the name of one if our Multiplier node computes it."""
    link = node.inputs.get("multiplier")
    origin = reading.graph.get(link.node) if isinstance(link, Link) else None
    if origin is None or origin.kind != "AlkahestMultiplier":
        return reading.number(node, "multiplier")
    names = _number_names("k_auto")
    name = reading.computed.get(origin.id) or next(one for one in names if one not in reading.computed.values())
    reading.computed[origin.id] = name
    reading.notes.append(f"{origin} computes the multiplier of {node}: give it by --{name} NUMBER, or --{name} auto")
    return name


def parts_of(text: str) -> dict[str, float]:
    """``"layers.0-9: 1.5, embedders: 0"`` as pattern -> factor; RecipeError for anything else."""
    found: dict[str, float] = {}
    for piece in filter(None, (piece.strip() for piece in text.replace("\n", ",").split(","))):
        pattern, colon, number = piece.rpartition(":")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not colon or not pattern.strip() or not math.isfinite(value):
            raise RecipeError(
                "parts",
                "a part and its factor cannot be read",
                expected="such as layers.0-9: 1.5, embedders: 0",
                found=piece[:200],
            )
        found.pop(pattern.strip(), None)  # the last that fits counts
        found[pattern.strip()] = value
    return found


_NODES: Mapping[str, Callable[[Reading, Node], Value]] = {
    "UNETLoader": _unet,
    "CheckpointLoaderSimple": _checkpoint,
    "ModelMergeSubtract": _subtract,
    "ModelMergeAdd": _add,
    "ModelMergeSimple": _simple,
    "ModelMergeBlocks": _blocks,
    "LoraLoaderModelOnly": _lora,
    "LoraLoader": _lora,
    "ComfySwitchNode": _switch,
    "AlkahestMerge": _our_merge,
    "AlkahestSubtract": _our_subtract,
    "AlkahestAdd": _our_add,
}

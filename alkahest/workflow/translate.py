"""A ComfyUI graph -> the recipes of the models that it saves, or else draws with."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alkahest.engine.record import Recipe
from alkahest.errors import AlkahestError, RecipeError, nearest
from alkahest.workflow.editor import Link
from alkahest.workflow.folders import ModelFile, find_model
from alkahest.workflow.graph import Graph, Node
from alkahest.workflow.reading import Reading
from alkahest.workflow.values import DELTA, WEIGHTS

# And the layout that they write.
SAVERS = {"ModelSave": "native", "CheckpointSave": None, "AlkahestSave": "native"}
EXTRACTORS = ("LoraSave",)
# Nodes that draw: the input through which their model comes.
_SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "CFGGuider", "BasicGuider", "DualCFGGuider")
_OTHER_ENCODERS = (
    "DualCLIPLoader",
    "TripleCLIPLoader",
    "QuadrupleCLIPLoader",
    "DualCLIPLoaderGGUF",
    "TripleCLIPLoaderGGUF",
    "QuadrupleCLIPLoaderGGUF",
)
_ENCODERS = ("CLIPLoader", "CLIPLoaderGGUF")
# With these ComfyUI makes of qwen_3_4b what Z-Image needs.
_ENCODER_TYPES = ("lumina2", "stable_diffusion", "qwen_image")


@dataclass(frozen=True)
class WorkflowRecipe(Recipe):
    """The recipe of one model in a workflow: text, the file behind each name, and what could not be said in it.

    ``node`` is the id of the node that saves the model or draws with it, ``saved_as`` a saver's prefix. ``output``
    asks for ``comfy_compatible``, so that an unquantised merge has the bits that ComfyUI gives it on a CPU.
    """

    node: str = ""  # the one that saves the model or draws with it
    saved_as: str = ""  # a saver's prefix
    files: dict[str, ModelFile] = field(default_factory=dict)  # name -> the file that a loader names
    notes: list[str] = field(default_factory=list)  # what could not be said, and what was left out
    plain: str = ""  # the text as a person would write it, with factors multiplied out; the same model to a rounding
    computed: tuple[str, ...] = ()  # names of multipliers that the graph computes while it runs
    source: Path | None = None  # the workflow's file

    def locate(self, models: Any) -> dict[str, Path]:
        """Where each of its files lies in ComfyUI's models folder; see `alkahest.workflow.folders.find_model`."""
        return {name: find_model(file, models, self.source) for name, file in self.files.items()}


def recipes_of(
    graph: Graph, source: Path | None = None, node: str | None = None, passing: Collection[str] = ()
) -> list[WorkflowRecipe]:
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
    made, failed = _each(graph, source, chosen, passing)
    if not made:
        errors = [error for _, error in failed]
        raise next((error for error in errors if "is missing" not in error.problem), errors[0])
    notes = [f"{one} is not read: {error.problem}" for one, error in failed]
    made = [replace(recipe, notes=[*recipe.notes, *notes]) for recipe in made]
    if found[0].kind not in _SAMPLERS:
        return made
    return list({recipe.text: recipe for recipe in reversed(made)}.values())[::-1]  # two samplers, one model


def _each(
    graph: Graph, source: Path | None, chosen: list[Node], passing: Collection[str]
) -> tuple[list[WorkflowRecipe], list[tuple[Node, AlkahestError]]]:
    """The recipes of outputs, and why others have none: one that cannot be read spoils no other."""
    made: list[WorkflowRecipe] = []
    failed: list[tuple[Node, AlkahestError]] = []
    for one in chosen:
        try:
            made.append(_saved(Reading(graph, source, one.kind not in _SAMPLERS, passing), one))
        except AlkahestError as error:
            failed.append((one, error))
    return made, failed


def _saved(reading: Reading, node: Node) -> WorkflowRecipe:
    if node.kind in EXTRACTORS:
        return _extraction(reading, node)
    value = reading.model(node, "model")
    if value.kind != WEIGHTS:
        what = "which is no model yet; add it to one" if value.kind == DELTA else "whose factors do not add up to 1"
        raise reading.refusal(node, f"the model that arrives is {value.kind}, {what}", found=value.text)
    output: dict[str, Any] = {"comfy_compatible": True}
    if layout := SAVERS.get(node.kind):
        output["layout"] = layout
    if node.kind == "CheckpointSave":
        _note_companions(reading, node)
    _require_family(reading, node)
    return _written(reading, node, value.text, output, value.plain)


def _extraction(reading: Reading, node: Node) -> WorkflowRecipe:
    """LoraSave: a LoRA of the difference that arrives."""
    value = reading.model(node, "model_diff")
    if value.kind != DELTA:
        raise reading.refusal(node, f"what arrives is {value.kind}, not a difference", found=value.text)
    kind, rank = reading.literal(node, "lora_type", "standard"), reading.number(node, "rank", 8)
    if kind != "standard":
        raise reading.refusal(node, "only its standard LoRAs are read", found=f"lora_type: {kind}")
    reading.notes.append(
        f"{node} rounds the difference first, clamps its factors and adds .diff of norms and biases: a LoRA from "
        "alkahest extract-lora is nearer to it, and another file"
    )
    _require_family(reading, node)
    return _written(reading, node, f"extract_lora({value.text}, rank={rank:.0f})", {})


def _written(reading: Reading, node: Node, text: str, output: dict[str, Any], plain: str = "") -> WorkflowRecipe:
    saved_as = node.inputs.get("filename_prefix", "") if reading.saves else ""
    return WorkflowRecipe(
        text,
        output=output,
        node=node.id,
        saved_as=saved_as if isinstance(saved_as, str) else "",
        files=reading.files,
        notes=list(dict.fromkeys(reading.notes)),
        plain=plain or text,
        computed=tuple(reading.computed.values()),
        source=reading.source,
    )


def _note_companions(reading: Reading, node: Node) -> None:
    """CheckpointSave also writes a text encoder and a VAE; a recipe carries those of its leading file."""
    leading = next(iter(reading.files.values()), None)
    for name in ("clip", "vae"):
        link = node.inputs.get(name)
        origin = reading.graph.get(link.node) if isinstance(link, Link) else None
        led = origin and leading and (leading.folder, leading.name) == ("checkpoints", origin.inputs.get("ckpt_name"))
        if origin is None or origin.kind != "CheckpointLoaderSimple" or not led:
            reading.notes.append(
                f"{node} also saves a {name} from {origin or 'nowhere'}, which a recipe does not carry"
            )


def _require_family(reading: Reading, node: Node) -> None:
    """Refuse a model that is used with a text encoder as Z-Image has none; its own files are not opened here."""
    waiting, seen, told = [node.id], {node.id}, False
    while waiting:
        for link in reading.graph[waiting.pop()].inputs.values():
            origin = reading.graph.get(link.node) if isinstance(link, Link) else None
            if origin is None or origin.id in seen:
                continue
            kind = origin.inputs.get("type") if origin.kind in _ENCODERS else None
            told = told or kind in _ENCODER_TYPES
            if origin.kind in _OTHER_ENCODERS or (isinstance(kind, str) and kind not in _ENCODER_TYPES):
                raise reading.refusal(
                    origin,
                    "this text encoder is for another family of models",
                    expected="Z-Image: CLIPLoader with type lumina2",
                    found=f"{origin.kind} {kind}",
                )
            seen.add(origin.id)
            waiting.append(origin.id)
    if not told and not reading.saves:
        reading.notes.append(
            "no text encoder in the graph says that this is Z-Image: the files do when they are opened"
        )

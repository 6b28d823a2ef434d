"""An expression -> a ComfyUI graph: core nodes where they can say it, Alkahest's where they cannot.

ComfyUI's ModelMergeSubtract takes a multiplier of at most 10 and ModelMergeAdd none, so 171.1 becomes
``10 * 10 * 1.711``: a difference is multiplied once more by subtracting a model minus itself from it, which is zero.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from alkahest.algebra.deltas import Delta, DeltaSum, Difference, Everywhere, Masked, Scaled, ScaledParts
from alkahest.algebra.expression import Expression
from alkahest.algebra.leaves import Leaf
from alkahest.algebra.mixtures import Mixture
from alkahest.algebra.weights import Protected, Sum, Weights
from alkahest.engine.scalars import Param, Scalar, Varied, text_of
from alkahest.errors import AlgebraError, OutputError, refuse_unknown_options, unknown
from alkahest.files.paths import expanded
from alkahest.files.whole import write_text
from alkahest.sources.lora import Lora
from alkahest.workflow.editor_form import to_editor
from alkahest.workflow.folders import FOLDERS
from alkahest.workflow.values import rest_of

FORMS = ("editor", "api")
LIMIT = 10.0  # of ModelMergeSubtract's multiplier, either side of zero; the server refuses more
OUR_LIMIT = 1e6  # of Alkahest Merge's
_LORA_LIMIT = 100.0
PADS = "ComfyUI merges no pad tokens: they stay the first model's"


@refuse_unknown_options
def write_workflow(
    expression: Weights,
    path: str | os.PathLike[str],
    prefix: str = "diffusion_models/alkahest",
    form: str = "editor",
) -> list[str]:
    """Write an expression as a ComfyUI workflow that saves the model.

    Protection, factors by part and what else ComfyUI's own nodes cannot say becomes an Alkahest Merge node.

    Parameters
    ----------
    expression : Weights
        What the workflow is to merge; its files appear by name.
    path : str or path
        The JSON file.
    prefix : str, default "diffusion_models/alkahest"
        Under which ComfyUI saves the model.
    form : str, default "editor"
        ``editor`` for the form that the editor saves and opens with every digit, or ``api`` for the one that is posted
        to the server; the editor opens that too, but rounds its numbers to the steps of its widgets.

    Returns
    -------
    list of str
        What the graph does otherwise.

    Raises
    ------
    AlgebraError
        For what no node says (merge methods, made-up weights, numbers along the blocks); nothing is written then.
    OutputError
        For a checkpoint that ComfyUI cannot load.

    Examples
    --------
    >>> for name, model in {"bridge": bridge, "variant": variant, "base": base}.items():
    ...     saved = model.save(f"{name}.safetensors")
    >>> a, v, b = (ak.open(f"{name}.safetensors") for name in ("bridge", "variant", "base"))
    >>> notes = ak.write_workflow(a + 171.1 * (v - b), "merge.json")
    """
    if form not in FORMS:
        raise unknown("workflow", "unknown form of a workflow", form, FORMS)
    graph, notes = graph_of(expression, prefix)
    value = to_editor(graph) if form == "editor" else graph
    write_text(expanded(path, "save"), json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    return notes


def graph_of(expression: Weights, prefix: str = "diffusion_models/alkahest") -> tuple[dict[str, Any], list[str]]:
    """The graph of `write_workflow`, and its notes."""
    if not isinstance(expression, Weights):
        raise AlgebraError(
            "workflow",
            "a workflow saves a complete model",
            found=type(expression).__name__,
            fix="add the delta to a checkpoint",
        )
    writing = _Writing()
    last = writing.weights(expression)
    writing.node("ModelSave", model=last, filename_prefix=prefix)
    return writing.graph, list(dict.fromkeys(writing.notes))


class _Writing:
    def __init__(self) -> None:
        self.graph: dict[str, Any] = {}
        self.notes: list[str] = []
        self._known: dict[Any, list[Any]] = {}

    def node(self, kind: str, **inputs: Any) -> list[Any]:
        """A node, once for the same inputs; the link to its first output."""
        key = (kind, repr(inputs))
        if key not in self._known:
            name = str(len(self.graph) + 1)
            self.graph[name] = {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}
            self._known[key] = [name, 0]
        return self._known[key]

    def weights(self, one: Expression) -> list[Any]:
        match one:
            case Leaf() if one.files:
                return self.checkpoint(one)
            case Protected():
                return self.weights(one.weights)
            case Sum():
                self.notes.append(PADS)
                start, protect = self.weights(one.weights), ", ".join(dict.fromkeys(one.weights.protection))
                for factor, delta in _terms_of(one.delta):
                    start = self.add_term(start, factor, delta, protect, one.weights)
                return start
            case Mixture():
                return self.mixture(one)
        raise _unsaid(one)

    def mixture(self, one: Mixture) -> list[Any]:
        self.notes.append(PADS)
        first, protect = self.weights(one.operands[0]), ", ".join(dict.fromkeys(one.protection))
        shares = [_value(share) for share in (one.first_share, *one.shares)][1:]
        if one.is_lerp and not protect and 0.0 <= shares[0] <= 1.0:
            return self.node(
                "ModelMergeSimple", model1=first, model2=self.weights(one.operands[1]), ratio=rest_of(shares[0])
            )
        mixed = first
        for share, other in zip(shares, one.operands[1:], strict=True):
            if protect:
                mixed = self.merge(mixed, self.weights(other), first, share, protect, "")
            else:
                mixed = self.node(
                    "ModelMergeAdd", model1=mixed, model2=self.subtract(self.weights(other), first, share)
                )
        return mixed

    def add_term(self, start: list[Any], factor: float, delta: Delta, protect: str, weights: Weights) -> list[Any]:
        """One term of a sum: a core node if it changes all tensors alike, else Alkahest Merge."""
        if isinstance(delta, Lora):
            return self.lora(start, factor, delta, protect, weights)
        if isinstance(delta, Difference) and not protect:
            variant, base = self.weights(delta.variant), self.weights(delta.base)
            return self.node("ModelMergeAdd", model1=start, model2=self.subtract(variant, base, factor))
        kept: list[str] = []
        parts = ""
        while not isinstance(delta, Difference):
            match delta:
                case Scaled():
                    factor *= _value(delta.factor)
                case Everywhere():
                    protect = ""
                case Masked(keep=False):
                    kept.append(delta.pattern)
                case Masked() if not parts:
                    parts = _parts([("all", 0.0), (delta.pattern, 1.0)])
                case ScaledParts() if not parts:
                    parts = _parts([(pattern, _value(number)) for pattern, number in delta.factors])
                case _:
                    raise _unsaid(delta)
            delta = delta.delta
        return self.merge(
            start,
            self.weights(delta.variant),
            self.weights(delta.base),
            factor,
            ", ".join(filter(None, [protect, *kept])),
            parts,
        )

    def merge(self, bridge: Any, variant: Any, base: Any, factor: float, protect: str, parts: str) -> list[Any]:
        if abs(factor) > OUR_LIMIT:
            raise AlgebraError(
                "workflow", f"Alkahest Merge takes a multiplier of at most {OUR_LIMIT:g}", found=f"{factor:g}"
            )
        return self.node(
            "AlkahestMerge", bridge=bridge, variant=variant, base=base, multiplier=factor, protect=protect, parts=parts
        )

    def subtract(self, variant: list[Any], base: list[Any], factor: float) -> list[Any]:
        """``factor * (variant - base)`` by core nodes, however large the factor."""
        first, *more = _split(factor)
        delta = self.node("ModelMergeSubtract", model1=variant, model2=base, multiplier=first)
        for number in more:
            zero = self.node("ModelMergeSubtract", model1=base, model2=base, multiplier=1.0)
            delta = self.node("ModelMergeSubtract", model1=delta, model2=zero, multiplier=number)
        return delta

    def lora(self, start: list[Any], factor: float, lora: Lora, protect: str, weights: Weights) -> list[Any]:
        name = _file_name(lora.path, "loras", lora.text())
        if protect and any(weights.is_protected(key) for key in lora.shapes):
            # Alkahest Merge keeps what is protected: the LoRA on the model, less the model.
            changed = self.node("LoraLoaderModelOnly", model=start, lora_name=name, strength_model=1.0)
            return self.merge(start, changed, start, factor, protect, "")
        if abs(factor) > _LORA_LIMIT:
            raise AlgebraError(
                "workflow", "LoraLoaderModelOnly takes a strength of at most 100", found=f"{factor:g} * {lora.text()}"
            )
        return self.node("LoraLoaderModelOnly", model=start, lora_name=name, strength_model=factor)

    def checkpoint(self, one: Leaf) -> list[Any]:
        path = one.files[0].path
        if len(one.files) > 1 or one.layout != one.family.default_layout:
            place = path if len(one.files) == 1 else path.parent
            raise OutputError(
                "workflow",
                "ComfyUI cannot load this checkpoint",
                file=place,
                expected="one file with native names",
                found=f"{one.layout}, {len(one.files)} files",
                fix=f"alkahest convert {place} -o {one.name}.safetensors",
            )
        if one.companions:
            return self.node("CheckpointLoaderSimple", ckpt_name=_file_name(path, "checkpoints", one.name))
        return self.node("UNETLoader", unet_name=_file_name(path, "diffusion_models", one.name), weight_dtype="default")


def _terms_of(delta: Delta, factor: float = 1.0) -> Iterator[tuple[float, Delta]]:
    """The terms of a delta with their factors, sums taken apart."""
    match delta:
        case DeltaSum():
            yield from _terms_of(delta.left, factor)
            yield from _terms_of(delta.right, factor)
        case Scaled():
            yield from _terms_of(delta.delta, factor * _value(delta.factor))
        case _:
            yield factor, delta


def _split(factor: float) -> list[float]:
    """Factors of at most 10 with that product, the tens first, as the article splits 171.1.

    The point of the decimal is moved, and not the binary number divided: 1.711, and not 1.7109999999999999.
    """
    rest, found = Decimal(repr(float(factor))), []
    while abs(rest) > LIMIT:
        found.append(LIMIT)
        rest = rest.scaleb(-1)
    return [*found, float(rest)]


def _parts(factors: list[tuple[str, float]]) -> str:
    return ", ".join(f"{item.strip()}: {text_of(number)}" for pattern, number in factors for item in pattern.split(","))


def _value(scalar: Scalar) -> float:
    if isinstance(scalar, Varied):
        fix = "name the blocks: (variant - base).scaled({'layers.0': 0.1, 'layers.1': 0.2, ...})"
        raise AlgebraError("workflow", "no ComfyUI node says a number that varies so", found=repr(scalar), fix=fix)
    return scalar.value if isinstance(scalar, Param) else scalar


def _file_name(path: Path, folder: str, name: str) -> str:
    """A file as a loader names it: below ComfyUI's folder if it lies there, else by its own name."""
    parts = path.resolve().parts
    for one in FOLDERS[folder]:
        if one in parts[:-1]:
            return "/".join(parts[len(parts) - parts[::-1].index(one) :])
    return path.name


def _unsaid(one: Expression) -> AlgebraError:
    return AlgebraError(
        "workflow",
        "no ComfyUI node says this",
        found=f"{type(one).__name__}: {one.text()}"[:500],
        expected="files, sums with differences and LoRAs, lerp, weighted_sum",
        fix="save that part as a file, and start from it",
    )

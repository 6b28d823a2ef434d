"""What Alkahest's nodes for ComfyUI make of a model, as values of `alkahest.workflow.values`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from alkahest.engine.scalars import text_of
from alkahest.errors import RecipeError
from alkahest.workflow import values
from alkahest.workflow.editor import Link
from alkahest.workflow.values import DELTA, WEIGHTS, Value, numbered

if TYPE_CHECKING:
    from alkahest.workflow.graph import Node
    from alkahest.workflow.reading import Reading


def _merge(reading: Reading, node: Node) -> Value:
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


def _subtract(reading: Reading, node: Node) -> Value:
    first, second = reading.model(node, "model1"), reading.model(node, "model2")
    if not first.kind == second.kind == WEIGHTS:
        raise reading.refusal(node, "this node subtracts a model from a model", found=f"{first.kind} and {second.kind}")
    kept = "refiner" if reading.literal(node, "keep_refiner", True) else ""
    return values.times(_factor(reading, node), values.difference(first, second, _and_pads(kept)))


def _add(reading: Reading, node: Node) -> Value:
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
    names = numbered("k_auto")
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


OWN: Mapping[str, Callable[[Reading, Node], Value]] = {
    "AlkahestMerge": _merge,
    "AlkahestSubtract": _subtract,
    "AlkahestAdd": _add,
}

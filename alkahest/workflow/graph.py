"""A ComfyUI graph as its nodes and what feeds each of their inputs, from the API form or the one that the editor saves.

Sources: ComfyUI's ``execution.py`` for the API form; for the editor's form see `alkahest.workflow.editor`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alkahest.errors import RecipeError
from alkahest.files.reader import Reader
from alkahest.workflow.editor import Link, flatten

MAX_BYTES = 64 << 20  # the largest of ComfyUI's own 650 templates has 1 MB


@dataclass(frozen=True)
class Node:
    """A node: ``kind`` is ComfyUI's class_type; an input is a literal, a `Link`, or `Absent` with the reason."""

    id: str
    kind: str
    inputs: Mapping[str, Any]

    def __str__(self) -> str:
        return f"node {self.id} ({self.kind})"


Graph = dict[str, Node]


def json_in(reader: Reader) -> Any:
    """The JSON in a file, as ComfyUI writes it, NaN included; RecipeError for anything else."""
    if reader.size > MAX_BYTES:
        raise RecipeError(
            "workflow",
            "this is too long for a workflow",
            file=reader.path,
            expected=f"at most {MAX_BYTES:,} bytes",
            found=f"{reader.size:,}",
        )
    return parsed_json(reader.read(0, reader.size), reader.path)


def parsed_json(text: bytes, file: object) -> Any:
    """`json_in` for text that was read already."""
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            "workflow", "this is not valid JSON", file=file, found=str(error)[:200] or "nesting too deep"
        ) from None


def read_graph(value: Any, file: object = None) -> Graph:
    """The nodes of a workflow, in whichever form; RecipeError for JSON that is none."""
    if isinstance(value, dict) and isinstance(value.get("nodes"), list):
        try:
            return {one: Node(one, kind, inputs) for one, kind, inputs in flatten(value, file)}
        except RecursionError:
            raise RecipeError(
                "workflow", "the graph is too deep", file=file, expected="at most some hundred reroutes in a row"
            ) from None
    if isinstance(value, dict) and isinstance(value.get("prompt"), dict):  # as it is sent to the server
        value = value["prompt"]
    if not isinstance(value, dict) or not any(
        isinstance(node, dict) and "class_type" in node for node in value.values()
    ):
        raise RecipeError(
            "workflow",
            "this is not a ComfyUI workflow",
            file=file,
            expected="the editor's form, with nodes and links, or the API form, with a class_type for each node",
            found=(
                "JSON with "
                f"{', '.join(map(repr, list(value)[:5])) if isinstance(value, dict) else type(value).__name__}"
            ),
        )
    return {one: _api_node(one, node, file) for one, node in value.items()}


def _api_node(one: str, node: Any, file: object) -> Node:
    kind, inputs = (node.get("class_type"), node.get("inputs", {})) if isinstance(node, dict) else (None, None)
    if not isinstance(kind, str) or not isinstance(inputs, dict):
        raise RecipeError(
            "workflow", f"node {one} is damaged", file=file, expected="class_type and inputs", found=str(node)[:200]
        )
    return Node(one, kind, {name: _api_input(value) for name, value in inputs.items()})


def _api_input(value: Any) -> Any:
    is_link = isinstance(value, list) and len(value) == 2 and isinstance(value[0], (str, int)) and type(value[1]) is int
    return Link(str(value[0]), value[1]) if is_link else value

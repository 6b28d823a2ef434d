"""What a file is, and the recipe in it: a checkpoint, a recipe, a workflow, a picture with one."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from alkahest.engine.record import MAX_TEXT, METADATA_KEY, Recipe
from alkahest.errors import RecipeError, refuse_unknown_options
from alkahest.files.locate import locate
from alkahest.files.paths import expanded
from alkahest.files.reader import Reader
from alkahest.recipes.mergekit.read import is_mergekit, read_mergekit
from alkahest.recipes.text import names_in
from alkahest.sources.lora_names import is_lora
from alkahest.workflow.graph import json_in, read_graph
from alkahest.workflow.read import PNG, read_workflow
from alkahest.workflow.translate import WorkflowRecipe, recipes_of


@refuse_unknown_options
def read_recipe(
    path: str | os.PathLike[str], node: str | None = None, passing: Collection[str] = ()
) -> tuple[str, Recipe]:
    """What a file is, in words, and the recipe in it.

    Parameters
    ----------
    path : str or path
        A checkpoint that Alkahest wrote, a recipe as JSON, recipe text, mergekit's YAML, or a ComfyUI workflow: as
        JSON, in a picture, or in a checkpoint that ComfyUI saved.
    node : str, optional
        Of a workflow with several recipes the id of the node that saves the model; `read_workflow` gives them all.
    passing : collection of str
        Kinds of ComfyUI nodes of which you know that they change no weights.

    Returns
    -------
    what : str
    recipe : Recipe
        Its ``text``, ``inputs`` and ``output``. What was trained has no text; ``made`` says what it was made of. One of
        a workflow or of mergekit has ``files`` and ``notes`` besides.

    Raises
    ------
    RecipeError
        If there is none, or there are several.

    Examples
    --------
    >>> done = (bridge.protect("refiner") + 5 * (variant - base)).save("merged.safetensors")
    >>> what, recipe = ak.read_recipe("merged.safetensors")
    >>> recipe.text
    "bridge.protect('refiner') + 5 * (variant - base)"
    """
    what, found = recipes_in(path, node, passing)
    if len(found) == 1:
        return what, found[0]
    known = [f"{one.node} ({one.saved_as or one.text})" for one in found if isinstance(one, WorkflowRecipe)]
    raise RecipeError(
        "recipe",
        "the workflow makes several models",
        file=path,
        found=", ".join(known)[:1000],
        fix="choose one: --node ID, or node= in Python",
    )


def recipes_in(
    path: str | os.PathLike[str], node: str | None = None, passing: Collection[str] = ()
) -> tuple[str, Sequence[Recipe]]:
    """`read_recipe` with all recipes that a workflow has."""
    what, found = _read(expanded(path, "recipe"), node, passing)
    if (node or passing) and not any(isinstance(one, WorkflowRecipe) for one in found):
        problem = "node and passing are for a ComfyUI workflow"
        raise RecipeError("recipe", problem, file=path, found=what, fix="leave them out")
    return what, found


def _read(path: Path, node: str | None, passing: Collection[str]) -> tuple[str, Sequence[Recipe]]:
    if path.is_dir() or path.suffix == ".safetensors":
        located = locate(path)
        metadata = located.metadata
        if METADATA_KEY in metadata:
            kind = "LoRA" if any(map(is_lora, located.tensors)) else "checkpoint"
            recipe = Recipe.from_json(metadata[METADATA_KEY], path)
            said = "with a recipe inside" if recipe.text else "that was trained, which no recipe repeats"
            return f"a {kind} {said}", [recipe]
        if "prompt" in metadata or "workflow" in metadata:
            return "a checkpoint that ComfyUI saved, with its workflow inside", read_workflow(path, node, passing)
        raise RecipeError("recipe", "this checkpoint holds no recipe", file=path, fix="only merged files have one")
    reader = Reader(path)
    start = reader.read(0, min(reader.size, 64))
    if start.startswith(PNG):
        return "a picture with a workflow in it", read_workflow(path, node, passing)
    if start.lstrip()[:1] == b"{":
        value = json_in(reader)
        if "recipe" in value:
            return "a recipe", [Recipe.from_json(reader.read(0, reader.size).decode(), path)]
        return "a ComfyUI workflow", recipes_of(read_graph(value, path), path, node, passing)
    if reader.size > MAX_TEXT * 10:
        raise RecipeError("recipe", "this is too long for a recipe", file=path, found=f"{reader.size:,} bytes")
    try:
        text = reader.read(0, reader.size).decode()
    except UnicodeDecodeError:
        raise RecipeError("recipe", "this is neither a checkpoint nor text", file=path) from None
    if is_mergekit(text):
        return "a mergekit config", [read_mergekit(text, path)]
    names_in(text)
    return "recipe text", [Recipe(text.strip())]

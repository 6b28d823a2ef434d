"""From a recipe to its expression: where its inputs are, and whether they are the ones it was made with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alkahest.algebra.deltas import Delta
from alkahest.algebra.weights import Weights
from alkahest.engine.options import Options
from alkahest.engine.record import Recipe
from alkahest.errors import FileFormatError, RecipeError, UnknownNameError, UnsupportedError, nearest
from alkahest.files.hashes import blake3_of, known_paths
from alkahest.files.paths import named
from alkahest.mini.shipped import WEIGHTS
from alkahest.recipes.text import names_in, parse, parts_in
from alkahest.sources.checkpoint import Checkpoint
from alkahest.sources.lora import Lora, open_input
from alkahest.sources.partial import PartialCheckpoint, open_part
from alkahest.sources.signs import Signs
from alkahest.workflow.translate import WorkflowRecipe


def output_for(recipe: Recipe, weights: Weights) -> dict[str, Any]:
    """How a recipe asks to be written; a workflow's without ``comfy_compatible`` if an input is quantised."""
    Options.of(recipe.output, "recipe")  # a stranger's file says it: only what `save` takes, and only as it takes it
    plain = all(set(leaf.storage.values()) <= {"fp32", "fp16", "bf16"} for leaf in weights.leaves())
    if plain or not isinstance(recipe, WorkflowRecipe):
        return recipe.output
    return {name: value for name, value in recipe.output.items() if name != "comfy_compatible"}


def build(recipe: Recipe, given: Mapping[str, Any], beside: Path | None = None, options: Sequence[str] = ()) -> Weights:
    """The expression of a recipe, its inputs found and checked by BLAKE3.

    ``given`` maps names to paths or numbers. What is not given is looked for by file name in the
    folder ``beside`` and the working folder, among the miniatures, then by hash where Alkahest saw it before.
    ``options`` are names that a mistyped one may have meant as well.
    """
    if recipe.text.startswith("extract_lora("):
        raise RecipeError(
            "recipe",
            "this recipe makes a LoRA, not a checkpoint",
            found=recipe.text,
            fix="alkahest extract-lora, or ak.extract_lora in Python",
        )
    result = _parse(recipe, given, beside, options)
    if not isinstance(result, Weights):
        raise RecipeError(
            "recipe", "the result is not a complete model", found=recipe.text, fix="add the delta to a checkpoint"
        )
    return result


def build_delta(text: str, given: Mapping[str, Any], options: Sequence[str] = ()) -> Delta:
    """The delta that recipe text means, of files given by name."""
    result = _parse(Recipe(text), given, None, options)
    if not isinstance(result, Delta):
        raise RecipeError(
            "recipe",
            "the result is a complete model, not a difference",
            found=text,
            fix="subtract what it was made from: variant - base",
        )
    return result


def require_text(recipe: Recipe, operation: str, file: object = None) -> None:
    """Raise RecipeError for what no recipe repeats."""
    if not recipe.text:
        raise RecipeError(
            operation,
            "this was trained, or made from what is in no file, and no recipe repeats that",
            file=file,
            found=recipe.made,
            fix="use the file itself as an input: recipes know it by its hash",
        )


def _parse(recipe: Recipe, given: Mapping[str, Any], beside: Path | None, options: Sequence[str]) -> Any:
    require_text(recipe, "recipe")
    wanted = require_wanted(given, recipe, options)
    names: dict[str, Any] = {}
    for name in wanted:
        value = given.get(name)
        if isinstance(value, (int, float)):
            names[name] = value
        elif value is not None:
            names[name] = require_match(_open(value, name, recipe), recipe, name)
        elif name in recipe.inputs:
            names[name] = found_input(recipe, name, beside)
        else:
            raise RecipeError(
                "recipe", f"nothing is given for {name!r}", found=recipe.text, fix=f"add --{name} PATH (or a number)"
            )
    return parse(recipe.text, names)


def require_wanted(given: Mapping[str, Any], recipe: Recipe, options: Sequence[str] = ()) -> list[str]:
    """The names that a recipe needs; UnknownNameError if something else is given."""
    wanted = names_in(recipe.text) if recipe.text else list(recipe.inputs)
    for name in given:
        if name not in wanted:
            typed, known = name.replace("_", "-"), [option.replace("_", "-") for option in options]
            problem = f"--{typed} is neither an option nor a name in the expression"
            raise UnknownNameError(
                "recipe",
                problem if options else f"the recipe has no {name!r}",
                found=recipe.text,
                fix=nearest(typed if options else name, [*wanted, *known]),
            )
    return wanted


Input = Checkpoint | Lora | Signs | PartialCheckpoint


def _open(source: Any, name: str, recipe: Recipe) -> Input:
    """An input as the recipe uses it: a part of a checkpoint where it is laid over another."""
    if recipe.text and name in parts_in(recipe.text):
        return open_part(source, name=name)
    return open_input(source, name=name)


def found_input(recipe: Recipe, name: str, beside: Path | None, anew: bool = False) -> Input:
    """The recorded input by its name in a folder or the family, or by its hash wherever it was seen before."""
    first = recipe.inputs[name][0]
    # A file name from a stranger's recipe must not lead out of the folder.
    file = os.path.basename(str(first["file"]))
    near = [path for folder in (beside, Path.cwd()) if folder for path in named(folder, file)]
    changed: RecipeError | None = None
    shipped = [path for path in named(WEIGHTS, file) if path.stat().st_size == first["bytes"]]
    for path in [*near, *shipped, *known_paths(first["blake3"])]:
        in_folder = len(recipe.inputs[name]) > 1 or path.name == "diffusion_pytorch_model.safetensors"
        try:
            return require_match(_open(path.parent if in_folder else path, name, recipe), recipe, name, anew)
        except (FileFormatError, UnsupportedError):  # another file of that name
            continue
        except RecipeError as error:
            changed = error
    raise changed or RecipeError(
        "recipe",
        f"the input {name!r} was not found",
        file=file,
        found=f"{first['bytes']:,} bytes, BLAKE3 {first['blake3']}",
        fix=f"say where it is: --{name} PATH",
    )


def require_match(checkpoint: Input, recipe: Recipe, name: str, anew: bool = False) -> Input:
    """An opened input, if it is the one that the recipe was made with; RecipeError otherwise.

    With ``anew`` its hash is not taken from what is remembered.
    """
    recorded = recipe.inputs.get(name)
    if recorded is None:
        return checkpoint
    digests = dict.fromkeys(checkpoint.files, "")
    if sorted(reader.size for reader in digests) == sorted(entry["bytes"] for entry in recorded):
        digests = dict(zip(checkpoint.files, blake3_of(checkpoint.files, anew=anew), strict=True))
    names = {entry["blake3"]: entry["file"] for entry in recorded}
    if sorted(digests.values()) != sorted(names):
        raise RecipeError(
            "recipe",
            f"{name!r} is not the file that the recipe was made with",
            file=checkpoint.path,
            expected=", ".join(
                f"{entry['file']} {entry['bytes']:,} bytes BLAKE3 {entry['blake3'][:16]}..." for entry in recorded
            ),
            found=", ".join(
                f"{r.size:,} bytes{digest and f' BLAKE3 {digest[:16]}...'}" for r, digest in digests.items()
            ),
            fix="find the original file, or write a new recipe",
        )
    # A renamed input is the same input: the new output records the name that the old one did.
    checkpoint.file_names = {reader: names[digest] for reader, digest in digests.items()}
    return checkpoint

"""Reading a recipe back: what a file is, where its inputs are, and whether it is what it says."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from alkahest.algebra.deltas import Delta
from alkahest.algebra.weights import Weights
from alkahest.engine.events import Event
from alkahest.engine.jobs import jobs_of
from alkahest.engine.options import Options
from alkahest.engine.readable import Workspace
from alkahest.engine.record import MAX_TEXT, METADATA_KEY, Recipe, hashed_recipe, headers_of, plan_of
from alkahest.engine.terms import Source
from alkahest.engine.workers import Run, blocks
from alkahest.errors import FileFormatError, RecipeError, UnknownNameError, UnsupportedError, nearest
from alkahest.files.hashes import blake3_of, known_paths
from alkahest.files.locate import locate
from alkahest.files.reader import Reader
from alkahest.model.dtypes import is_finite
from alkahest.recipes.text import names_in, parse
from alkahest.sources.checkpoint import Checkpoint
from alkahest.sources.checkpoint import open as open_checkpoint
from alkahest.sources.lora import Lora, open_input
from alkahest.sources.lora_names import is_lora
from alkahest.workflow.graph import json_in, read_graph
from alkahest.workflow.read import PNG, read_workflow
from alkahest.workflow.translate import WorkflowRecipe, recipes_of


def read_recipe(path: str | os.PathLike[str], node: str | None = None) -> tuple[str, Recipe]:
    """What a file is, in words, and the recipe in it.

    >>> what, recipe = ak.read_recipe("merged.safetensors"); recipe.text
    "bridge.protect('refiner') + 171.1 * (variant - base)"

    Takes a checkpoint that Alkahest wrote, a recipe as JSON, recipe text, and ComfyUI workflows: as JSON, in a
    picture, or in a checkpoint that ComfyUI saved. Where a workflow has several recipes, ``node`` is the id of the node
    that saves the model; `ak.read_workflow` gives them all. Raises RecipeError if there is none.
    """
    what, found = recipes_in(path, node)
    if len(found) == 1:
        return what, found[0]
    known = [f"{one.node} ({one.saved_as or one.text})" for one in found if isinstance(one, WorkflowRecipe)]
    raise RecipeError("recipe", "the workflow makes several models", file=path, found=", ".join(known)[:1000], fix="choose one: --node ID, or node= in Python")  # fmt: skip


def recipes_in(path: str | os.PathLike[str], node: str | None = None) -> tuple[str, Sequence[Recipe]]:
    """`read_recipe` with all recipes that a workflow has."""
    path = Path(path).expanduser()
    if path.is_dir() or path.suffix == ".safetensors":
        located = locate(path)
        metadata = located.metadata
        if METADATA_KEY in metadata:
            kind = "LoRA" if any(map(is_lora, located.tensors)) else "checkpoint"
            return f"a {kind} with a recipe inside", [Recipe.from_json(metadata[METADATA_KEY], path)]
        if "prompt" in metadata or "workflow" in metadata:
            return "a checkpoint that ComfyUI saved, with its workflow inside", read_workflow(path, node)
        raise RecipeError("recipe", "this checkpoint holds no recipe", file=path, fix="only merged files have one")
    reader = Reader(path)
    start = reader.read(0, min(reader.size, 64))
    if start.startswith(PNG):
        return "a picture with a workflow in it", read_workflow(path, node)
    if start.lstrip()[:1] == b"{":
        value = json_in(reader)
        if "recipe" in value:
            return "a recipe", [Recipe.from_json(reader.read(0, reader.size).decode(), path)]
        return "a ComfyUI workflow", recipes_of(read_graph(value, path), path, node)
    if reader.size > MAX_TEXT * 10:
        raise RecipeError("recipe", "this is too long for a recipe", file=path, found=f"{reader.size:,} bytes")
    try:
        text = reader.read(0, reader.size).decode()
    except UnicodeDecodeError:
        raise RecipeError("recipe", "this is neither a checkpoint nor text", file=path) from None
    names_in(text)
    return "recipe text", [Recipe(text.strip())]


def output_for(recipe: Recipe, weights: Weights) -> dict[str, Any]:
    """How a recipe asks to be written; a workflow's without ``comfy_compatible`` if an input is quantised."""
    plain = all(set(leaf.storage.values()) <= {"fp32", "fp16", "bf16"} for leaf in weights.leaves())
    if plain or not isinstance(recipe, WorkflowRecipe):
        return recipe.output
    return {name: value for name, value in recipe.output.items() if name != "comfy_compatible"}


def build(recipe: Recipe, given: Mapping[str, Any], beside: Path | None = None, options: Sequence[str] = ()) -> Weights:
    """The expression of a recipe, its inputs found and checked by BLAKE3.

    ``given`` maps names to paths or numbers. What is not given is looked for by file name in the
    folder ``beside`` and the working folder, then by hash where Alkahest saw it before. ``options``
    are names that a mistyped one may have meant as well.
    """
    if recipe.text.startswith("extract_lora("):
        raise RecipeError("recipe", "this recipe makes a LoRA, not a checkpoint", found=recipe.text, fix="alkahest extract-lora, or ak.extract_lora in Python")  # fmt: skip
    result = _parsed(recipe, given, beside, options)
    if not isinstance(result, Weights):
        raise RecipeError(
            "recipe", "the result is not a complete model", found=recipe.text, fix="add the delta to a checkpoint"
        )
    return result


def build_delta(text: str, given: Mapping[str, Any], options: Sequence[str] = ()) -> Delta:
    """The delta that recipe text means, of files given by name."""
    result = _parsed(Recipe(text), given, None, options)
    if not isinstance(result, Delta):
        raise RecipeError("recipe", "the result is a complete model, not a difference", found=text, fix="subtract what it was made from: variant - base")  # fmt: skip
    return result


def _parsed(recipe: Recipe, given: Mapping[str, Any], beside: Path | None, options: Sequence[str]) -> Any:
    wanted = _require_wanted(given, recipe, options)
    names: dict[str, Any] = {}
    for name in wanted:
        value = given.get(name)
        if isinstance(value, (int, float)):
            names[name] = value
        elif value is not None:
            names[name] = _checked(open_input(value, name=name), recipe, name)
        elif name in recipe.inputs:
            names[name] = _found(recipe, name, beside)
        else:
            raise RecipeError(
                "recipe", f"nothing is given for {name!r}", found=recipe.text, fix=f"add --{name} PATH (or a number)"
            )
    return parse(recipe.text, names)


@dataclass
class Verdict:
    """What `verify` found out about a file; ``ok`` is false if anything speaks against it."""

    path: Path
    blake3: dict[str, str]
    recipe: str | None = None
    nonfinite: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    differing: list[str] | None = None

    @property
    def ok(self) -> bool:
        return not self.nonfinite and not self.differing and "changed" not in self.inputs.values()

    def __repr__(self) -> str:
        lines = [f"{self.path}: {'sound' if self.ok else 'NOT SOUND'}"]
        lines += [f"  BLAKE3 {digest}  {name}" for name, digest in self.blake3.items()]
        lines += [f"  {count} non-finite values in {key}" for key, count in self.nonfinite.items()]
        lines.append(f"  recipe: {self.recipe or 'none recorded'}")
        lines += [f"  input {name}: {state}" for name, state in self.inputs.items()]
        if self.differing is not None:
            lines.append(
                f"  recomputed: {', '.join(self.differing) + ' differ' if self.differing else 'every byte the same'}"
            )
        return "\n".join(lines)


def verify(
    path: str | os.PathLike[str], given: Mapping[str, Any] | None = None, recompute: bool = False
) -> Iterator[Event | Verdict]:
    """Check a checkpoint from end to end: structure, finite numbers, inputs, and with ``recompute`` every byte.

    A generator of events; the last item is the `Verdict`. Recomputing compares with the file and
    writes nothing. Raises FileFormatError if the file cannot be opened at all.
    """
    checkpoint = open_checkpoint(path)
    digests = dict(zip((f.path.name for f in checkpoint.files), blake3_of(checkpoint.files), strict=True))
    verdict = Verdict(checkpoint.path, digests)
    workspace, done = Workspace(torch.device("cpu")), 0
    for key, piece in checkpoint.slices.items():
        if bad := _nonfinite(checkpoint, key, workspace):
            verdict.nonfinite[key] = bad
        done += piece.nbytes
        yield Event(done, checkpoint.nbytes, key)
    if METADATA_KEY in checkpoint.metadata:
        recipe = Recipe.from_json(checkpoint.metadata[METADATA_KEY], checkpoint.path)
        verdict.recipe = recipe.text
        _require_wanted(given or {}, recipe)
        for name in recipe.inputs:
            verdict.inputs[name] = _state(recipe, name, (given or {}).get(name), checkpoint.path.parent)
        if recompute:
            expression = build(recipe, given or {}, checkpoint.path.parent)
            verdict.differing = yield from _differing(checkpoint, recipe, expression)
    elif recompute:
        raise RecipeError("verify", "nothing to recompute: no recipe is recorded", file=path)
    yield verdict


def _differing(checkpoint: Checkpoint, recipe: Recipe, expression: Weights) -> Generator[Event, None, list[str]]:
    options = Options.checked(recipe.output)
    plan = plan_of(expression, options)
    run = Run(options)
    headers = headers_of(plan, hashed_recipe(expression, options))
    files = sorted(checkpoint.files, key=lambda reader: reader.path.name)
    differing: set[str] = set()
    if len(files) != len(headers):
        return ["the number of files"]
    done, total = 0, plan.nbytes
    for file, header, items in zip(files, headers, plan.files, strict=True):
        # Spaces at the end of a header say nothing; an earlier version wrote fewer.
        start = 8 + int.from_bytes(file.read(0, 8), "little")
        comparer = _Comparer(file, {item.name: item.nbytes for item in items}, start)
        if file.read(8, start - 8).rstrip(b" ") != header[8:].rstrip(b" "):
            comparer.differing.add("the header")
        for job in run.perform(list(jobs_of(run, comparer, start, items))):
            done += job.nbytes
            yield Event(done, total, job.key)
        differing |= comparer.differing
    return sorted(differing)


class _Comparer:
    """Takes the place of a Writer, and compares with a file instead of writing to one."""

    def __init__(self, file: Reader, sizes: Mapping[str, int], data_start: int) -> None:
        self.file = file
        self.differing: set[str] = set()
        self._places = []
        offset = data_start
        for name, size in sizes.items():
            self._places.append((offset, offset + size, name))
            offset += size

    def write(self, data: memoryview | bytes, offset: int) -> None:
        count = len(data)
        if offset + count > self.file.size or self.file.read(offset, count) != bytes(data):
            names = [name for start, stop, name in self._places if start <= offset < stop]
            self.differing.add(names[0] if names else "the header")


def _nonfinite(checkpoint: Checkpoint, key: str, workspace: Workspace) -> int:
    """How many values of a tensor are NaN or infinite."""
    found = 0
    for start, stop in blocks(Source(checkpoint, key), checkpoint.slices[key].elements):
        with workspace.block(stop - start) as values:
            checkpoint.read(key, start, stop, values, workspace)
            found += 0 if is_finite(values) else int((~torch.isfinite(values)).sum())
    return found


def _require_wanted(given: Mapping[str, Any], recipe: Recipe, options: Sequence[str] = ()) -> list[str]:
    """The names that a recipe needs; UnknownNameError if something else is given."""
    wanted = names_in(recipe.text)
    for name in given:
        if name not in wanted:
            typed, known = name.replace("_", "-"), [option.replace("_", "-") for option in options]
            problem = f"--{typed} is neither an option nor a name in the expression"
            raise UnknownNameError(
                "recipe", problem if options else f"the recipe has no {name!r}", found=recipe.text,
                fix=nearest(typed if options else name, [*wanted, *known]),
            )  # fmt: skip
    return wanted


def _state(recipe: Recipe, name: str, given: Any, beside: Path) -> str:
    if isinstance(given, (int, float)):
        raise RecipeError("recipe", f"{name!r} is a file, and a number is given for it", found=str(given), fix=f"--{name} PATH")  # fmt: skip
    if given:  # somebody says that this is the input: if it is not, that is their error, not the file's
        return f"{_checked(open_input(given, name=name), recipe, name).path}, unchanged"
    try:
        found = _found(recipe, name, beside)
    except RecipeError as error:
        return "changed" if error.expected is not None else "not found here"
    return f"{found.path}, unchanged"


def _found(recipe: Recipe, name: str, beside: Path | None) -> Checkpoint | Lora:
    first = recipe.inputs[name][0]
    # A file name from a stranger's recipe must not lead out of the folder.
    file = os.path.basename(str(first["file"]))
    candidates = [*((folder / file) for folder in (beside, Path.cwd()) if folder), *known_paths(first["blake3"])]
    changed: RecipeError | None = None
    for path in candidates:
        if not path.is_file():
            continue
        in_folder = len(recipe.inputs[name]) > 1 or path.name == "diffusion_pytorch_model.safetensors"
        try:
            return _checked(open_input(path.parent if in_folder else path, name=name), recipe, name)
        except (FileFormatError, UnsupportedError):  # another file of that name
            continue
        except RecipeError as error:
            changed = error
    raise changed or RecipeError(
        "recipe", f"the input {name!r} was not found", file=file, found=f"{first['bytes']:,} bytes, BLAKE3 {first['blake3']}",
        fix=f"say where it is: --{name} PATH",
    )  # fmt: skip


def _checked(checkpoint: Checkpoint | Lora, recipe: Recipe, name: str) -> Checkpoint | Lora:
    recorded = recipe.inputs.get(name)
    if recorded is None:
        return checkpoint
    digests = dict.fromkeys(checkpoint.files, "")
    if sorted(reader.size for reader in digests) == sorted(entry["bytes"] for entry in recorded):
        digests = dict(zip(checkpoint.files, blake3_of(checkpoint.files), strict=True))
    names = {entry["blake3"]: entry["file"] for entry in recorded}
    if sorted(digests.values()) != sorted(names):
        raise RecipeError(
            "recipe", f"{name!r} is not the file that the recipe was made with", file=checkpoint.path,
            expected=", ".join(f"{entry['file']} {entry['bytes']:,} bytes BLAKE3 {entry['blake3'][:16]}..." for entry in recorded),
            found=", ".join(f"{r.size:,} bytes{digest and f' BLAKE3 {digest[:16]}...'}" for r, digest in digests.items()), fix="find the original file, or write a new recipe",
        )  # fmt: skip
    # A renamed input is the same input: the new output records the name that the old one did.
    checkpoint.file_names = {reader: names[digest] for reader, digest in digests.items()}
    return checkpoint

"""Commands on recipes: merge, recipe, workflow."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import alkahest
from alkahest.cli.shared import (
    MERGING,
    NAMED,
    WORKFLOWS,
    AllowNonfinite,
    AsJson,
    Cfg,
    Components,
    Count,
    Device,
    Dtype,
    Layout,
    MadeFor,
    ModelsDir,
    NodeId,
    Ordinary,
    Output,
    Passing,
    Pictures,
    Prompts,
    Quiet,
    Rounding,
    Seed,
    Shards,
    Storage,
    Threads,
    app,
    by_pictures,
    drain,
    example,
    exit_on_error,
    options_of,
    save,
    say_replaced,
    split_arguments,
)
from alkahest.errors import RecipeError

if TYPE_CHECKING:
    from alkahest.engine.record import Recipe


@app.command(
    context_settings=NAMED,
    rich_help_panel=MERGING,
    epilog=example(
        "alkahest merge \"bridge.protect('refiner') + 5 * (variant - base)\" --bridge mini:tb1 "
        "--variant mini:base-variant --base mini:base -o merged.safetensors"
    ),
)
def merge(
    context: typer.Context,
    output: Output,
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[EXPRESSION] [--NAME PATH]...",
            help="Such as \"bridge.protect('refiner') + 171.1 * (variant - base)\" --bridge a.safetensors ...",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help=(
                "Run the recipe in this file: a merged checkpoint, recipe JSON or text, mergekit's YAML, or a ComfyUI "
                "workflow (JSON, a picture, or a checkpoint that ComfyUI saved)."
            )
        ),
    ] = None,
    models_dir: ModelsDir = None,
    node: NodeId = None,
    passing: Passing = None,
    dtype: Dtype = None,
    layout: Layout = None,
    rounding: Rounding = "nearest",
    seed: Seed = 0,
    device: Device = "cpu",
    comfy_compatible: Annotated[
        bool, typer.Option("--comfy-compatible", help="ComfyUI's order of operations and pad tokens, bit for bit.")
    ] = False,
    max_shard_size: Shards = None,
    allow_nonfinite: AllowNonfinite = False,
    prompts: Prompts = None,
    pictures: Pictures = None,
    ordinary: Ordinary = None,
    components: Components = None,
    cfg: Cfg = None,
    count: Count = None,
    storage: Storage = None,
    made_for: MadeFor = None,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compute an expression over checkpoints and write it.

    Every name in the expression is given as an option: `--bridge a.safetensors --base b.safetensors`,
    or as a number: `--k 171.1`. `--k auto` computes the multiplier (see `alkahest multiplier`): by pictures with
    `--prompts FILE` or `--pictures FOLDER`, else on weights alone.
    """
    with exit_on_error():
        expression, given = split_arguments(what or [])
        options = options_of(
            context,  # a recipe may say otherwise
            dtype=dtype,
            layout=layout,
            rounding=rounding,
            seed=seed,
            device=device,
            comfy_compatible=comfy_compatible,
            max_shard_size=max_shard_size,
            allow_nonfinite=allow_nonfinite,
            threads=threads,
        )
        seen = by_pictures(prompts, pictures, ordinary, components, cfg, count, storage, made_for)
        if seen and "auto" not in given.values():
            given_first = "made-for" if next(iter(seen)) == "base" else next(iter(seen))
            raise RecipeError("merge", f"--{given_first} is for a multiplier by pictures", fix="add --k auto")
        if (models_dir or node or passing) and recipe is None:
            problem = "--models-dir, --node and --passing are for a workflow"
            raise RecipeError("merge", problem, fix="add --recipe workflow.json")
        asked = _expression(expression, recipe, models_dir, node, passing or (), given)
        _merge(*asked, given, output, options, as_json, quiet, seen)


@app.command(rich_help_panel=WORKFLOWS, epilog=example("alkahest recipe merged.safetensors"))
def recipe(
    file: Annotated[
        Path,
        typer.Argument(
            help="A merged checkpoint, recipe JSON or text, mergekit's YAML, or anything that ComfyUI saved."
        ),
    ],
    models_dir: ModelsDir = None,
    node: NodeId = None,
    passing: Passing = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a file is, and print the recipe in it.

    A ComfyUI workflow has a recipe for each model that it saves. With --models-dir its files are looked up, opened
    and checked against each other, and --json is a recipe with their hashes, which runs anywhere.
    """
    with exit_on_error():
        from alkahest.recipes.read import recipes_in

        what, recipes = recipes_in(file, node, passing or ())
        if not as_json:
            print(f"# {file}: {what}", file=sys.stderr)
        for found in recipes:
            if models_dir is not None:
                found = _locate(found, models_dir)
            if as_json:
                print(_json(found))
            else:
                _print_recipe(found, several=len(recipes) > 1)


@app.command(
    context_settings=NAMED,
    rich_help_panel=WORKFLOWS,
    epilog=example(
        'alkahest workflow "a + 171.1 * (v - b)" --a mini:tb1 --v mini:base-weak --b mini:base -o graph.json'
    ),
)
def workflow(
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file.")],
    what: Annotated[
        list[str] | None, typer.Argument(metavar="[EXPRESSION] [--NAME PATH]...", help="As for merge.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="Write the recipe in this file.")] = None,
    prefix: Annotated[str, typer.Option(help="Under which ComfyUI saves the model.")] = "diffusion_models/alkahest",
    form: Annotated[str, typer.Option(help="editor, or api for what is posted to the server.")] = "editor",
) -> None:
    """Write an expression or a recipe as a ComfyUI workflow that saves the same model.

    ComfyUI's own nodes say what they can, with multipliers past 10 split; Alkahest's nodes say the rest.
    """
    with exit_on_error():
        expression, given = split_arguments(what or [])
        weights = _compute_multipliers(_expression(expression, recipe, None, None, (), given)[1], given, {}, False, {})
        with say_replaced(output):
            notes = alkahest.write_workflow(weights, output, prefix, form)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        print(output)


def _json(found: Any) -> str:
    """A recipe as JSON; a workflow's, whose files nobody looked up, says what they are called."""
    from alkahest.recipes.mergekit.read import MergekitRecipe
    from alkahest.workflow.translate import WorkflowRecipe

    text = str(found.to_json())
    if isinstance(found, MergekitRecipe):
        return json.dumps({**json.loads(text), "files": found.files, "notes": found.notes}, ensure_ascii=False)
    if not isinstance(found, WorkflowRecipe):
        return text
    said = {
        "node": found.node,
        "saved_as": found.saved_as,
        "plain": found.plain,
        "files": {n: str(f) for n, f in found.files.items()},
        "notes": found.notes,
    }
    return json.dumps({**json.loads(text), **said}, ensure_ascii=False)


def _print_recipe(found: Any, several: bool) -> None:
    from alkahest.recipes.mergekit.read import MergekitRecipe
    from alkahest.workflow.translate import WorkflowRecipe

    if several and isinstance(found, WorkflowRecipe):
        print(f"# --node {found.node}{f', saved as {found.saved_as}' if found.saved_as else ''}")
    plain = found.plain if isinstance(found, WorkflowRecipe) else found.text
    print(plain or f"# made as {found.made}")
    if isinstance(found, WorkflowRecipe):
        if plain != found.text:
            print(f"#   in ComfyUI's order, bit for bit: {found.text}")
        for name, file in found.files.items():
            print(f"#   {name}: {file}, loaded by {file.node}")
    if isinstance(found, MergekitRecipe):
        for name, path in found.files.items():
            print(f"#   {name}: {path}")
    if isinstance(found, (WorkflowRecipe, MergekitRecipe)):
        for note in found.notes:
            print(f"#   note: {note}")
    for name, files in found.inputs.items():
        for entry in files:
            print(f"#   {name}: {entry['file']}, {entry['bytes']:,} bytes, BLAKE3 {entry['blake3']}")
    if found.output:
        print("#   written with " + ", ".join(f"{name}={value}" for name, value in found.output.items()))


def _locate(found: Any, models_dir: Path) -> Any:
    """A workflow's recipe with its files looked up, opened and hashed."""
    from alkahest.engine.options import Options
    from alkahest.engine.record import hashed_recipe
    from alkahest.recipes.inputs import build, output_for
    from alkahest.workflow.translate import WorkflowRecipe

    if not isinstance(found, WorkflowRecipe):
        raise RecipeError(
            "recipe", "--models-dir is for a ComfyUI workflow", found="a recipe that records its own files"
        )
    if found.computed:
        raise RecipeError(
            "recipe",
            "a multiplier of this workflow is computed while it runs",
            file=found.source,
            found=", ".join(found.computed),
            fix=f"alkahest merge --recipe FILE --models-dir DIR --{found.computed[0]} auto -o OUT",
        )
    weights = build(found, found.locate(models_dir))
    return hashed_recipe(weights, Options.of(output_for(found, weights)))


def _expression(
    expression: str | None,
    recipe: Path | None,
    models_dir: Path | None,
    node: str | None,
    passing: Collection[str],
    given: dict[str, Any],
) -> tuple[Recipe, alkahest.Weights]:
    """The recipe that was asked for and its expression; multipliers to compute are 1 as yet."""
    from alkahest.engine.options import Options
    from alkahest.engine.record import Recipe
    from alkahest.recipes.inputs import build
    from alkahest.recipes.mergekit.read import MergekitRecipe
    from alkahest.workflow.translate import WorkflowRecipe

    if (expression is None) == (recipe is None):
        raise RecipeError("recipe", "give either an expression or --recipe FILE", fix="see --help")
    found = Recipe(expression or "") if recipe is None else alkahest.read_recipe(recipe, node, passing)[1]
    if models_dir is not None:
        if not isinstance(found, WorkflowRecipe):
            raise RecipeError(
                "merge", "--models-dir is for a ComfyUI workflow", file=recipe, fix="give its inputs by name"
            )
        given = {**found.locate(models_dir), **given}
    if isinstance(found, MergekitRecipe):
        given = {**found.locate(given), **given}
    for note in found.notes if isinstance(found, (MergekitRecipe, WorkflowRecipe)) else ():
        print(f"note: {note}", file=sys.stderr)
    known = [*(field.name for field in dataclasses.fields(Options)), "output", "recipe", "json", "quiet"]
    given = {name: 1.0 if value == "auto" else value for name, value in given.items()}
    return found, build(found, given, recipe.resolve().parent if recipe else None, known)


def _merge(
    found: Recipe,
    weights: alkahest.Weights,
    given: dict[str, Any],
    output: Path,
    options: dict[str, Any],
    as_json: bool,
    quiet: bool,
    seen: dict[str, Any],
) -> None:
    from alkahest.recipes.inputs import output_for

    weights = _compute_multipliers(weights, given, options, quiet, seen)
    recorded = output_for(found, weights)
    if recorded != found.output:
        print("an input is quantised: ComfyUI's bits cannot be had, the arithmetic is Alkahest's own", file=sys.stderr)
    settings = {**recorded, **options}
    # Earlier versions recorded a seed beside rounding to nearest; one that is given now is refused by `save`.
    if "seed" not in options and "seed" in settings and settings.get("rounding") != "stochastic":
        print(f"the recorded seed {settings.pop('seed')} is not used: the rounding is to nearest", file=sys.stderr)
    save(weights, output, settings, as_json, quiet)


def _compute_multipliers(
    weights: alkahest.Weights, given: dict[str, Any], options: dict[str, Any], quiet: bool, seen: dict[str, Any]
) -> alkahest.Weights:
    """The same with every ``--NAME auto`` computed, by pictures if some are ``seen``."""
    asked = [name for name, value in given.items() if value == "auto"]
    if seen and len(asked) > 1:
        names = " and ".join(f"--{name} auto" for name in asked)
        fix = "one of them auto at a time: what one variant learned says nothing of the other"
        raise RecipeError("auto", f"--{next(iter(seen))} is for one multiplier", found=names, fix=fix)
    for name in asked:
        weights = _with_multiplier(weights, name, options, quiet, seen)
    return weights


def _with_multiplier(
    weights: alkahest.Weights, name: str, options: dict[str, Any], quiet: bool, seen: dict[str, Any]
) -> alkahest.Weights:
    """The same with the scalar ``name`` set to the multiplier that its delta needs."""
    from alkahest.algebra.weights import ends
    from alkahest.measure.lineage import check_if_known
    from alkahest.measure.placed import auto_multiplied
    from alkahest.model.dtypes import SCALED, storage_name
    from alkahest.pictures.needed import stream_needed_multiplier

    delta, on = auto_multiplied(weights, name)
    dtype = options.get("dtype")
    counted = None if seen or dtype is None or storage_name(dtype) in SCALED else dtype
    running = {option: options[option] for option in ("device", "threads") if option in options}
    found = drain(stream_needed_multiplier(delta, on, dtype=counted, **running, **seen), quiet).result
    print(f"{name}: {found!r}", file=sys.stderr)
    fix = f"--{name}=1, or any number, to add it all the same"
    if found == 0:
        raise RecipeError("auto", "by what pictures say this does not come over", found=found.formula, fix=fix)
    check = check_if_known(found.table)
    if check is not None and check.verdict == "not importable" and on is not ends(delta)[1]:
        raise RecipeError("auto", "no multiplier makes this come over", found=check.objection, fix=fix)
    return weights.bind(**{name: found})

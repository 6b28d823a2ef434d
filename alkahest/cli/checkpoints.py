"""Commands on checkpoints: inspect, merge, convert, recipe, verify, make-checkpoint."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import alkahest
from alkahest.cli.shared import (
    NAMED,
    AllowNonfinite,
    AsJson,
    Device,
    Dtype,
    Layout,
    Output,
    Quiet,
    Rounding,
    Seed,
    Shards,
    Threads,
    app,
    drain,
    named,
    options_of,
    reported,
)
from alkahest.errors import RecipeError


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="Checkpoint: file, folder, index.json or hub id.")],
    keys: Annotated[
        str | None, typer.Option(help="List the tensors that this pattern selects, such as refiner.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint is, from its header: layout, storage, parts, sizes."""
    with reported():
        checkpoint = alkahest.open(source)
        if keys is None:
            print(json.dumps(checkpoint.summary(), indent=2) if as_json else checkpoint)
            return
        rows = {
            key: {"shape": checkpoint.shapes[key], "storage": checkpoint.storage[key]} for key in checkpoint.part(keys)
        }
        if as_json:
            print(json.dumps(rows, indent=2))
        else:
            for key, row in rows.items():
                print(f"{key:52} {row['shape']!s:16} {row['storage']}")


@app.command(context_settings=NAMED)
def merge(
    output: Output,
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[EXPRESSION] [--NAME PATH]...",
            help="Such as \"bridge.protect('refiner') + 171.1 * (variant - base)\" --bridge a.safetensors ...",
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Run the recipe in this file: a merged checkpoint, recipe JSON or text.")
    ] = None,
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
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compute an expression over checkpoints and write it.

    Every name in the expression is given as an option: `--bridge a.safetensors --base b.safetensors`,
    or as a number: `--k 171.1`. `--k auto` computes the multiplier (see `alkahest multiplier`).
    """
    with reported():
        expression, given = named(what or [])
        options = options_of(
            dtype=dtype, layout=layout, rounding=rounding, seed=seed, device=device, comfy_compatible=comfy_compatible,
            max_shard_size=max_shard_size, allow_nonfinite=allow_nonfinite, threads=threads,
        )  # fmt: skip
        _merge(expression, recipe, given, output, options, as_json, quiet)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint: file, folder, index.json or hub id.")],
    output: Output,
    dtype: Dtype = None,
    layout: Layout = None,
    rounding: Rounding = "nearest",
    seed: Seed = 0,
    max_shard_size: Shards = None,
    allow_nonfinite: AllowNonfinite = False,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint in another layout or dtype."""
    with reported():
        options = options_of(
            dtype=dtype, layout=layout, rounding=rounding, seed=seed, max_shard_size=max_shard_size,
            allow_nonfinite=allow_nonfinite, threads=threads,
        )  # fmt: skip
        _save(alkahest.open(source), output, options, as_json, quiet)


@app.command()
def recipe(
    file: Annotated[Path, typer.Argument(help="A merged checkpoint, recipe JSON or recipe text.")],
    as_json: AsJson = False,
) -> None:
    """Tell what a file is, and print the recipe in it."""
    with reported():
        what, found = alkahest.read_recipe(file)
        if as_json:
            print(found.to_json())
            return
        print(f"# {file}: {what}", file=sys.stderr)
        print(found.text)
        for name, files in found.inputs.items():
            for entry in files:
                print(f"#   {name}: {entry['file']}, {entry['bytes']:,} bytes, BLAKE3 {entry['blake3']}")
        if found.output:
            print("#   written with " + ", ".join(f"{name}={value}" for name, value in found.output.items()))


@app.command(context_settings=NAMED)
def verify(
    what: Annotated[
        list[str], typer.Argument(metavar="FILE [--NAME PATH]...", help="Checkpoint to check from end to end.")
    ],
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Compute the recipe again and compare every byte; nothing is written.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check a checkpoint: structure, finite numbers, BLAKE3, and its recipe's inputs.

    Inputs that are not found by themselves are given by name: `--base b.safetensors`.
    """
    from alkahest.provenance import Verdict
    from alkahest.provenance import verify as check

    with reported():
        file, given = named(what)
        if file is None:
            raise typer.BadParameter("name the file to check")
        found = drain(check(file, given, recompute), quiet)
        assert isinstance(found, Verdict)
        print(json.dumps({**dataclasses.asdict(found), "ok": found.ok}, indent=2, default=str) if as_json else found)
        if not found.ok:
            raise typer.Exit(1)


@app.command("make-checkpoint")
def make_checkpoint(
    output: Output,
    layers: Annotated[int, typer.Option(help="Layers in the main stack; the real model has 30.")] = 30,
    width: Annotated[int, typer.Option(help="Width, a multiple of 32; the real model has 3840.")] = 3840,
    seed: Annotated[int, typer.Option(help="Seed of the numbers.")] = 0,
    delta: Annotated[float, typer.Option(help="Make a variant that differs by this share, such as 0.02.")] = 0.0,
    only: Annotated[str, typer.Option(help="Where the variant differs, such as layers.")] = "all",
    layout: Annotated[str | None, typer.Option(help="native (ComfyUI) or diffusers.")] = None,
    storage: Annotated[str | None, typer.Option(help="As --dtype of merge; default bf16.")] = None,
    max_shard_size: Shards = None,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make up a checkpoint of true Z-Image shapes, to try real sizes without the real weights."""
    with reported():
        weights = alkahest.made_up(layers=layers, seed=seed, delta=delta, only=only, width=width)
        options = options_of(dtype=storage, layout=layout, max_shard_size=max_shard_size, threads=threads)
        _save(weights, output, options, as_json, quiet)


def _merge(
    expression: str | None, recipe: Path | None, given: dict[str, Any], output: Path, options: dict[str, Any],
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    from alkahest.options import Options
    from alkahest.provenance import build
    from alkahest.recipe import Recipe

    if (expression is None) == (recipe is None):
        raise RecipeError("merge", "give either an expression or --recipe FILE", fix="see alkahest merge --help")
    found = Recipe(expression or "") if recipe is None else alkahest.read_recipe(recipe)[1]
    known = [*(field.name for field in dataclasses.fields(Options)), "output", "recipe", "json", "quiet"]
    automatic = [name for name, value in given.items() if value == "auto"]
    weights = build(
        found, {**given, **dict.fromkeys(automatic, 1.0)}, recipe.resolve().parent if recipe else None, known
    )
    for name in automatic:
        weights = _with_computed(weights, name, options, quiet)
    _save(weights, output, {**found.output, **options}, as_json, quiet)


def _with_computed(weights: alkahest.Weights, name: str, options: dict[str, Any], quiet: bool) -> alkahest.Weights:
    """The same with the scalar ``name`` set to the multiplier that its delta needs."""
    from alkahest.dtypes import SCALED, storage_name
    from alkahest.multiplier import auto_multiplied, stream_needed_multiplier

    delta, on = auto_multiplied(weights, name)
    dtype = options.get("dtype")
    counted = None if dtype is None or storage_name(dtype) in SCALED else dtype
    running = {option: options[option] for option in ("device", "threads") if option in options}
    found = drain(stream_needed_multiplier(delta, on, dtype=counted, **running), quiet).result
    print(f"{name}: {found!r}", file=sys.stderr)
    return weights.bind(**{name: found})


def _save(weights: alkahest.Weights, output: Path, options: dict[str, Any], as_json: bool, quiet: bool) -> None:
    result = drain(weights.stream(output, **options), quiet).result
    print(json.dumps(dataclasses.asdict(result), indent=2, default=str) if as_json else result)

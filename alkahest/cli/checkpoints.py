"""Commands on checkpoints: inspect, convert, verify, make-checkpoint."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

import alkahest
from alkahest.cli.shared import (
    MERGING,
    NAMED,
    AllowNonfinite,
    AsJson,
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
    example,
    exit_on_error,
    number_option,
    options_of,
    save,
    split_arguments,
)

if TYPE_CHECKING:
    pass


@app.command(rich_help_panel=MERGING, epilog=example("alkahest inspect mini:base"))
def inspect(
    source: Annotated[str, typer.Argument(help="Checkpoint: file, folder, index.json, hub id or mini:NAME.")],
    keys: Annotated[
        str | None, typer.Option(help="List the tensors that this pattern selects, such as refiner.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint is, from its header: layout, storage, parts, sizes."""
    with exit_on_error():
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


@app.command(
    rich_help_panel=MERGING, epilog=example("alkahest convert mini:base -o base8.safetensors --dtype comfy_quant")
)
def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint: file, folder, index.json, hub id or mini:NAME.")],
    output: Output,
    dtype: Dtype = None,
    layout: Layout = None,
    rounding: Rounding = "nearest",
    seed: Seed = 0,
    max_shard_size: Shards = None,
    allow_nonfinite: AllowNonfinite = False,
    drop: Annotated[
        str | None, typer.Option(help="Leave out what lies beside the model, by pattern: model_ema, text_encoders.")
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(help="Of a file that holds several models: the prefix of the one that is meant.")
    ] = None,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint in another layout or dtype."""
    with exit_on_error():
        options = options_of(
            dtype=dtype,
            layout=layout,
            rounding=rounding,
            seed=seed,
            max_shard_size=max_shard_size,
            allow_nonfinite=allow_nonfinite,
            drop=drop,
            threads=threads,
        )
        save(alkahest.open(source, prefix=prefix), output, options, as_json, quiet)


@app.command(context_settings=NAMED, rich_help_panel=MERGING, epilog=example("alkahest verify mini:base"))
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
    from alkahest.recipes.verify import stream_verdict

    with exit_on_error():
        file, given = split_arguments(what)
        if file is None:
            raise typer.BadParameter("name the file to check")
        found = drain(stream_verdict(file, given, recompute), quiet).result
        print(json.dumps({**dataclasses.asdict(found), "ok": found.ok}, indent=2, default=str) if as_json else found)
        if not found.ok:
            raise typer.Exit(1)


@app.command(
    "make-checkpoint",
    rich_help_panel=MERGING,
    epilog=example("alkahest make-checkpoint -o made.safetensors --layers 2 --width 96"),
)
def make_checkpoint(
    output: Output,
    layers: Annotated[int, typer.Option(help="Layers in the main stack; the real model has 30.")] = 30,
    width: Annotated[int, typer.Option(help="Width, a multiple of 32; the real model has 3840.")] = 3840,
    seed: Annotated[int, typer.Option(help="Seed of the numbers.")] = 0,
    delta: Annotated[
        float,
        number_option("Make a variant that differs by this share, such as 0.02."),
    ] = 0.0,
    only: Annotated[str, typer.Option(help="Where the variant differs, such as layers.")] = "all",
    layout: Annotated[str | None, typer.Option(help="native (ComfyUI) or diffusers.")] = None,
    storage: Annotated[str | None, typer.Option(help="As --dtype of merge; default bf16.")] = None,
    max_shard_size: Shards = None,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make up a checkpoint of true Z-Image shapes, to try real sizes without the real weights."""
    with exit_on_error():
        weights = alkahest.made_up(layers=layers, seed=seed, delta=delta, only=only, width=width)
        options = options_of(dtype=storage, layout=layout, max_shard_size=max_shard_size, threads=threads)
        save(weights, output, options, as_json, quiet)

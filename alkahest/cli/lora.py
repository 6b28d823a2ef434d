"""Commands on LoRAs: extract-lora, and lora inspect, convert, resize, merge."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import alkahest
from alkahest.cli.shared import (
    LORAS,
    NAMED,
    AsJson,
    Csv,
    Device,
    Picture,
    Quiet,
    Threads,
    app,
    drain,
    example,
    exit_on_error,
    number_option,
    options_of,
    require_outputs,
    say_replaced,
    split_arguments,
)
from alkahest.cli.words import as_commands

if TYPE_CHECKING:
    from alkahest.lora.result import Extracted

loras = typer.Typer(help="LoRA files: inspect, convert, resize, merge.", no_args_is_help=True)
app.add_typer(loras, name="lora", rich_help_panel=LORAS, epilog=example("alkahest lora inspect mini:base-lora"))

Source = Annotated[str, typer.Argument(help="LoRA file, of any flavour.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="File to write (.safetensors).")]
Rank = Annotated[int, typer.Option(help="The same rank everywhere; 0: by another rule.")]
Energy = Annotated[
    float | None,
    typer.Option("--rank-thresh", "--energy", help="Share of the squared singular values to keep, such as 0.995."),
]
Sum = Annotated[float | None, number_option("Share of the singular values' sum to keep.")]
Ratio = Annotated[
    float | None,
    number_option("Keep singular values of at least this share of the largest."),
]
RankMax = Annotated[int, typer.Option(help="The most that the rank can be; 0: no limit.")]
NoiseEdge = Annotated[
    bool, typer.Option("--noise-edge", help="Stop at what rounding of the variant's file makes by itself.")
]
Include = Annotated[str | None, typer.Option(help="Only these tensors, such as layers.0-9.")]
Exclude = Annotated[str | None, typer.Option(help="Not these tensors, such as refiner.")]
Full = Annotated[str | None, typer.Option(help="Keep these whole, norms and biases too; loads in ComfyUI only.")]
MinDim = Annotated[int | None, typer.Option(help="Leave out matrices with a side below this. [default: 32]")]
Alpha = Annotated[
    float | None,
    number_option("Store this alpha; default: folded into the factors."),
]
LoraDtype = Annotated[str | None, typer.Option("--dtype", help="bf16 (default), fp16 or fp32.")]
Method = Annotated[str, typer.Option(help="auto, exact or randomised.")]
Seed = Annotated[int, typer.Option(help="Seed of the randomised method.")]
Flavour = Annotated[
    str,
    typer.Option(help="comfyui (loads in diffusers too), diffusers, peft, kohya, kohya-split or fused."),
]


@app.command(
    "extract-lora",
    context_settings=NAMED,
    rich_help_panel=LORAS,
    epilog=example(
        "alkahest extract-lora --variant mini:base-variant --base mini:base --rank 16 -o learned.safetensors"
    ),
)
def extract_lora(
    output: Output,
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[EXPRESSION] --NAME PATH...",
            help='The difference, by default "variant - base": --variant V.safetensors --base B.safetensors; with '
            "--variant2 W.safetensors what the two variants share.",
        ),
    ] = None,
    union: Annotated[
        bool, typer.Option("--union", help="With --variant2: what either variant holds, not what both share.")
    ] = False,
    rank: Rank = 0,
    rank_thresh: Energy = None,
    sum: Sum = None,
    ratio: Ratio = None,
    rank_max: RankMax = 64,
    noise_edge: NoiseEdge = False,
    include: Include = None,
    exclude: Exclude = None,
    full: Full = None,
    rounding: Annotated[
        bool,
        typer.Option(
            "--rounding", help="Also take tensors that differ by no more than rounding of the variant's file."
        ),
    ] = False,
    min_dim: MinDim = None,
    alpha: Alpha = None,
    dtype: LoraDtype = None,
    method: Method = "auto",
    seed: Seed = 0,
    flavour: Flavour = "comfyui",
    csv: Csv = None,
    plot: Picture = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make a LoRA of what a variant learned, or of any difference.

    The supplement of the article: `alkahest extract-lora --base ALKAHEST --variant BASE --rank-thresh 0.995
    --exclude refiner -o supplement.safetensors`. With `--variant2`, the part that two variants share, with `--union`
    too what either has. A run that was stopped goes on where it was.
    """
    with exit_on_error():
        text, given = split_arguments(what or [])
        if union and (text is not None or "variant2" not in given):
            raise typer.BadParameter("--union goes with --variant2, and without an expression")
        asked = {
            "rank": rank or None,
            "energy": rank_thresh,
            "sum": sum,
            "ratio": ratio,
            "rank_max": rank_max or None,
            "noise_edge": noise_edge,
            "include": include,
            "exclude": exclude,
            "full": full,
            "rounding": rounding,
            "min_dim": min_dim,
            "alpha": alpha,
            "dtype": dtype,
            "method": method,
            "seed": seed,
            **options_of(device=device, threads=threads),
        }
        options = [*asked, "rank_thresh", "output", "flavour", "csv", "plot", "json", "quiet"]
        _extract(text or _of_variants(given, union), given, asked, output, flavour, csv, plot, as_json, quiet, options)


@loras.command("inspect")
def inspect_lora(source: Source, as_json: AsJson = False) -> None:
    """Show what a LoRA is, from its header: kind, names, targets, ranks, scales."""
    with exit_on_error():
        from alkahest.sources.lora_contents import contents_of

        found = contents_of(source)
        print(json.dumps(found.summary(), indent=2) if as_json else as_commands(str(found)))


@loras.command("convert")
def convert_lora(
    source: Source,
    output: Output,
    flavour: Flavour = "comfyui",
    only: Annotated[
        str | None, typer.Option(help="transformer: leave out what the file holds for other models, and say what.")
    ] = None,
) -> None:
    """Write a LoRA under another program's names, number for number."""
    with exit_on_error():
        lora = alkahest.open_lora(source, only=only)
        with say_replaced(output):
            converted = alkahest.convert_lora(lora, output, flavour)
        print(converted)
        _say_dropped(flavour, lora)
        for why, names in lora.left.items():
            print(f"{len(names)} tensors {why} are left out: {names[0]}, ...", file=sys.stderr)


@loras.command("resize")
def resize_lora(
    source: Source,
    output: Output,
    rank: Rank = 0,
    rank_thresh: Energy = None,
    sum: Sum = None,
    ratio: Ratio = None,
    rank_max: RankMax = 0,
    alpha: Alpha = None,
    dtype: LoraDtype = None,
    flavour: Flavour = "comfyui",
    csv: Csv = None,
    plot: Picture = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a LoRA of lower rank, by the rules of extract-lora; the models are not needed."""
    with exit_on_error():
        asked = {
            "rank": rank or None,
            "energy": rank_thresh,
            "sum": sum,
            "ratio": ratio,
            "rank_max": rank_max or None,
            "alpha": alpha,
            "dtype": dtype,
        }
        _extract("lora", {"lora": source}, asked, output, flavour, csv, plot, as_json, quiet)


@loras.command("merge", context_settings=NAMED)
def merge_loras(
    output: Output,
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="EXPRESSION --NAME PATH...",
            help='Such as "style + 0.5 * light" --style a.safetensors --light b.safetensors.',
        ),
    ],
    rank: Rank = 0,
    rank_thresh: Energy = None,
    rank_max: RankMax = 0,
    alpha: Alpha = None,
    dtype: LoraDtype = None,
    flavour: Flavour = "comfyui",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a sum of LoRAs as one LoRA, exactly unless a rank rule is given; the models are not needed."""
    with exit_on_error():
        text, given = split_arguments(what)
        if text is None:
            raise typer.BadParameter('name the sum, such as "a + 0.5 * b"')
        energy = 1.0 if rank_thresh is None and not rank else rank_thresh
        asked = {"rank": rank or None, "energy": energy, "rank_max": rank_max or None, "alpha": alpha, "dtype": dtype}
        options = ["rank", "rank_thresh", "rank_max", "alpha", "dtype", "output", "flavour", "json", "quiet"]
        _extract(text, given, asked, output, flavour, None, None, as_json, quiet, options)


def _of_variants(given: dict[str, Any], union: bool) -> str:
    """The difference that is meant without an expression: of one variant, or of two."""
    if "variant2" not in given:
        return "variant - base"
    return f"{'union' if union else 'common'}(variant - base, variant2 - base)"


def _extract(
    text: str,
    given: dict[str, Any],
    asked: dict[str, Any],
    output: Path,
    flavour: str,
    csv: Path | None,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
    options: Sequence[str] = (),
) -> None:
    from alkahest.files.whole import write_file, write_text
    from alkahest.lora.extract import stream_extract_lora
    from alkahest.lora.write import check_target
    from alkahest.recipes.inputs import build_delta

    require_outputs(csv, plot, None)
    delta = build_delta(text, given, options)
    inputs = [reader.path for leaf in delta.leaves() for reader in leaf.files]
    check_target(output, flavour, bool(asked.get("full")), inputs)
    found: Extracted = drain(stream_extract_lora(delta, **asked), quiet).result
    with say_replaced(output, csv, plot):
        lora = found.save(output, flavour)
        if csv is not None:
            write_text(csv, found.report.to_csv(index=False))
        if plot is not None:
            from alkahest.lab import plots

            write_file(plot, plots.lora_report(found.report).png(white=True))
    _say_dropped(flavour, lora)
    print(
        json.dumps({"path": str(lora.path), **found.summary()}, indent=2)
        if as_json
        else f"{found}\n  saved     {lora.path}"
    )


def _say_dropped(flavour: str, lora: alkahest.Lora) -> None:
    from alkahest.lora.dropped import dropped_by

    for what in dropped_by(flavour, lora.shapes):
        print(f"note: {what}", file=sys.stderr)

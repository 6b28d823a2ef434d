"""Commands that measure: diff, multiplier, check, cache."""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import alkahest
from alkahest.cli.shared import (
    MEASURING,
    STUDYING,
    AsJson,
    Cfg,
    Components,
    Count,
    Csv,
    Device,
    Ordinary,
    Picture,
    Pictures,
    Prompts,
    Quiet,
    Storage,
    Threads,
    app,
    by_pictures,
    drain,
    example,
    exit_on_error,
    number_option,
    options_of,
    require_outputs,
    say_replaced,
)

if TYPE_CHECKING:
    import pandas

Variant = Annotated[str, typer.Argument(help="Checkpoint that learned something.")]
Base = Annotated[str, typer.Argument(help="Checkpoint that it was made from.")]
On = Annotated[str | None, typer.Option(help="What the difference is to be added to; default: the base.")]
RoundingIn = Annotated[str | None, typer.Option("--dtype", help="Count rounding in this dtype; default: as stored.")]
Html = Annotated[Path | None, typer.Option("--html", help="Also write a report: one HTML file with everything in it.")]


@app.command(rich_help_panel=MEASURING, epilog=example("alkahest diff mini:base-variant mini:base --by block"))
def diff(
    variant: Variant,
    base: Base,
    on: On = None,
    k: Annotated[float, number_option("Multiplier of the difference.")] = 1.0,
    by: Annotated[str, typer.Option(help="One row for each part, block, module or tensor.")] = "part",
    dtype: RoundingIn = None,
    csv: Csv = None,
    plot: Picture = None,
    html: Html = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show where two checkpoints differ and how much, and how much of it adding would round away."""
    from alkahest.measure.table import stream_delta_table, table_text

    with exit_on_error():
        if by not in ("part", "block", "module", "tensor"):
            raise typer.BadParameter("--by is part, block, module or tensor")
        require_outputs(csv, plot, html)
        models = _opened(variant=variant, base=base, on=on)
        delta, weights = models["variant"] - models["base"], models.get("on")
        table = drain(
            stream_delta_table(delta, weights, k, dtype, **options_of(device=device, threads=threads)), quiet
        ).result
        _write(table, csv, plot, html, origin=_origin(models, html, quiet))
        print(table.to_json(orient="records", indent=1) if as_json else table_text(table, by))


@app.command(
    rich_help_panel=MEASURING,
    epilog=example("alkahest multiplier mini:base-weak mini:base --on mini:tb1 --protect refiner"),
)
def multiplier(
    variant: Variant,
    base: Base,
    on: On = None,
    protect: Annotated[str | None, typer.Option(help="What stays as it is in --on, such as refiner.")] = None,
    basis: Annotated[
        str | None,
        typer.Option(
            help=(
                "What the difference is stretched to. relative: a share of the weights' norm (2 %). survival: so much "
                "of it outlives rounding (90 %). bridge: as long as the bridge is from the base. reference: as long as "
                "--reference's. Default: relative; with --prompts or --pictures, what pictures say."
            )
        ),
    ] = None,
    target: Annotated[float | None, number_option("What the basis aims at; default: its own.")] = None,
    reference: Annotated[str | None, typer.Option(help="For --basis reference: a variant known to work.")] = None,
    reference_base: Annotated[str | None, typer.Option(help="The base of --reference; default: BASE.")] = None,
    prompts: Prompts = None,
    pictures: Pictures = None,
    ordinary: Ordinary = None,
    components: Components = None,
    cfg: Cfg = None,
    count: Count = None,
    storage: Storage = None,
    dtype: RoundingIn = None,
    csv: Csv = None,
    plot: Picture = None,
    html: Html = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compute the multiplier that a difference needs to take effect, and say on what basis.

    With `--prompts FILE` (or `--pictures FOLDER`) by what pictures say, which is surer than norms: the variant draws
    them, and the flow's loss is measured over k.
    """
    from alkahest.pictures.needed import stream_needed_multiplier

    with exit_on_error():
        require_outputs(csv, plot, html)
        if reference_base is not None and reference is None:
            raise typer.BadParameter("--reference-base is the base of --reference: name that too")
        models = _opened(variant=variant, base=base, on=on, reference=reference, reference_base=reference_base)
        opened = models["base"]
        delta = models["variant"] - opened
        weights: alkahest.Weights = models.get("on", opened)
        weights = weights if protect is None else weights.protect(protect)
        other = None
        if reference is not None:
            other = models["reference"] - models.get("reference_base", opened)
        options = options_of(device=device, threads=threads)
        options |= by_pictures(prompts, pictures, ordinary, components, cfg, count, storage)
        found = drain(stream_needed_multiplier(delta, weights, basis, target, other, dtype, **options), quiet).result
        _write(found.table, csv, plot, html, found, _origin(models, html, quiet))
        print(json.dumps(_as_record(found), indent=2) if as_json else repr(found))


@app.command(
    rich_help_panel=MEASURING,
    epilog=example("alkahest check mini:turbo-variant mini:base mini:deturbo --bridge mini:tb1"),
)
def check(
    variant: Variant,
    bases: Annotated[list[str], typer.Argument(metavar="BASE...", help="Its base; of several the nearest is taken.")],
    bridge: Annotated[str | None, typer.Option(help="Also say how far this bridge's refiner is.")] = None,
    csv: Csv = None,
    plot: Picture = None,
    html: Html = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say which base a variant was made from, and whether its refiner lets it be imported.

    Exit code 1 if it is not importable.
    """
    from alkahest.measure.lineage import check_of, stream_nearest_base
    from alkahest.measure.table import stream_delta_table

    with exit_on_error():
        require_outputs(csv, plot, html)
        options = options_of(device=device, threads=threads)
        opened, candidates = alkahest.open(variant), [alkahest.open(base) for base in bases]
        on = None if bridge is None else alkahest.open(bridge)
        nearest = drain(stream_nearest_base(opened, candidates, **options), quiet).result
        table = nearest.delta
        if on is not None:
            table = drain(stream_delta_table(opened - nearest.base, on, **options), quiet).result
        found = check_of(table, on is not None)
        models = {"variant": opened, "base": nearest.base} | ({} if on is None else {"bridge": on})
        _write(table, csv, plot, html, origin=_origin(models, html, quiet))
        if as_json:
            record = {
                "nearest_base": nearest.name,
                "candidates": nearest.table.to_dict("records"),
                "verdict": found.verdict,
                "refiner": found.refiner,
                "layers": found.layers,
                "reasons": found.reasons,
            }
            print(json.dumps(record, indent=2))
        else:
            print(*([nearest] if len(candidates) > 1 else []), found, sep="\n")
        if found.verdict == "not importable":
            raise typer.Exit(1)


@app.command(rich_help_panel=STUDYING, epilog=example("alkahest cache"))
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete what is there.")] = False,
    kind: Annotated[str | None, typer.Option(help="Only one of them, such as tables.")] = None,
    as_json: AsJson = False,
) -> None:
    """List what is remembered between runs (hashes, tables, curves, pictures, unsaved LoRAs), or delete it."""
    from alkahest.files.cache import KINDS, cache_folder
    from alkahest.files.reader import size_text

    with exit_on_error():
        if clear:
            freed = alkahest.clear_cache(kind)
            print(json.dumps({"freed": freed}) if as_json else f"{size_text(freed)} freed in {cache_folder()}")
            return
        found = alkahest.cached()
        sizes = {name: found[found.kind == name].bytes for name in KINDS if kind in (None, name)}
        if as_json:
            print(
                json.dumps(
                    {
                        "folder": str(cache_folder()),
                        **{name: {"entries": len(one), "bytes": int(one.sum())} for name, one in sizes.items()},
                    },
                    indent=2,
                )
            )
            return
        print(cache_folder())
        for name, one in sizes.items():
            print(f"  {name:11} {len(one):6,} entries  {size_text(int(one.sum())):>10}  {KINDS[name].what}")


def _opened(**sources: str | None) -> dict[str, alkahest.Checkpoint]:
    """The checkpoints that were named, by what they are for."""
    return {role: alkahest.open(source) for role, source in sources.items() if source is not None}


def _origin(models: dict[str, alkahest.Checkpoint], html: Path | None, quiet: bool) -> Any:
    """What a report says of its files and of the command, if there is to be one."""
    if html is None:
        return None
    from alkahest.lab.report_origin import stream_origin

    command = shlex.join(["alkahest", *sys.argv[1:]])
    return drain(stream_origin(models, command), quiet).result


def _write(
    table: pandas.DataFrame,
    csv: Path | None,
    plot: Path | None,
    html: Path | None,
    found: Any = None,
    origin: Any = None,
) -> None:
    """Write what was asked for of a table, and of the multiplier ``found`` from it."""
    with say_replaced(csv, plot, html):
        _write_each(table, csv, plot, html, found, origin)


def _write_each(
    table: pandas.DataFrame, csv: Path | None, plot: Path | None, html: Path | None, found: Any, origin: Any
) -> None:
    from alkahest.files.whole import write_file, write_text

    if csv is not None:
        absorbed = alkahest.absorbed(table)["count"]
        text = table.drop(columns=["ulps", "ulp_energy"]).assign(absorbed=absorbed).to_csv(index=False)
        write_text(csv, text)
    if html is not None:
        from alkahest.lab.report import write_report

        write_report(html, table, found, origin)
    if plot is not None:
        from alkahest.lab import plots

        if found is None:
            drawn = plots.delta_magnitudes(table)
        elif found.curve is not None:
            drawn = plots.loss_curve(found)
        else:
            drawn = plots.multiplier_overview(alkahest.rounding_curve(table), found)
        write_file(plot, drawn.png(white=True))


def _as_record(found: Any) -> dict[str, Any]:
    def plain(number: float) -> float | None:
        return number if math.isfinite(number) else None

    return {
        "value": found.value,
        "subtract": found.factors.subtract,
        "add": found.factors.add,
        "basis": found.basis,
        "target": plain(found.target),
        "formula": found.formula,
        "range": [plain(one) for one in found.range],
        "bases": {name: plain(k) for name, k in found.bases.items()},
        "warnings": list(found.warnings),
        "per_part": json.loads(found.per_part.to_json(orient="records")),
    }

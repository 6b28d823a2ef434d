"""The command line: ``alkahest inspect | diff | merge | convert | recipe | verify | make-checkpoint | mini``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import alkahest
from alkahest.errors import AlkahestError, RecipeError, UnsupportedError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Merge, measure and study Z-Image checkpoints.",
    epilog="Exit codes: 0 done, 1 refused or failed (stderr says why), 2 wrong usage, 130 interrupted.",
)

Output = Annotated[Path, typer.Option("--output", "-o", help="File to write (.safetensors), or a new folder.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="fp32, fp16, bf16, fp8_e4m3fn, fp8_e5m2, comfy_quant or scaled_fp8; default: as the leading input."
    ),
]
Layout = Annotated[str | None, typer.Option(help="native (ComfyUI), diffusers or all-in-one.")]
Rounding = Annotated[str, typer.Option(help="nearest (to even) or stochastic.")]
Seed = Annotated[int, typer.Option(help="Seed of stochastic rounding.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or mps, for the arithmetic.")]
Shards = Annotated[str | None, typer.Option(help="Write shards of at most this size, such as 5GB, into a new folder.")]
Threads = Annotated[int | None, typer.Option(help="Workers; the output does not depend on it.")]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Keep NaN, infinity and overflow; count them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
_NAMED = {"ignore_unknown_options": True}  # --bridge and the like are ours to read


family = typer.Typer(help="The miniature family: rebuild it, measure it.", no_args_is_help=True)
app.add_typer(family, name="mini")


@app.callback(invoke_without_command=True)
def _about(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(alkahest.__version__)
        raise typer.Exit


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="Checkpoint: file, folder, index.json or hub id.")],
    keys: Annotated[
        str | None, typer.Option(help="List the tensors that this pattern selects, such as refiner.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint is, from its header: layout, storage, parts, sizes."""
    with _reported():
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


@app.command()
def diff(
    variant: Annotated[str, typer.Argument(help="Checkpoint that learned something.")],
    base: Annotated[str, typer.Argument(help="Checkpoint that it was made from.")],
    on: Annotated[str | None, typer.Option(help="What the difference is to be added to; default: the base.")] = None,
    k: Annotated[float, typer.Option(help="Multiplier of the difference.")] = 1.0,
    by: Annotated[str, typer.Option(help="One row for each part, block, module or tensor.")] = "part",
    dtype: Annotated[str | None, typer.Option(help="Count rounding in this dtype; default: as stored.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write the whole table, a row for each tensor.")] = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show where two checkpoints differ and how much, and how much of it adding would round away."""
    from alkahest.delta_table import printed, stream_delta_table

    with _reported():
        if by not in ("part", "block", "module", "tensor"):
            raise typer.BadParameter("--by is part, block, module or tensor")
        opened = alkahest.open(variant) - alkahest.open(base)
        weights = None if on is None else alkahest.open(on)
        options = _options(device=device, threads=threads)
        table = _drain(stream_delta_table(opened, weights, k, dtype, **options), quiet).result
        if csv is not None:
            absorbed = alkahest.absorbed(table)["count"]
            table.drop(columns=["ulps", "ulp_energy"]).assign(absorbed=absorbed).to_csv(csv, index=False)
        if as_json:
            print(table.to_json(orient="records", indent=1))
        else:
            print(printed(table, by))


@app.command(context_settings=_NAMED)
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
    or as a number: `--k 171.1`.
    """
    with _reported():
        expression, given = _named(what or [])
        options = _options(
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
    with _reported():
        options = _options(
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
    with _reported():
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


@app.command(context_settings=_NAMED)
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

    with _reported():
        file, given = _named(what)
        if file is None:
            raise typer.BadParameter("name the file to check")
        found = _drain(check(file, given, recompute), quiet)
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
    with _reported():
        weights = alkahest.made_up(layers=layers, seed=seed, delta=delta, only=only, width=width)
        options = _options(dtype=storage, layout=layout, max_shard_size=max_shard_size, threads=threads)
        _save(weights, output, options, as_json, quiet)


@family.command("build")
def mini_build(
    folder: Annotated[
        Path, typer.Option("--folder", "-o", help="Folder to fill; a stopped build goes on in it.")
    ] = Path("mini-build"),
    threads: Annotated[int, typer.Option(help="Processor threads; the numbers depend on it a little.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, or cuda for a build in minutes.")] = "cpu",
    stage: Annotated[str | None, typer.Option(help="Stop after this stage, such as base.")] = None,
    quiet: Quiet = False,
) -> None:
    """Train the miniature family again from its seeds, and say how close it comes to the shipped one."""
    with _reported():
        import torch

        from alkahest.mini.build import build, closeness

        torch.set_num_threads(threads)
        _drain(build(folder, stage, device), quiet, unit="step")
        print(closeness(folder).round(4).to_string(index=False))


@family.command("measure")
def mini_measure(
    prompts: Annotated[int, typer.Option(help="Held-out prompts a model.")] = 1000,
    swaps: Annotated[int, typer.Option(help="Held-out prompts a cell of the swap table.")] = 200,
    sheets: Annotated[
        Path | None, typer.Option(help="Also draw contact sheets of everything into this folder.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Processor threads.")] = 2,
    quiet: Quiet = False,
) -> None:
    """Draw and judge the shipped family; print the tables of its README as Markdown."""
    with _reported():
        import torch

        from alkahest.mini import report

        torch.set_num_threads(threads)
        if sheets is not None:
            _drain(report.sheets(sheets), quiet, unit="sheet")
        print(report.markdown(_drain(report.measure(prompts, swaps), quiet, unit="picture").result))


def _merge(
    expression: str | None, recipe: Path | None, given: dict[str, Any], output: Path, options: dict[str, Any],
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    from alkahest.options import Options
    from alkahest.provenance import build
    from alkahest.recipe import Recipe

    if (expression is None) == (recipe is None):
        raise RecipeError("merge", "give either an expression or --recipe FILE", fix="see alkahest merge --help")
    if given.get("k") == "auto":
        raise UnsupportedError(
            "merge", "--k auto is reserved: the computed multiplier is not part of this version", fix="give a number"
        )
    found = Recipe(expression or "") if recipe is None else alkahest.read_recipe(recipe)[1]
    known = [*(field.name for field in dataclasses.fields(Options)), "output", "recipe", "json", "quiet"]
    weights = build(found, given, recipe.resolve().parent if recipe else None, known)
    _save(weights, output, {**found.output, **options}, as_json, quiet)


def _save(weights: alkahest.Weights, output: Path, options: dict[str, Any], as_json: bool, quiet: bool) -> None:
    result = _drain(weights.stream(output, **options), quiet).result
    print(json.dumps(dataclasses.asdict(result), indent=2, default=str) if as_json else result)


def _drain(events: Iterator[Any], quiet: bool, unit: str = "B") -> Any:
    """Run a generator of events to its end behind a progress bar; its last item."""
    from tqdm import tqdm

    event = None
    _raise_if_stopped()
    # disable=None: no bar where stderr is not a terminal.
    with tqdm(unit=unit, unit_scale=unit == "B", disable=True if quiet else None) as bar, contextlib.closing(events):  # type: ignore[type-var]
        for event in events:
            _raise_if_stopped()
            if hasattr(event, "total"):
                bar.total = event.total
                bar.set_postfix_str(event.key[:32], refresh=False)
                bar.update(event.done - bar.n)
    return event


def _named(arguments: list[str]) -> tuple[str | None, dict[str, Any]]:
    """The one argument without a name, and the ``--name value`` pairs: paths, or numbers."""
    alone: str | None = None
    given: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        if not argument.startswith("--") and alone is None:
            alone = argument
            continue
        if not argument.startswith("--") or not name.isidentifier():
            raise typer.BadParameter(f"unexpected argument {argument!r}")
        if not equals:
            value = next(rest, "")
        if not value:
            raise typer.BadParameter(f"--{name} needs a path or a number")
        with contextlib.suppress(ValueError):
            given[name] = float(value)
            continue
        given[name] = value
    return alone, given


def _options(**options: Any) -> dict[str, Any]:
    from alkahest.options import Options

    defaults = Options()
    return {name: value for name, value in options.items() if value != getattr(defaults, name)}


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Print our own errors without a traceback, and leave with the documented exit code."""

    # A shell tells background jobs to ignore SIGINT; that stays so.
    heard = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, _stop) for number in heard}
    try:
        yield
    except AlkahestError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        _stopped.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)


_stopped: list[int] = []


def _stop(number: int, frame: object) -> None:
    _stopped.append(number)
    _raise_if_stopped()


def _raise_if_stopped() -> None:
    # Importing torch swallows an exception raised by a signal, so the signal is remembered.
    if _stopped and _stopped[0] == signal.SIGINT:
        raise KeyboardInterrupt
    if _stopped:
        raise SystemExit(128 + _stopped[0])


def main() -> None:
    """Entry point of the ``alkahest`` command."""
    app()

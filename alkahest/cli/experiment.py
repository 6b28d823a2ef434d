"""Commands on the experiments: list, run, report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from alkahest.cli.shared import STUDYING, Quiet, app, drain, example, exit_on_error

group = typer.Typer(help="The article's claims as experiments: list them, run them, report.", no_args_is_help=True)
app.add_typer(group, name="experiment", rich_help_panel=STUDYING, epilog=example("alkahest experiment list"))
Root = Annotated[Path, typer.Option("--root", help="Folder of experiments.")]


@group.command("list")
def experiment_list(root: Root = Path("experiments")) -> None:
    """Every experiment and its recorded verdict."""
    with exit_on_error():
        from alkahest.errors import FileFormatError
        from alkahest.experiment.config import experiments
        from alkahest.experiment.record import checked_of, verdict

        for one in experiments(root):
            try:
                told = verdict(one, checked_of(one))
            except FileFormatError:
                told = "not run yet"
            print(f"{one.name:34} {told:22} {one.title}")


@group.command("run")
def experiment_run(
    names: Annotated[list[str] | None, typer.Argument(help="Names or numbers; all of them by default.")] = None,
    root: Root = Path("experiments"),
    family: Annotated[
        Path | None, typer.Option(help="Folder with another miniature family, as alkahest mini build makes.")
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(help="Grow the training runs in this folder; without it they are as recorded.")
    ] = None,
    retrain: Annotated[
        Path | None,
        typer.Option(
            help="Grow everything afresh in this folder, the family too: hours, and it goes on where it stopped."
        ),
    ] = None,
    rewrite: Annotated[
        bool,
        typer.Option("--rewrite", help="Measure nothing: write words, checks and figures anew from what is recorded."),
    ] = False,
    threads: Annotated[int, typer.Option(help="Processor threads; the numbers depend on it a little.")] = 2,
    quiet: Quiet = False,
) -> None:
    """Measure, and write each experiment's results, figures, README and manifest."""
    with exit_on_error():
        import torch

        from alkahest.errors import AlkahestError
        from alkahest.experiment.config import experiment_named, experiments
        from alkahest.experiment.reproduce import rewrite as rewritten
        from alkahest.experiment.reproduce import run_experiment, write_index

        torch.set_num_threads(threads)
        if (rewrite and (family or runs or retrain)) or (retrain and (family or runs)):
            raise AlkahestError(
                "experiment",
                "--rewrite measures nothing, and --retrain makes its own family and runs",
                fix="give one of them",
            )
        if retrain is not None:
            from alkahest.experiment.growing.build import build

            family, runs = retrain / "family", retrain / "runs"
            drain(build(family), quiet, unit="step")
        found = [experiment_named(name, root) for name in names] if names else experiments(root)
        for one in found:
            started = time.monotonic()
            print(f"{one.name:34} ", end="", flush=True)
            told = rewritten(one) if rewrite else drain(run_experiment(one, family, runs), quiet, unit="step").result
            print(f"{told} ({time.monotonic() - started:.0f} s)")
            write_index(root)


@group.command("report")
def experiment_report(
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file.")] = Path("reproduction.html"),
    root: Root = Path("experiments"),
) -> None:
    """Write one HTML report of what is recorded."""
    with exit_on_error():
        from alkahest.experiment.config import experiments
        from alkahest.experiment.reproduce import write_reproduction

        write_reproduction(output, experiments(root))
        print(output)

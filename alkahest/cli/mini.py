"""Commands on the miniature family."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alkahest.cli.shared import STUDYING, Quiet, app, drain, example, exit_on_error

family = typer.Typer(help="The miniature family: rebuild it, measure it.", no_args_is_help=True)
app.add_typer(family, name="mini", rich_help_panel=STUDYING, epilog=example("alkahest mini measure --prompts 100"))


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
    with exit_on_error():
        import torch

        from alkahest.experiment.growing.build import build, closeness

        torch.set_num_threads(threads)
        drain(build(folder, stage, device), quiet, unit="step")
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
    with exit_on_error():
        import torch

        from alkahest.experiment.growing import report

        torch.set_num_threads(threads)
        if sheets is not None:
            drain(report.sheets(sheets), quiet, unit="sheet")
        print(report.markdown(drain(report.measure(prompts, swaps), quiet, unit="picture").result))

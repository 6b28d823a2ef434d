"""``torchrun -m alkahest.finetune CONFIG -o FOLDER``: the run of ``alkahest finetune``, shared by many processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from alkahest.cli.shared import exit_on_error
from alkahest.cli.train import Threads, train_with_progress
from alkahest.training import parallel
from alkahest.training.loop import finetune


def main(
    config: Annotated[Path, typer.Argument(help="TOML file of the run.")],
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run, which all machines share.")],
    threads: Threads = None,
) -> None:
    """Fine-tune over the GPUs that torchrun gives, or over processors where there is none."""
    with exit_on_error(), parallel.processes() as device:
        first = parallel.rank() == 0
        result = train_with_progress(config, folder, device, threads, quiet=not first)
        if first:
            print(result)


if __name__ == "__main__":
    typer.run(main)
else:
    # A program to be run; `ak.finetune` stays the function even where somebody imports it.
    sys.modules[__name__] = finetune  # type: ignore[assignment]

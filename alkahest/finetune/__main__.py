"""``torchrun -m alkahest.finetune CONFIG -o FOLDER``: the run of ``alkahest finetune``, shared by many processes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alkahest.cli.shared import reported
from alkahest.cli.train import Threads, trained


def main(
    config: Annotated[Path, typer.Argument(help="TOML file of the run.")],
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run, which all machines share.")],
    threads: Threads = None,
) -> None:
    """Fine-tune over the GPUs that torchrun gives, or over processors where there is none."""
    with reported():
        from alkahest.finetune import parallel

        with parallel.processes() as device:
            first = parallel.rank() == 0
            result = trained(config, folder, device, threads, quiet=not first)
            if first:
                print(result)


if __name__ == "__main__":
    typer.run(main)

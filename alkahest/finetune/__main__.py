"""``torchrun -m alkahest.finetune CONFIG -o FOLDER``: the run of ``alkahest finetune``, shared by many processes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alkahest.cli.shared import drain, reported
from alkahest.cli.train import Threads


def main(
    config: Annotated[Path, typer.Argument(help="TOML file of the run.")],
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run, which all machines share.")],
    threads: Threads = None,
) -> None:
    """Fine-tune over the GPUs that torchrun gives, or over processors where there is none."""
    with reported():
        import torch

        from alkahest.finetune import parallel
        from alkahest.finetune.config import read_config
        from alkahest.finetune.loop import stream_finetune

        if threads is not None:
            torch.set_num_threads(threads)
        with parallel.processes() as device:
            first = parallel.rank() == 0
            event = drain(stream_finetune(read_config(config), folder, device), quiet=not first, unit="step")
            if first:
                print(event.result)


if __name__ == "__main__":
    typer.run(main)

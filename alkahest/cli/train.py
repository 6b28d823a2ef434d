"""Commands that train: finetune, make-dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import alkahest
from alkahest.cli.shared import (
    TRAINING,
    AsJson,
    Device,
    Quiet,
    app,
    drain,
    example,
    exit_on_error,
    lines_of,
    number_option,
)

Threads = Annotated[int | None, typer.Option(help="Processor threads of the arithmetic; default: torch's.")]


@app.command(rich_help_panel=TRAINING, epilog=example("alkahest finetune --plan mini:base --vram 24"))
def finetune(
    config: Annotated[Path, typer.Argument(help="TOML file of the run, or with --plan a checkpoint.")],
    folder: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run; one that was stopped goes on in it.")
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    plan: Annotated[bool, typer.Option("--plan", help="Train nothing: print what each mode takes of memory.")] = False,
    vram: Annotated[
        float | None,
        number_option("With --plan: GiB of the GPU, to say what fits."),
    ] = None,
    resolution: Annotated[int, typer.Option(help="With --plan: side of the pictures.")] = 1024,
    batch: Annotated[int, typer.Option(help="With --plan: pictures at a time.")] = 1,
    frozen: Annotated[str, typer.Option(help="With --plan: what is not trained.")] = "refiner",
    processes: Annotated[int, typer.Option(help="With --plan: GPUs that share the model.")] = 1,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model with its refiners frozen, stage by stage, from a TOML file.

    `alkahest finetune tb1.toml -o runs/tb1`; `alkahest finetune --plan z_image_bf16.safetensors --vram 24`.
    """
    with exit_on_error():
        if plan:
            _plan(config, vram, resolution, batch, frozen, processes, as_json)
            return
        if folder is None:
            raise typer.BadParameter("name the run's folder: -o FOLDER")
        result = train_with_progress(config, folder, device, threads, quiet)
        print(
            json.dumps(
                {"folder": str(result.folder), "frozen": result.frozen, "history": result.history.to_dict("records")}
            )
            if as_json
            else result
        )


def train_with_progress(config: Path, folder: Path, device: str, threads: int | None, quiet: bool) -> Any:
    """Run a configuration to its end behind a progress bar; its result, of several processes the first's."""
    import torch

    from alkahest.training.config import read_config
    from alkahest.training.loop import stream_finetune

    if threads is not None:
        torch.set_num_threads(threads)
    return drain(stream_finetune(read_config(config), folder, device), quiet, unit="step").result


@app.command(
    "make-dataset",
    rich_help_panel=TRAINING,
    epilog=example("alkahest make-dataset --from mini:base --from mini:turbo --prompts prompts.txt -o drawn"),
)
def make_dataset(
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder for pictures and captions; goes on in one.")],
    model: Annotated[
        list[str],
        typer.Option("--from", help="Checkpoint that draws, or mini:NAME of the miniature family; may be repeated."),
    ],
    prompts: Annotated[Path, typer.Option(help="Text file with a prompt a line; each model draws each.")],
    components: Annotated[str | None, typer.Option(help="Pipeline folder or hub id for text encoder and VAE.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of each picture.")] = 24,
    cfg: Annotated[float, number_option("Guidance in ComfyUI's meaning; 1 is none.")] = 3.0,
    shift: Annotated[float, number_option("Shift of the noise levels.")] = 3.0,
    device: Device = "cpu",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Have models draw a dataset to train on, as the article's TB-1 was trained on Z-Image's own pictures."""
    from alkahest.pictures.dataset import stream_make_dataset

    with exit_on_error():
        lines = lines_of(prompts, "make_dataset")
        models: dict[str, Any] = {}
        for source in model:
            weights = alkahest.open(source)
            models[weights.name if weights.name not in models else f"{weights.name}_{len(models)}"] = alkahest.pipeline(
                weights, components, device=device
            )
        found = drain(
            stream_make_dataset(models, lines, folder, steps=steps, cfg=cfg, shift=shift), quiet, unit="picture"
        ).result
        print(json.dumps({"folder": str(folder), "pictures": len(found)}) if as_json else found)


def _plan(
    source: Path, vram: float | None, resolution: int, batch: int, frozen: str, processes: int, as_json: bool
) -> None:
    from alkahest.training.memory import memory_plan

    weights = alkahest.open(source)
    table = memory_plan(weights, vram, frozen=frozen, resolution=resolution, batch=batch, processes=processes)
    if as_json:
        print(table.to_json(orient="records", indent=1))
        return
    print(
        f"GiB on each of {processes} GPUs" if processes > 1 else "GiB on one GPU",
        f"for {resolution} x {resolution}, batch {batch}, gradient checkpointing",
    )
    print(table.round(1).to_string(index=False))

"""What a run measures as it goes, and where it writes that down: history.jsonl, pictures, and trackers on request."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from alkahest.errors import FileFormatError, UnsupportedError, refuse_unknown_options
from alkahest.files.whole import write_text
from alkahest.pictures.encoded import Encoded, Item
from alkahest.pictures.flow import Arithmetic, losses
from alkahest.pictures.quality import picture_measures
from alkahest.pictures.sampler import sample
from alkahest.training import parallel
from alkahest.training.config import Config, Stage
from alkahest.training.objective import add_noise

if TYPE_CHECKING:
    import pandas

Data = Mapping[tuple[str, int], Encoded]  # by name and resolution
Files = Mapping[str, Mapping[str, str]]  # dataset -> file -> what there is to say


@refuse_unknown_options
def read_history(folder: str | Path) -> pandas.DataFrame:
    """What a run measured so far, while it trains or after: a DataFrame with a row for each measurement.

    Parameters
    ----------
    folder : str or path
        Of the run.

    Returns
    -------
    pandas.DataFrame

    Raises
    ------
    FileFormatError
        If its history is damaged, or there is no such folder.

    Examples
    --------
    >>> result = ak.finetune(ak.read_config("tb1.toml"), "runs/tb1")
    >>> losses = ak.read_history("runs/tb1")[["step", "loss"]]
    """
    import pandas as pd

    if not Path(folder).is_dir():
        raise FileFormatError("read_history", "there is no such run", file=folder, fix="give the folder of a run")
    rows = [row for row in _rows(Path(folder) / "history.jsonl") if "left_out" not in row]
    return pd.DataFrame([{k: math.nan if v is None else v for k, v in row.items()} for row in rows])


def read_files(folder: str | Path, which: str) -> dict[str, dict[str, str]]:
    """What a run's datasets ``left_out``, or ``noted`` of pictures that were taken, by dataset and file.

    >>> read_files("runs/tb1", "left_out")
    {'people': {'a.png': 'no caption'}}
    """
    rows = _rows(Path(folder) / "history.jsonl")
    return next((row[which] for row in rows if isinstance(row.get(which), dict)), {})


def _rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a history; one that a kill cut off is none. FileFormatError for one that is damaged otherwise."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row = b""
        if isinstance(row, dict) and ("left_out" in row or isinstance(row.get("step"), int)):
            rows.append(row)
        elif row is not None and number < len(lines) - 1:
            raise FileFormatError(
                "read_history",
                f"line {number + 1} of the history is damaged",
                file=path,
                found=repr(line[:60]),
                fix="delete that line: it is one measurement",
            )
    return rows


def _line(row: Mapping[str, Any]) -> str:
    """A row as JSON, in which what is no number is null."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(plain, allow_nan=False) + "\n"


class Monitor:
    """Held-out loss at fixed noise and pictures of the prompts at fixed seeds, step by step."""

    def __init__(self, config: Config, folder: Path, pipe: Any, held: Data, how: Arithmetic) -> None:
        self.config, self.folder, self.pipe, self.held, self.how = config, folder, pipe, held, how
        self._tracker = _tracker(config, folder) if parallel.rank() == 0 else None

    def resume(self, step: int) -> None:
        """Forget what was measured after a step; the run comes by there again."""
        if parallel.rank() == 0 and (path := self.folder / "history.jsonl").exists():
            kept = [row for row in _rows(path) if step and "left_out" not in row and row["step"] <= step]
            write_text(path, "".join(_line(row) for row in kept))

    def note_files(self, left_out: Files, noted: Files) -> None:
        """Write down what the datasets leave out, and did not take as it is, by file, before what is measured."""
        if parallel.rank() == 0 and (left_out or noted):
            path = self.folder / "history.jsonl"
            measured = [_line(row) for row in _rows(path)]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, "".join([_line({"left_out": left_out, "noted": noted}), *measured]))

    def step(self, step: int, loss: float, rate: float) -> None:
        """Note a step's loss where a tracker wants each."""
        if self._tracker is not None:
            self._tracker.log(step, {"loss": loss, "lr": rate})

    def close(self) -> None:
        if self._tracker is not None:
            self._tracker.close()

    @torch.no_grad()
    def measure(self, step: int, stage: str, loss: float) -> dict[str, Any]:
        """Measure, and write down: the row."""
        images: Sequence[Any] = []
        row: dict[str, Any] = {"step": step, "stage": stage, "loss": loss}
        with self.how.autocast():
            for (name, resolution), held in self.held.items():
                if len(held):
                    row[f"held_out {name} {resolution}"] = self._held_out(held)
            if self.config.prompts:
                images = sample(self.pipe, list(self.config.prompts), seed=0, **self.config.sampling).images
                row |= {name: float(value) for name, value in picture_measures(images, self.pipe).mean().items()}
        if parallel.rank() == 0:
            self._write(row, images)
        return row

    def _write(self, row: Mapping[str, Any], images: Sequence[Any]) -> None:
        place = self.folder / "pictures"
        place.mkdir(parents=True, exist_ok=True)
        for n, image in enumerate(images):
            image.save(place / f"{row['step']:07}-{n:02}.png")
        with (self.folder / "history.jsonl").open("a") as file:
            file.write(_line(row))
        if self._tracker is not None:
            numbers = {name: value for name, value in row.items() if isinstance(value, float) and math.isfinite(value)}
            pictures = dict(zip(self.config.prompts, images, strict=False))
            self._tracker.log(row["step"], numbers, pictures)

    def _held_out(self, held: Encoded) -> float:
        stage = Stage("held out", {}, 1, 1.0, drop=0.0)
        total = 0.0
        for first in range(0, len(held), 16):
            chosen = list(range(first, min(first + 16, len(held))))
            for bucket in {held.items[n].bucket for n in chosen}:
                same = [n for n in chosen if held.items[n].bucket == bucket]
                made = add_noise(
                    [held.latents(n) for n in same],
                    [held.embedding(n) for n in same],
                    held.empty,
                    stage,
                    self.config.seed,
                    -1,
                    first,
                )
                total += float(losses(self.pipe.transformer, made, self.how).sum())
        return total / len(held)


def split(whole: Encoded, held_out: int) -> tuple[Encoded, Encoded]:
    """Examples to train on, and some to measure on: never more than a tenth."""
    count = min(held_out, len(whole) // 10)
    chosen = {n * len(whole) // count for n in range(count)}
    items = list(enumerate(whole.items))
    sides: Sequence[list[Item]] = ([i for n, i in items if n not in chosen], [i for n, i in items if n in chosen])
    train, held = (Encoded(whole.name, side, whole.empty, whole.skipped, whole.notes, whole._known) for side in sides)
    return train, held


# --- trackers ------------------------------------------------------------------------------------


class _TensorBoard:
    """``tensorboard --logdir FOLDER``"""

    def __init__(self, config: Config, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UnsupportedError("finetune", "TensorBoard is not installed", fix="pip install tensorboard") from None
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, Any] | None = None) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        for name, image in (pictures or {}).items():
            self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Weights & Biases; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, config: Config, folder: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise UnsupportedError("finetune", "Weights & Biases is not installed", fix="pip install wandb") from None
        self._wandb = wandb
        folder.mkdir(parents=True, exist_ok=True)
        # The run's folder names it, so that one that goes on is the same run there.
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "alkahest"),
            id=f"{folder.name}-{config.digest}",
            name=folder.name,
            dir=str(folder),
            resume="allow",
        )

    def log(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, Any] | None = None) -> None:
        shown = {prompt: self._wandb.Image(image) for prompt, image in (pictures or {}).items()}
        self._run.log({**numbers, **shown}, step=step)

    def close(self) -> None:
        self._run.finish()


def _tracker(config: Config, folder: Path) -> Any:
    kinds = {"tensorboard": _TensorBoard, "wandb": _Wandb}
    return kinds[config.log](config, folder) if config.log else None

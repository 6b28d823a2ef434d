"""Train: a generator of step events, from a configuration to weights that draw."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from alkahest.encoding import Encoded, Item
from alkahest.errors import AlkahestError, MismatchError, NonFiniteError
from alkahest.expr import Weights
from alkahest.finetune.checkpoints import Frozen, existing, load_checkpoint, save_checkpoint
from alkahest.finetune.config import Config, Stage
from alkahest.finetune.events import StepEvent
from alkahest.finetune.inputs import prepared, reset, start_of
from alkahest.finetune.objective import losses, noised
from alkahest.finetune.optimise import Updates, rate_at
from alkahest.finetune.trained import Finetuned, Tensors, snapshot
from alkahest.keys import Pattern
from alkahest.order import Order

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, repr=False)
class Result:
    """What a run gave: ``weights`` for expressions and `save`, ``ema`` if there is one, and the ``history``."""

    weights: Weights
    ema: Weights | None
    folder: Path
    frozen: str

    @property
    def history(self) -> pandas.DataFrame:
        """A row for each measurement."""
        return read_history(self.folder)

    def __repr__(self) -> str:
        return f"{self.weights!r}\n  frozen tensors unchanged (digest {self.frozen})\n  {self.folder}"


def read_history(folder: str | Path) -> pandas.DataFrame:
    """What a run measured so far, while it trains or after: a DataFrame with a row for each measurement.

    >>> read_history("runs/tb1").plot("step", "held_out")
    """
    import pandas as pd

    path = Path(folder) / "history.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return pd.DataFrame(rows)


def finetune(config: Config, folder: str | Path, device: str = "cpu") -> Result:
    """Train by a configuration; `stream_finetune` is the same as a generator of events.

    >>> result = ak.finetune(ak.read_config("tb1.toml"), "runs/tb1")
    >>> result.weights.save("tb1.safetensors", dtype="bf16")

    Everything that is not selected by ``config.frozen`` is trained; what is frozen is checked by hash at every
    checkpoint. A run in a folder that holds checkpoints of the same configuration goes on from the last, and
    gives the same weights to the bit as one that was never stopped (one process, one machine). Raises
    NonFiniteError if the loss is no number any more, MismatchError if the folder is another run's.
    """
    *_, last = stream_finetune(config, folder, device)
    assert last.result is not None  # the last event carries it
    return last.result


def stream_finetune(config: Config, folder: str | Path, device: str = "cpu") -> Iterator[StepEvent]:
    """`finetune` as a generator of events; closing it leaves the last checkpoint to go on from."""
    path = Path(folder).expanduser()
    start = start_of(config)
    for pattern in filter(None, (config.frozen, config.reset)):
        Pattern(pattern).require_match(start.shapes, "finetune")
    data, pipe = yield from prepared(config, start, path, device)
    yield from _Training(config, start, pipe, data, path).run()


class _Training:
    """One process's share of a run."""

    def __init__(self, config: Config, start: Weights, pipe: Any, encoded: Mapping[tuple[str, int], Encoded], folder: Path) -> None:  # fmt: skip
        self.config, self.start, self.pipe, self.folder = config, start, pipe, folder
        self.model = pipe.transformer
        self.device, self.dtype = self.model.device, self.model.dtype
        if config.reset:
            reset(self.model, Pattern(config.reset), config.seed)
        frozen = Pattern(config.frozen) if config.frozen else None
        names = [name for name, _ in self.model.named_parameters()]
        fixed = [name for name in names if frozen is not None and frozen.matches(name)]
        self.trained = {name: p for name, p in self.model.named_parameters() if name not in set(fixed)}
        if not self.trained:
            raise AlkahestError("finetune", "everything is frozen", found=config.frozen, fix="freeze less, such as 'refiner'")  # fmt: skip
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.trained)
        if config.checkpointing:
            self.model.enable_gradient_checkpointing()
        self.frozen = Frozen(self.model, fixed)
        self.updates = Updates(self.trained, config)
        self.ema = {name: p.detach().float().cpu().clone() for name, p in self.trained.items()} if config.ema else {}
        self.data = {key: _split(one, config.held_out) for key, one in encoded.items()}
        self.orders = [self._order(stage) for stage in config.stages]
        self.step = 0

    def run(self) -> Iterator[StepEvent]:
        self._resume()
        config, total = self.config, self.config.steps
        if self.step == 0:
            yield self._measured()
        self.model.train()
        while self.step < total:
            number, within = config.stage_at(self.step)
            loss = self._one(config.stages[number], self.orders[number], within)
            self.step += 1
            key = f"{config.stages[number].name}: loss {loss:.4f}"
            if self.step % config.measure_every == 0 or self.step == total:
                yield self._measured(key, loss)
            else:
                yield StepEvent(self.step, total, key, loss)
            if self.step % config.save_every == 0 or self.step == total:
                self._save()
            if config.export and within + 1 == config.stages[number].steps:
                self._export(number)
        self.model.eval().requires_grad_(False)
        yield StepEvent(self.step, total, "done", result=self._result())

    def _one(self, stage: Stage, order: Order, within: int) -> float:
        """One step: as many batches as are accumulated, and the update."""
        config, mean = self.config, 0.0
        self.updates.begin(self.step, rate_at(within, stage.steps, stage.lr, stage.warmup, stage.decay))
        for part in range(config.accumulate):
            batch = order.take()
            picked = [(order.datasets[number], example) for number, example in batch.picks]
            latents = [dataset.latents(example) for dataset, example in picked]
            captions = [dataset.embedding(example) for dataset, example in picked]
            made = noised(latents, captions, picked[0][0].empty, stage, config.seed, self.step, part * stage.batch)
            loss = losses(self.model, made, self.device, self.dtype).mean()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise self._lost(value)
            mean += value / config.accumulate
            (loss / config.accumulate).backward()  # type: ignore[no-untyped-call]
        if config.clip:
            nn.utils.clip_grad_norm_(self.trained.values(), config.clip)
        self.updates.finish()
        for name, running in self.ema.items():
            running.lerp_(self.trained[name].detach().float().cpu(), 1 - config.ema)
        return mean

    def _lost(self, value: float) -> NonFiniteError:
        saved = existing(self.folder / "checkpoints")
        good = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was saved yet"
        return NonFiniteError("finetune", f"the loss is no number any more at step {self.step + 1}", found=value, fix=f"a smaller lr, or clip above 0; {good}")  # fmt: skip

    @torch.no_grad()
    def _measured(self, key: str = "start", loss: float = math.nan) -> StepEvent:
        """Loss on held-out examples at fixed noise, and pictures of the prompts, written to the history."""
        from alkahest.measures import picture_measures
        from alkahest.sample import sample

        self.model.eval()
        number, _ = self.config.stage_at(max(0, self.step - 1))
        row: dict[str, Any] = {"step": self.step, "stage": self.config.stages[number].name, "loss": loss}
        for (name, resolution), (_, held) in self.data.items():
            if len(held):
                row[f"held_out {name} {resolution}"] = self._held_out(held)
        if self.config.prompts:
            images = sample(self.pipe, list(self.config.prompts), seed=0, **self.config.sampling).images
            place = self.folder / "pictures"
            place.mkdir(parents=True, exist_ok=True)
            for n, image in enumerate(images):
                image.save(place / f"{self.step:07}-{n:02}.png")
            row |= {name: float(value) for name, value in picture_measures(images, self.pipe).mean().items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "history.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.model.train()
        return StepEvent(self.step, self.config.steps, key, loss, row)

    def _held_out(self, held: Encoded) -> float:
        stage = Stage("held out", {}, 1, 1.0, drop=0.0)
        total = 0.0
        for first in range(0, len(held), 16):
            chosen = list(range(first, min(first + 16, len(held))))
            for bucket in {held.items[n].bucket for n in chosen}:
                same = [n for n in chosen if held.items[n].bucket == bucket]
                made = noised([held.latents(n) for n in same], [held.embedding(n) for n in same], held.empty, stage, self.config.seed, -1, first)  # fmt: skip
                total += float(losses(self.model, made, self.device, self.dtype).sum())
        return total / len(held)

    def _order(self, stage: Stage) -> Order:
        datasets = [self.data[name, stage.resolution][0] for name in stage.mix]
        return Order(datasets, list(stage.mix.values()), stage.batch, self.config.seed)

    def _save(self) -> None:
        self.frozen.check(self.step)
        about = {"config": self.config.digest, "frozen": self.frozen.digest, "orders": [order.state for order in self.orders]}  # fmt: skip
        save_checkpoint(
            self.folder / "checkpoints", self.step, about,
            trained=self.trained, optimiser=dict(self.updates.state()), ema=self.ema,
        )  # fmt: skip

    def _export(self, number: int) -> None:
        """The model at the end of a stage, as a checkpoint for everybody."""
        result = self._result()
        target = self.folder / f"{number + 1}-{self.config.stages[number].name}.safetensors"
        (result.ema or result.weights).save(target, dtype=self.config.export)

    def _resume(self) -> None:
        saved = existing(self.folder / "checkpoints")
        if not saved:
            (self.folder / "history.jsonl").unlink(missing_ok=True)
            return
        found = load_checkpoint(saved[-1])
        for name, ours in (("config", self.config.digest), ("frozen", self.frozen.digest)):
            if found.about[name] != ours:
                what = "of another configuration" if name == "config" else "started from other weights"
                raise MismatchError("finetune", f"the checkpoints in this folder are {what}", file=found.folder, fix="name another folder, or restore the configuration and inputs")  # fmt: skip
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(found.trained[name])
        for name, running in self.ema.items():
            running.copy_(found.ema[name])
        self.updates.load(found.optimiser)
        for order, state in zip(self.orders, found.about["orders"], strict=True):
            order.go_to(state)
        self.step = found.step
        rows = [json.loads(line) for line in (self.folder / "history.jsonl").read_text().splitlines()]
        kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= self.step]
        (self.folder / "history.jsonl").write_text("".join(kept))

    def _result(self) -> Result:
        run = f"{self.config.digest}, {self.step} steps"
        ema = Finetuned(self.start, f"{run}, ema", Tensors(dict(self.ema))) if self.ema else None
        return Result(Finetuned(self.start, run, snapshot(self.trained)), ema, self.folder, self.frozen.digest)


def _split(whole: Encoded, held_out: int) -> tuple[Encoded, Encoded]:
    """Examples to train on, and some to measure on: never more than a tenth."""
    count = min(held_out, len(whole) // 10)
    chosen = set(_spread(len(whole), count))
    items = list(enumerate(whole.items))
    sides: Sequence[list[Item]] = ([i for n, i in items if n not in chosen], [i for n, i in items if n in chosen])
    train, held = (Encoded(whole.name, side, whole.empty, whole.skipped) for side in sides)
    return train, held


def _spread(length: int, count: int) -> list[int]:
    return [n * length // count for n in range(count)] if count else []

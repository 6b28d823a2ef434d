"""Train: a generator of step events, from a configuration to weights that draw."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from alkahest.algebra.weights import Weights
from alkahest.engine.events import result_of
from alkahest.engine.options import existing_device
from alkahest.errors import (
    AlkahestError,
    MismatchError,
    NonFiniteError,
    UnsupportedError,
    printable,
    refuse_unknown_options,
)
from alkahest.files.paths import expanded
from alkahest.files.whole import only_one
from alkahest.model.keys import Pattern
from alkahest.pictures.encoded import Encoded
from alkahest.pictures.flow import Arithmetic, losses
from alkahest.sources.lora import open_lora
from alkahest.training import parallel
from alkahest.training.adapter import add_lora, save_adapter
from alkahest.training.config import Config, Stage
from alkahest.training.events import TrainingStep
from alkahest.training.inputs import files_words, prepare, reset_tensors, start_of
from alkahest.training.memory import out_of_memory
from alkahest.training.monitor import Monitor, read_files, read_history, split
from alkahest.training.objective import add_noise
from alkahest.training.optimise import Updates, rate_at
from alkahest.training.order import Order
from alkahest.training.states import Frozen, about_checkpoint, load_checkpoint, save_checkpoint, saved_checkpoints
from alkahest.training.trained import Finetuned, Tensors, snapshot

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, repr=False)
class Result:
    """What a run gave: ``weights`` for expressions and `save`, ``ema`` if there is one, and the ``history``."""

    weights: Weights  # what was trained
    ema: Weights | None  # their running mean, if one was kept
    folder: Path  # of the run
    frozen: str  # digest of what was not trained, the same as at the start

    @property
    def history(self) -> pandas.DataFrame:
        """A row for each measurement."""
        return read_history(self.folder)

    @property
    def left_out(self) -> dict[str, dict[str, str]]:
        """What the datasets left out, by dataset and file, with the reason."""
        return read_files(self.folder, "left_out")

    @property
    def noted(self) -> dict[str, dict[str, str]]:
        """What was done to pictures that were taken, and which of two captions was, by dataset and file."""
        return read_files(self.folder, "noted")

    def __repr__(self) -> str:
        lines = [f"{self.weights!r}", f"  frozen tensors unchanged (digest {self.frozen})", f"  {self.folder}"]
        left_out, noted = self.left_out, self.noted
        for name in {**left_out, **noted}:
            lines += [f"  {line}" for line in files_words(name, left_out.get(name, {}), noted.get(name, {}))]
        return printable("\n".join(lines))


@refuse_unknown_options
def finetune(config: Config, folder: str | Path, device: str = "cpu") -> Result:
    """Train by a configuration; `stream_finetune` is the same as a generator of events.

    Everything that is not selected by ``config.frozen`` is trained, or with ``config.lora`` a LoRA beside it; what is
    frozen is checked by hash at every checkpoint. A run in a folder that holds checkpoints of the same configuration
    goes on from the last, and gives the same weights to the bit as one that was never stopped (one process, one
    machine).

    Parameters
    ----------
    config : Config
        Of `read_config`.
    folder : str or path
        Of the run.
    device : str, default "cpu"
        Where models run: ``cpu``, ``cuda`` or ``mps``.

    Returns
    -------
    Result
        ``weights`` is an expression.

    Raises
    ------
    NonFiniteError
        If the loss is no number any more.
    MismatchError
        If the folder is another run's.
    AlkahestError
        With what would fit, if memory runs out.

    Examples
    --------
    >>> result = ak.finetune(ak.read_config("tb1.toml"), "runs/tb1")
    >>> saved = result.weights.save("tb1.safetensors", dtype="bf16")
    """
    result: Result = result_of(stream_finetune(config, folder, device), "finetune")
    return result


@refuse_unknown_options
def stream_finetune(config: Config, folder: str | Path, device: str = "cpu") -> Iterator[TrainingStep]:
    """`finetune` as a generator of events; closing it leaves the last checkpoint to go on from."""
    path = expanded(folder, "finetune")
    start = start_of(config)
    existing_device(device, "finetune")
    _check_processes(config)
    reset = Pattern(config.reset, start.family) if config.reset else None
    for pattern in filter(None, (config.frozen_pattern(start.family), reset)):
        pattern.require_match(start.shapes, "finetune")
    try:
        with only_one(path, "finetune") if parallel.rank() == 0 else contextlib.nullcontext():
            data, pipe = yield from prepare(config, start, path, device)
            yield from _Training(config, start, pipe, data, path).run()
    except (RuntimeError, MemoryError) as error:
        raise out_of_memory(error, config, start) or error from None


def _check_processes(config: Config) -> None:
    """What several processes cannot do is refused."""
    count = parallel.size()
    if count == 1:
        return
    if config.optimiser != "adamw":
        raise UnsupportedError(
            "finetune",
            f"{config.optimiser} needs whole tensors, and {count} processes have rows of them",
            fix='optimiser = "adamw"',
        )
    if config.lora:
        raise UnsupportedError(
            "finetune",
            "a LoRA is trained by one process",
            found=f"{count} processes",
            fix="one process: it needs no more memory than the weights and a little",
        )
    for stage in config.stages:
        if stage.batch % count:
            raise UnsupportedError(
                "finetune",
                f"stage {stage.name!r}: {count} processes cannot share its batch equally",
                found=f"batch = {stage.batch}",
                fix=f"a multiple of {count}",
            )


def _digest_of(encoded: Mapping[tuple[str, int], Encoded]) -> str:
    """What tells one set of data from another: every picture and caption, by content, in its order."""
    digest = hashlib.blake2b(digest_size=16)
    for (name, resolution), one in sorted(encoded.items()):
        digest.update(f"{name} {resolution} {len(one)}".encode())
        for item in one.items:
            digest.update(f" {item.latents.stem} {item.embedding.stem}".encode())
    return digest.hexdigest()


class _Training:
    """One process's share of a run."""

    def __init__(
        self, config: Config, start: Weights, pipe: Any, encoded: Mapping[tuple[str, int], Encoded], folder: Path
    ) -> None:
        self.config, self.start, self.pipe, self.folder = config, start, pipe, folder
        self.model = pipe.transformer
        if config.reset:
            reset_tensors(self.model, Pattern(config.reset, start.family), config.seed)
        if config.lora:
            add_lora(self.model, config, start.family)
        parameters = dict(self.model.named_parameters())
        self.trained = {name: p for name, p in parameters.items() if config.trains(name, start.family)}
        if not self.trained:
            raise AlkahestError(
                "finetune", "everything is frozen", found=config.frozen, fix="freeze less, such as 'refiner'"
            )
        fixed = [name for name in parameters if name not in self.trained]
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in self.trained)
        if config.checkpointing:
            self.model.enable_gradient_checkpointing()
        self.frozen = Frozen(self.model, fixed)
        self.updates = Updates(self.trained, config)
        self.ema = (
            {name: parallel.local(p.detach()).float().cpu().clone() for name, p in self.trained.items()}
            if config.ema
            else {}
        )
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.how = Arithmetic(self.model.device, dtype, config.precision == "mixed")
        sides = {key: split(one, config.held_out) for key, one in encoded.items()}
        self.data = {key: train for key, (train, _) in sides.items()}
        self.orders = [self._order(stage) for stage in config.stages]
        self.monitor = Monitor(config, folder, pipe, {key: held for key, (_, held) in sides.items()}, self.how)
        self.left_out = {name: dict(one.skipped) for (name, _), one in encoded.items() if one.skipped}
        self.noted = {name: dict(one.notes) for (name, _), one in encoded.items() if one.notes}
        self.data_digest = _digest_of(encoded)
        self.step = 0

    def run(self) -> Iterator[TrainingStep]:
        self._resume()
        config, total = self.config, self.config.steps
        if self.step == 0:
            yield self._measure("start", math.nan)
        self.model.train()
        whole = None
        while self.step < total:
            number, within = config.stage_at(self.step)
            stage = config.stages[number]
            rate = rate_at(within, stage.steps, stage.lr, stage.warmup, stage.decay)
            loss = self._one(stage, self.orders[number], rate)
            self.step += 1
            self.monitor.step(self.step, loss, rate)
            key = f"{stage.name}: loss {loss:.4f}"
            if self.step % config.measure_every == 0 or self.step == total:
                yield self._measure(key, loss)
            else:
                yield TrainingStep(self.step, total, key, loss=loss)
            if self.step % config.save_every == 0 or self.step == total:
                self._save()
            whole = None
            if config.export and within + 1 == stage.steps:
                whole = self._whole()
                self._export(number, *whole)
        self.model.eval().requires_grad_(False)
        self.monitor.close()
        yield TrainingStep(self.step, total, "done", result=self._result(*(whole or self._whole())))

    def _one(self, stage: Stage, order: Order, rate: float) -> float:
        """One step: as many batches as are accumulated, and the update."""
        config, mean = self.config, 0.0
        self.updates.begin(self.step, rate)
        for part in range(config.accumulate):
            batch = order.take()
            share = len(batch.picks) // parallel.size()
            first = parallel.rank() * share
            picked = [(order.datasets[number], example) for number, example in batch.picks[first : first + share]]
            latents = [dataset.latents(example) for dataset, example in picked]
            captions = [dataset.embedding(example) for dataset, example in picked]
            made = add_noise(
                latents, captions, picked[0][0].empty, stage, config.seed, self.step, part * stage.batch + first
            )
            loss = losses(self.model, made, self.how).mean()
            value = parallel.mean(float(loss.detach()))
            if not math.isfinite(value):
                raise self._lost_error(value)
            mean += value / config.accumulate
            (loss / config.accumulate).backward()  # type: ignore[no-untyped-call]
        if config.clip:
            nn.utils.clip_grad_norm_(self.trained.values(), config.clip)
        self.updates.finish()
        for name, running in self.ema.items():
            running.lerp_(parallel.local(self.trained[name].detach()).float().cpu(), 1 - config.ema)
        return mean

    def _lost_error(self, value: float) -> NonFiniteError:
        saved = saved_checkpoints(self.folder / "checkpoints")
        good = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was saved yet"
        return NonFiniteError(
            "finetune",
            f"the loss is no number any more at step {self.step + 1}",
            found=value,
            fix=f"a smaller lr, or clip above 0; {good}",
        )

    def _measure(self, key: str, loss: float) -> TrainingStep:
        self.model.eval()
        number, _ = self.config.stage_at(max(0, self.step - 1))
        row = self.monitor.measure(self.step, self.config.stages[number].name, loss)
        self.model.train()
        return TrainingStep(self.step, self.config.steps, key, loss=loss, row=row)

    def _order(self, stage: Stage) -> Order:
        datasets = [self.data[name, stage.resolution] for name in stage.mix]
        return Order(datasets, list(stage.mix.values()), stage.batch, self.config.seed)

    def _save(self) -> None:
        self.frozen.check(self.step)
        about = {
            "config": self.config.digest,
            "frozen": self.frozen.digest,
            "data": self.data_digest,
            "orders": [order.state for order in self.orders],
        }
        state: dict[str, Tensor] = {f"trained|{name}": p for name, p in self.trained.items()}
        state |= {f"optimiser|{name}": value for name, value in self.updates.state()}
        state |= {f"ema|{name}": parallel.like(value, self.trained[name]) for name, value in self.ema.items()}
        save_checkpoint(self.folder / "checkpoints", self.step, about, state)

    def _place(self, full: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """A tensor to read back what `_save` wrote under this name."""
        kind, _, name = full.partition("|")
        parameter = self.trained.get(name.partition("|")[0])
        if parameter is None or kind not in ("trained", "optimiser", "ema") or math.prod(shape) > parameter.numel():
            return None
        if shape != tuple(parameter.shape):
            return torch.empty(shape, dtype=dtype) if kind == "optimiser" else None
        if kind == "trained":
            return parameter.detach() if dtype == parameter.dtype else None
        rows = torch.empty_like(parallel.local(parameter.detach()), dtype=dtype, device="cpu")
        return parallel.like(rows, parameter)

    def _resume(self) -> None:
        saved = saved_checkpoints(self.folder / "checkpoints")
        if saved:
            self._go_on(saved[-1])
        self.monitor.resume(self.step)
        self.monitor.note_files(self.left_out, self.noted)

    def _go_on(self, saved: Path) -> None:
        found = about_checkpoint(saved)
        for name, ours in (("config", self.config.digest), ("frozen", self.frozen.digest)):
            if found[name] != ours:
                what = "of another configuration" if name == "config" else "started from other weights"
                raise MismatchError(
                    "finetune",
                    f"the checkpoints in this folder are {what}",
                    file=saved,
                    fix="name another folder, or restore the configuration and inputs",
                )
        needed = [f"trained|{name}" for name in self.trained] + [f"ema|{name}" for name in self.ema]
        needed += found.get("names", [])  # of the optimiser too
        if found.get("data", self.data_digest) != self.data_digest:  # earlier versions did not write it
            raise MismatchError(
                "finetune",
                "the data is other than when the run was stopped: pictures or captions changed, came or went",
                file=saved,
                expected=found["data"],
                found=self.data_digest,
                fix="restore the data, or start the changed one in another folder",
            )
        state = load_checkpoint(saved, self._place, needed)
        for name, running in self.ema.items():
            running.copy_(parallel.local(state[f"ema|{name}"]))
        self.updates.load(
            {name.removeprefix("optimiser|"): value for name, value in state.items() if name.startswith("optimiser|")}
        )
        for order, position in zip(self.orders, found["orders"], strict=True):
            order.go_to(position)
        self.step = found["step"]

    def _whole(self) -> tuple[Tensors | None, Tensors | None]:
        """What is trained and its running mean; of several processes the first has it, the others give their rows."""
        trained = snapshot(self.trained)
        means = {name: parallel.like(value, self.trained[name]) for name, value in self.ema.items()}
        return trained, snapshot(means) if means else None

    @property
    def _run(self) -> str:
        return f"{self.config.digest}, {self.step} steps"

    def _target(self, number: int) -> Path:
        return self.folder / f"{number + 1}-{self.config.stages[number].name}.safetensors"

    def _export(self, number: int, trained: Tensors | None, ema: Tensors | None) -> None:
        """The checkpoint or the LoRA at the end of a stage, for everybody."""
        if trained is not None:
            final, run = ema or trained, f"{self._run}{', ema' * (ema is not None)}"
            if self.config.lora:
                save_adapter(self._target(number), final.tensors, self.config, run, self.start.family)
            else:
                Finetuned(self.start, run, final).save(self._target(number), dtype=self.config.export)
        parallel.wait()

    def _result(self, trained: Tensors | None, ema: Tensors | None) -> Result | None:
        if trained is None:
            return None
        if self.config.lora:
            weights = self.start + open_lora(self._target(len(self.config.stages) - 1))
            return Result(weights, None, self.folder, self.frozen.digest)
        running = None if ema is None else Finetuned(self.start, f"{self._run}, ema", ema)
        return Result(Finetuned(self.start, self._run, trained), running, self.folder, self.frozen.digest)

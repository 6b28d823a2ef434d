"""What a training run is made of, read from TOML and checked before anything is loaded.

start = "lerp(deturbo, base, 0.5)"    # a recipe over the inputs
frozen = "refiner"                    # a pattern; these tensors do not move

[inputs]
deturbo = "mini:deturbo"              # a member of the miniature family, or a path
base = "mini:base"

[data.people]
scenes = { count = 2000, seed = 1, style = "anime", subject = ["man", "woman"] }   # or folder = "people"

[[stage]]
name = "people"
mix = { people = 1.0 }
steps = 300
lr = 1e-3
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from alkahest.errors import FileFormatError, UnknownNameError, UnsupportedError, nearest
from alkahest.files.toml import made, read_toml
from alkahest.model.families import Family
from alkahest.model.keys import Pattern

OPTIMISERS = ("adamw", "adamw8bit", "adafactor")
PRECISIONS = ("fp32", "mixed", "bf16")
LOGS = ("", "tensorboard", "wandb")
FROZEN = {"refiners": "refiner", "layers_only": "input, final", "nothing": ""}  # presets: what they freeze


@dataclass(frozen=True)
class Stage:
    """One stage: what is trained on, for how long, and how fast."""

    name: str
    mix: Mapping[str, float]  # dataset -> share
    steps: int
    lr: float
    batch: int = 1
    resolution: int = 1024
    warmup: int = 0  # steps over which the rate rises
    decay: str = "constant"  # or cosine, to zero at the stage's end
    shift: float = 3.0  # of the noise levels, as in sampling
    mean: float = 0.0  # of the logit of a noise level before the shift (Esser et al. 2024, arXiv:2403.03206)
    std: float = 1.0
    drop: float = 0.1  # share of captions left out, which guidance needs


@dataclass(frozen=True)
class Config:
    """A whole run. ``folder`` is where relative paths start."""

    start: str
    inputs: Mapping[str, str]
    data: Mapping[str, Mapping[str, Any]]
    stages: tuple[Stage, ...]
    components: str | None = None
    frozen: str = "refiner"  # a pattern, or a preset: refiners, layers_only (all else is frozen), nothing
    reset: str = ""  # a pattern; these tensors start from random numbers of the same spread, as a control
    seed: int = 0
    optimiser: str = "adamw"
    precision: str = "fp32"  # all in float32; mixed: what is trained in float32, all else and the arithmetic in bf16;
    # bf16: everything, with stochastic rounding
    fused: bool = False  # update each tensor as soon as its gradient is there, and drop the gradient
    accumulate: int = 1  # batches whose gradients are added up for a step
    clip: float = 1.0  # norm that gradients are clipped to; 0: not
    weight_decay: float = 0.0
    lora: Mapping[str, Any] = field(default_factory=dict)  # rank, alpha, targets: train a LoRA on the layers, by peft
    betas: tuple[float, float] = (0.9, 0.99)
    checkpointing: bool = False  # compute activations again on the way back, for memory
    ema: float = 0.0  # decay of a running mean of what is trained; 0: none
    export: str = "bf16"  # dtype of the checkpoint that is written at the end of each stage; "": none
    save_every: int = 500  # steps
    measure_every: int = 100
    held_out: int = 32  # examples of each dataset that are not trained on but measured
    log: str = ""  # tensorboard or wandb, beside the history that is always written
    prompts: tuple[str, ...] = ()  # drawn at every measurement
    sampling: Mapping[str, Any] = field(default_factory=dict)  # settings of `ak.sample` for them
    folder: Path = Path()

    def fixed(self, family: Family) -> Pattern | None:
        """The tensors that do not move."""
        text = FROZEN.get(self.frozen, self.frozen)
        return Pattern(text, family) if text else None

    def trains(self, name: str, family: Family) -> bool:
        """Whether a parameter of this name is trained: of a LoRA run the LoRA's, else all that do not stay fixed."""
        if self.lora:
            return ".lora_" in name
        fixed = self.fixed(family)
        return fixed is None or not fixed.matches(name)

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[int, int]:
        """Number of the stage that a step belongs to, and the step within it."""
        for number, stage in enumerate(self.stages):
            if step < stage.steps:
                return number, step
            step -= stage.steps
        return len(self.stages) - 1, self.stages[-1].steps

    @property
    def digest(self) -> str:
        """What tells one run from another: everything but how often it saves and measures."""
        apart = {"save_every", "measure_every", "prompts", "sampling", "export", "log", "folder"}
        kept = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in apart}
        text = json.dumps(kept, default=lambda value: vars(value) if isinstance(value, Stage) else str(value))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def read_config(path: str | Path) -> Config:
    """Read a run from a TOML file. FileFormatError if it is none, UnknownNameError for a key that means nothing."""
    path = Path(path).expanduser()
    return config_of(read_toml(path, "finetune"), path.resolve().parent, path)


def config_of(given: Mapping[str, Any], folder: Path = Path(), file: object = None) -> Config:
    """A run from a mapping, checked."""
    top = dict(given)
    stages = top.pop("stage", [])
    if not isinstance(stages, list) or not stages:
        raise FileFormatError("finetune", "a run needs stages", file=file, expected="[[stage]]", fix="[[stage]]\\nname = ...")  # fmt: skip
    each = tuple(made(Stage, {"name": f"stage {n + 1}", **one}, "finetune", file, f"stage {n + 1}") for n, one in enumerate(stages))  # fmt: skip
    config: Config = made(Config, {**top, "stages": each, "folder": folder}, "finetune", file, "the run")
    _check(config, file)
    return config


def _check(config: Config, file: object) -> None:
    def refuse(problem: str, **facts: Any) -> None:
        raise UnsupportedError("finetune", problem, file=file, **facts)

    for name, value, options in (("optimiser", config.optimiser, OPTIMISERS), ("precision", config.precision, PRECISIONS), ("log", config.log, LOGS)):  # fmt: skip
        if value not in options:
            raise UnknownNameError("finetune", f"unknown {name}", file=file, found=repr(value), fix=nearest(value, options))  # fmt: skip
    if config.fused and (config.accumulate > 1 or config.clip):
        refuse("a fused backward has each gradient only once and by itself", found=f"accumulate={config.accumulate}, clip={config.clip}", fix="accumulate = 1 and clip = 0, or fused = false")  # fmt: skip
    for stage in config.stages:
        for name in stage.mix:
            if name not in config.data:
                raise UnknownNameError("finetune", f"stage {stage.name!r} mixes data that is not there", file=file, found=repr(name), fix=nearest(name, config.data))  # fmt: skip
        low = {"steps": 1, "batch": 1, "lr": 0.0, "shift": 1e-6, "std": 0.0, "warmup": 0, "resolution": 16}
        for name, least in low.items():
            if not getattr(stage, name) >= least:
                refuse(f"stage {stage.name!r}: {name} is too small", expected=f"at least {least}", found=getattr(stage, name))  # fmt: skip
        if stage.decay not in ("constant", "cosine"):
            raise UnknownNameError("finetune", "unknown decay", file=file, found=repr(stage.decay), fix=nearest(stage.decay, ("constant", "cosine")))  # fmt: skip
        if not 0 <= stage.drop <= 1:
            refuse(f"stage {stage.name!r}: drop is a share", found=stage.drop)
    for name, what in config.data.items():
        _check_data(name, what, config, file)
    _check_lora(config.lora, config.export, file)
    for name, least in (("accumulate", 1), ("save_every", 1), ("measure_every", 1), ("held_out", 0), ("clip", 0), ("ema", 0)):  # fmt: skip
        if getattr(config, name) < least:
            refuse(f"{name} is too small", expected=f"at least {least}", found=getattr(config, name))
    if config.ema >= 1:
        refuse("ema is a decay below 1, such as 0.999", found=config.ema)


def _check_lora(lora: Mapping[str, Any], export: str, file: object) -> None:
    kinds: dict[str, Any] = {"rank": int, "alpha": (int, float), "targets": str}
    if lora and not export:
        raise UnsupportedError("finetune", "a LoRA is given out as a file", file=file, found='export = ""', fix='export = "bf16"')  # fmt: skip
    for name, value in lora.items():
        if name not in kinds:
            raise UnknownNameError("finetune", "lora has an unknown key", file=file, key=name, fix=nearest(name, kinds))
        if not isinstance(value, kinds[name]) or isinstance(value, bool) or (name != "targets" and value <= 0):
            raise FileFormatError("finetune", "lora: this value is of the wrong kind", file=file, key=name, expected="rank and alpha above 0, targets a pattern", found=repr(value))  # fmt: skip


def _check_data(name: str, what: Any, config: Config, file: object) -> None:
    kinds = ("folder", "scenes", "drawn")
    if not isinstance(what, Mapping) or len(what) != 1 or next(iter(what)) not in kinds:
        found = ", ".join(what) if isinstance(what, Mapping) and what else "nothing"
        raise FileFormatError("finetune", f"data {name!r} needs one of {', '.join(kinds)}", file=file, found=found)
    ((kind, given),) = what.items()
    if kind == "folder" and not isinstance(given, str):
        raise FileFormatError("finetune", f"data {name!r}: folder is a path", file=file, found=repr(given))
    if kind == "folder":
        return
    if not isinstance(given, Mapping):
        raise FileFormatError("finetune", f"data {name!r}: {kind} is a table", file=file, found=repr(given))
    scenes = given if kind == "scenes" else given.get("scenes")
    if kind == "drawn":
        models = given.get("models")
        if not isinstance(models, Mapping) or not models or ("scenes" in given) == ("prompts" in given):
            raise FileFormatError("finetune", f"data {name!r}: drawn needs models, and scenes or prompts", file=file, found=", ".join(given))  # fmt: skip
        for model in models:
            if model not in config.inputs:
                raise UnknownNameError("finetune", f"data {name!r} is drawn by a model that is no input", file=file, found=repr(model), fix=nearest(model, config.inputs))  # fmt: skip
    if scenes is not None and not (type(scenes.get("count")) is int and type(scenes.get("seed")) is int):
        raise FileFormatError(
            "finetune", f"data {name!r}: scenes need count and seed", file=file, found=", ".join(scenes)
        )

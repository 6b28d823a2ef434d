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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from alkahest.errors import FileFormatError, UnsupportedError, refuse_unknown_options, unknown
from alkahest.files.paths import expanded
from alkahest.files.toml import Bounds, dataclass_of, read_toml, value_of
from alkahest.mini.scenes import ATTRIBUTES
from alkahest.model.families import Family
from alkahest.model.keys import Pattern
from alkahest.pictures.settings import Sampling

OPTIMISERS = ("adamw", "adamw8bit", "adafactor")
PRECISIONS = ("fp32", "mixed", "bf16")
LOGS = ("", "tensorboard", "wandb")
EXPORTS = ("", "bf16", "fp16", "fp32")
DECAYS = ("constant", "cosine")
DATA = ("folder", "scenes", "drawn")
_STAGE_BOUNDS = {
    "steps": Bounds(1),
    "batch": Bounds(1),
    "lr": Bounds(0),
    "shift": Bounds(1e-6),
    "std": Bounds(0),
    "warmup": Bounds(0),
    "resolution": Bounds(16),
    "drop": Bounds(0, 1),
}
_RUN_BOUNDS = {
    "accumulate": Bounds(1),
    "save_every": Bounds(1),
    "measure_every": Bounds(1),
    "held_out": Bounds(0),
    "clip": Bounds(0),
    "ema": Bounds(0, below=1),
    "weight_decay": Bounds(0),
    "seed": Bounds(0),
}
FROZEN = {"refiners": "refiner", "layers_only": "input, final", "nothing": ""}  # presets: what they freeze


@dataclass(frozen=True)
class Stage:
    """One stage: what is trained on, for how long, and how fast."""

    name: str  # the stage in its files' names; its number if left out
    mix: Mapping[str, int | float]  # dataset -> share
    steps: int  # how long it lasts
    lr: float  # rate of learning, at its highest
    batch: int = 1  # pictures of a step
    resolution: int = 1024  # side in pixels: pictures have about its square; a multiple of 16
    warmup: int = 0  # steps over which the rate rises
    decay: str = "constant"  # or cosine, to zero at the stage's end
    shift: float = 3.0  # of the noise levels, as in sampling
    mean: float = 0.0  # of the logit of a noise level before the shift (Esser et al. 2024, arXiv:2403.03206)
    std: float = 1.0  # of the same
    drop: float = 0.1  # share of captions left out, which guidance needs


@dataclass(frozen=True)
class Config:
    """A whole run. ``folder`` is where relative paths start."""

    start: str  # a recipe over the inputs: the weights before the first step
    inputs: Mapping[str, str]  # name -> mini:NAME or a path
    data: Mapping[str, Any]  # name -> a table of one kind, see `DATA`
    stages: tuple[Stage, ...]  # one after the other
    components: str | None = None  # text encoder, tokenizer and VAE, as in `ak.pipeline`; the family brings its own
    frozen: str = "refiner"  # a pattern, or a preset: refiners, layers_only (all else is frozen), nothing
    reset: str = ""  # a pattern; these tensors start from random numbers of the same spread, as a control
    seed: int = 0  # of noise, order and left-out captions
    optimiser: str = "adamw"  # or adamw8bit, adafactor
    precision: str = "fp32"  # all in float32; mixed: what is trained in float32, all else and the arithmetic in bf16;
    # bf16: everything, with stochastic rounding
    fused: bool = False  # update each tensor as soon as its gradient is there, and drop the gradient
    accumulate: int = 1  # batches whose gradients are added up for a step
    clip: float = 1.0  # norm that gradients are clipped to; 0: not
    weight_decay: float = 0.0  # share that weights lose, times the rate, at each step
    lora: Mapping[str, Any] = field(default_factory=dict)  # rank, alpha, targets: train a LoRA on the layers, by peft
    betas: tuple[float, float] = (0.9, 0.99)  # decays of AdamW's two running means
    checkpointing: bool = False  # compute activations again on the way back, for memory
    ema: float = 0.0  # decay of a running mean of what is trained; 0: none
    export: str = "bf16"  # dtype of the checkpoint that is written at the end of each stage; "": none
    save_every: int = 500  # steps between points that a stopped run goes on from
    measure_every: int = 100  # steps between measurements of what is held out
    held_out: int = 32  # examples of each dataset that are not trained on but measured
    log: str = ""  # tensorboard or wandb, beside the history that is always written
    prompts: tuple[str, ...] = ()  # drawn at every measurement
    sampling: Mapping[str, Any] = field(default_factory=dict)  # settings of `ak.sample` for them
    strict: bool = False  # refuse a picture that cannot be taken, rather than leave it out and say so
    background: str = "white"  # what transparent pictures are laid on
    folder: Path = Path()

    def frozen_pattern(self, family: Family) -> Pattern | None:
        """The tensors that do not move."""
        text = FROZEN.get(self.frozen, self.frozen)
        return Pattern(text, family) if text else None

    def trains(self, name: str, family: Family) -> bool:
        """Whether a parameter of this name is trained: of a LoRA run the LoRA's, else all that do not stay fixed."""
        if self.lora:
            return ".lora_" in name
        fixed = self.frozen_pattern(family)
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
        apart = {"save_every", "measure_every", "prompts", "sampling", "export", "log", "folder", "strict"}
        apart |= {"background"} if self.background == "white" else set()  # which earlier versions did not have
        kept = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in apart}
        text = json.dumps(kept, default=lambda value: vars(value) if isinstance(value, Stage) else str(value))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@refuse_unknown_options
def read_config(path: str | Path) -> Config:
    """Read a run from a TOML file.

    Parameters
    ----------
    path : str or path
        The TOML file; relative paths in it start at its folder.

    Returns
    -------
    Config
        For `finetune`.

    Raises
    ------
    FileFormatError
        If it is no TOML.
    UnknownNameError
        For a key that means nothing.

    Examples
    --------
    >>> config = ak.read_config("tb1.toml")
    >>> config.frozen
    'refiner'
    """
    path = expanded(path, "finetune")
    return config_of(read_toml(path, "finetune"), path.resolve().parent, path)


def config_of(given: Mapping[str, Any], folder: Path = Path(), file: object = None) -> Config:
    """A run from a mapping, checked."""
    top = dict(given)
    listed = top.pop("stage", [])
    if not isinstance(listed, list) or not listed:
        raise FileFormatError(
            "finetune", "a run needs stages", file=file, expected="[[stage]]", fix="[[stage]]\\nname = ..."
        )
    stages = tuple(_stage(number, one, file) for number, one in enumerate(listed, 1))
    config = dataclass_of(Config, top, "finetune", file, "the run", {"stages": stages, "folder": folder})
    _check_run(config, file)
    _check_mixes(config, file)
    for name, what in config.data.items():
        _check_data(name, what, config, file)
    if config.lora:
        dataclass_of(_Lora, config.lora, "finetune", file, "lora")
    dataclass_of(Sampling, config.sampling, "finetune", file, "sampling").settings  # noqa: B018
    return config


def _stage(number: int, given: object, file: object) -> Stage:
    named = {"name": f"stage {number}", **given} if isinstance(given, Mapping) else given
    stage = dataclass_of(Stage, named, "finetune", file, f"stage {number}")
    where = f"stage {stage.name!r}"
    for name, bounds in _STAGE_BOUNDS.items():
        bounds.require(getattr(stage, name), "finetune", file, where, name)
    _require_among(stage.decay, "decay", DECAYS, file)
    return stage


def _check_run(config: Config, file: object) -> None:
    for name, options in (("optimiser", OPTIMISERS), ("precision", PRECISIONS), ("log", LOGS), ("export", EXPORTS)):
        _require_among(getattr(config, name), name, options, file)
    for name, bounds in _RUN_BOUNDS.items():
        bounds.require(getattr(config, name), "finetune", file, "the run", name)
    for number, beta in enumerate(config.betas):
        Bounds(0, below=1).require(beta, "finetune", file, "the run", f"betas[{number}]")
    if config.fused and (config.accumulate > 1 or config.clip):
        raise UnsupportedError(
            "finetune",
            "a fused backward has each gradient only once and by itself",
            file=file,
            found=f"accumulate={config.accumulate}, clip={config.clip}",
            fix="accumulate = 1 and clip = 0, or fused = false",
        )
    if config.lora and not config.export:
        raise UnsupportedError(
            "finetune", "a LoRA is given out as a file", file=file, found='export = ""', fix='export = "bf16"'
        )


def _check_mixes(config: Config, file: object) -> None:
    for stage in config.stages:
        for name, share in stage.mix.items():
            if name not in config.data:
                problem = f"stage {stage.name!r} mixes data that is not there"
                raise unknown("finetune", problem, name, config.data, file=file)
            Bounds(0).require(share, "finetune", file, f"stage {stage.name!r}", f"mix: {name}")
        if not sum(stage.mix.values()) > 0:
            raise UnsupportedError(
                "finetune", f"stage {stage.name!r}: nothing is mixed", file=file, fix="mix = { name = 1.0 }"
            )


def _require_among(value: str, name: str, options: Sequence[str], file: object) -> None:
    if value not in options:
        raise unknown("finetune", f"unknown {name}", value, options, file=file)


def _check_data(name: str, what: object, config: Config, file: object) -> None:
    where = f"data {name!r}"
    if not isinstance(what, Mapping) or len(what) != 1 or next(iter(what)) not in DATA:
        found = (", ".join(what) or "nothing") if isinstance(what, Mapping) else repr(what)
        raise FileFormatError("finetune", f"{where} needs one of {', '.join(DATA)}", file=file, found=found)
    ((kind, given),) = what.items()
    if kind == "folder":
        value_of(str, given, "finetune", file, f"{where}: folder")
    elif kind == "scenes":
        dataclass_of(_Scenes, given, "finetune", file, f"{where}: scenes").require_values(file, where)
    else:
        _check_drawn(dataclass_of(_Drawn, given, "finetune", file, f"{where}: drawn"), config, file, where)


def _check_drawn(drawn: _Drawn, config: Config, file: object, where: str) -> None:
    if not drawn.models or (drawn.scenes is None) == (drawn.prompts is None):
        raise FileFormatError("finetune", f"{where}: drawn needs models, and scenes or prompts", file=file)
    for model, settings in drawn.models.items():
        if model not in config.inputs:
            problem = f"{where} is drawn by a model that is no input"
            raise unknown("finetune", problem, model, config.inputs, file=file)
        dataclass_of(Sampling, settings, "finetune", file, f"{where}: {model}").settings  # noqa: B018
    if drawn.scenes is not None:
        dataclass_of(_Scenes, drawn.scenes, "finetune", file, f"{where}: scenes").require_values(file, where)


@dataclass(frozen=True)
class _Lora:
    """A LoRA to train."""

    rank: int = 16  # of every matrix
    alpha: float | None = None  # what it is scaled by, times 1 / rank; the rank itself if left out
    targets: str = ""  # a pattern of the layers that get one; the family's choice if left out

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UnsupportedError("finetune", f"lora: {name} must be above 0", found=value)


@dataclass(frozen=True)
class _Drawn:
    """Data that models draw."""

    models: Mapping[str, Mapping[str, Any]]  # name of an input -> settings of `ak.sample`, as under Sampling
    scenes: Mapping[str, Any] | None = None  # prompts of scenes, as under Scenes
    prompts: str | None = None  # or a file of prompts, one a line


@dataclass(frozen=True)
class _Scenes:
    """Data of the miniature world: an attribute has one value or several."""

    count: int  # pictures
    seed: int  # of which scenes
    held_out: bool = False  # only combinations that the family was not trained on, instead of only the others
    subject: str | tuple[str, ...] = ()
    colour: str | tuple[str, ...] = ()
    place: str | tuple[str, ...] = ()
    light: str | tuple[str, ...] = ()
    side: str | tuple[str, ...] = ()
    quality: str | tuple[str, ...] = ()
    style: str | tuple[str, ...] = ()

    def require_values(self, file: object, where: str) -> None:
        """Raise for a value that no scene has."""
        Bounds(1).require(self.count, "finetune", file, where, "count")
        for name, known in ATTRIBUTES.items():
            given = getattr(self, name)
            for value in [given] if isinstance(given, str) else given:
                if value not in known:
                    raise unknown("finetune", f"{where}: {name} has no such value", value, known, file=file)

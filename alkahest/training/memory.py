"""What a training run of a given model takes of a GPU's memory, mode by mode, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from alkahest.algebra.weights import Weights
from alkahest.errors import AlkahestError, refuse_unknown_options
from alkahest.model.keys import Pattern
from alkahest.pictures.live import is_out_of_memory
from alkahest.training import parallel
from alkahest.training.config import FROZEN, Config

if TYPE_CHECKING:
    import pandas

GIB = 1 << 30
_CONTEXT = 0.7  # GiB that CUDA takes for itself
_CAPTION_TOKENS = 128
# Bytes that a block's forward pass keeps for the way back, for each token and unit of width, in bf16: counted at
# 378 MiB for 1,152 tokens of width 3840, and the same at 4,224 tokens.
_SAVED = 89.6
_SLACK = 1.1  # what kernels and the allocator's gaps add
_TRANSIENT = 5  # float32 copies of the largest tensor while it is updated: weight, gradient, square, update, rounding
_CARDS = (16, 24, 32, 48, 80, 96, 141, 192)


@dataclass(frozen=True)
class Mode:
    """A way to train: settings of `alkahest.training.config.Config`. With mixed precision masters are fp32."""

    optimiser: str
    precision: str
    fused: bool

    @property
    def text(self) -> str:
        return (
            f"{self.optimiser}, "
            f"{'fp32 master' if self.precision == 'mixed' else 'bf16'}{', fused' if self.fused else ''}"
        )


MODES = [
    Mode(optimiser, precision, fused)
    for precision in ("bf16", "mixed")
    for optimiser in ("adafactor", "adamw8bit", "adamw")
    for fused in (True, False)
]


@refuse_unknown_options
def memory_plan(
    weights: Weights,
    vram: float | None = None,
    *,
    frozen: str = "refiner",
    resolution: int = 1024,
    batch: int = 1,
    checkpointing: bool = True,
    processes: int = 1,
) -> pandas.DataFrame:
    """GiB that each way to train needs on one GPU: a DataFrame, smallest first.

    Parameters
    ----------
    weights : Weights
        The model; only its shapes are looked at.
    vram : float, optional
        GiB of the card.
    frozen : str, default "refiner"
        A pattern of what is not trained.
    resolution : int, default 1024
        Side of the pictures in pixels.
    batch : int, default 1
        Pictures of a step on one device.
    checkpointing : bool, default True
        Gradient checkpointing.
    processes : int, default 1
        Over several (FSDP) all but activations is divided.

    Returns
    -------
    pandas.DataFrame
        ``weights`` hold what is trained in float32 or bf16 and what is frozen in bf16; ``gradients`` of all or, fused,
        of the largest tensor; ``optimiser`` its state (AdamW 8 bytes a number, in 8 bits 2, Adafactor a row and a
        column a matrix) and float32 copies of one tensor; ``activations`` of one batch. ``card`` and ``fits``, with
        ``vram``, leave a tenth for kernels and gaps, which ``total`` does not count. The text encoder and VAE are not
        there: they are encoded beforehand.

    Raises
    ------
    UnknownNameError
        If ``frozen`` selects nothing.
    AlkahestError
        If a number is none that a card or a batch can have.

    Examples
    --------
    >>> plan = ak.memory_plan(ak.made_up(), vram=24)[["mode", "total", "card", "fits"]]
    """
    import pandas as pd

    if vram is not None and not 0 < vram < float("inf"):
        raise AlkahestError("plan", "vram is the card's memory in GiB", expected="more than 0", found=vram)
    if resolution < 16 or batch < 1 or processes < 1:
        raise AlkahestError(
            "plan", "resolution, batch and processes must be positive", found=f"{resolution}, {batch}, {processes}"
        )
    shapes = weights.shapes
    frozen = FROZEN.get(frozen, frozen)
    pattern = Pattern(frozen, weights.family).require_match(shapes, "plan") if frozen else None
    trained = {key: shape for key, shape in shapes.items() if pattern is None or not pattern.matches(key)}
    active = _activations(weights, resolution, batch, checkpointing)
    rows = []
    for mode in MODES:
        if processes > 1 and mode.optimiser != "adamw":  # the others need whole tensors
            continue
        parts = _parts(mode, shapes, trained, processes) | {"activations": active}
        total = sum(parts.values()) + _CONTEXT
        card = next((size for size in _CARDS if size >= _SLACK * total), math.inf)
        rows.append({"mode": mode.text, **parts, "total": total, "card": card})
    table = pd.DataFrame(rows).sort_values("total", ignore_index=True)
    if vram is not None:
        table["fits"] = _SLACK * table.total <= vram
    return table


def out_of_memory(error: Exception, config: Config, weights: Weights) -> AlkahestError | None:
    """What to say when memory ran out, with the ways to train that would fit; None if the error is another."""
    told = str(error)
    if not is_out_of_memory(error):
        return None
    stage = max(config.stages, key=lambda one: one.resolution**2 * one.batch)
    vram = torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else None
    table = memory_plan(
        weights,
        vram,
        frozen=config.frozen,
        resolution=stage.resolution,
        batch=stage.batch,
        checkpointing=config.checkpointing,
        processes=parallel.size(),
    )
    least = memory_plan(weights, frozen=config.frozen, resolution=stage.resolution, processes=parallel.size()).iloc[0]
    fitting = table[table.fits]["mode"].tolist() if vram is not None else []
    fix = (
        f"these fit {vram:.0f} GiB: {'; '.join(fitting)}"
        if fitting
        else f"checkpointing = true, batch = 1 and {least['mode']} take the least: {least.total:.1f} GiB"
    )
    return AlkahestError(
        "finetune", "out of memory", found=told.splitlines()[0][:160], fix=f"{fix}; alkahest finetune --plan says more"
    )


def _parts(
    mode: Mode, shapes: Mapping[str, tuple[int, ...]], trained: Mapping[str, tuple[int, ...]], processes: int
) -> dict[str, float]:
    count, frozen = (sum(map(math.prod, some.values())) for some in (trained, shapes))
    frozen -= count
    largest = max(map(math.prod, trained.values()))
    size = 4 if mode.precision == "mixed" else 2
    state = {
        "adamw": 8 * count,
        "adamw8bit": count * (2 + 8 / 256),  # two bytes, and two float32 scales for each block of 256
        "adafactor": 4 * sum(sum(shape) if len(shape) == 2 else math.prod(shape) for shape in trained.values()),
    }[mode.optimiser]
    return {
        "weights": (size * count + 2 * frozen) / processes / GIB,
        "gradients": size * (largest if mode.fused else count) / processes / GIB,
        "optimiser": (state / processes + 4 * _TRANSIENT * largest / processes) / GIB,
    }


def _activations(weights: Weights, resolution: int, batch: int, checkpointing: bool) -> float:
    sizes = weights.leading.architecture
    width, blocks = sizes.width, sizes.layers
    tokens = batch * ((resolution // 16) ** 2 + _CAPTION_TOKENS)
    kept = 2 * width * tokens * blocks + _SAVED * width * tokens if checkpointing else _SAVED * width * tokens * blocks
    return kept / GIB

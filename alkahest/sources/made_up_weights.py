"""Made-up checkpoints of real shape, to try real sizes without the real weights.

They draw nothing: matrices are Gaussian with standard deviation 0.02, norms lie around 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import torch

from alkahest.algebra.expression import Names
from alkahest.algebra.leaves import Leaf
from alkahest.engine.readable import Workspace
from alkahest.engine.scalars import number, text_of
from alkahest.errors import AlgebraError
from alkahest.model import seeded
from alkahest.model.families.zimage import FAMILY, Architecture
from alkahest.model.keys import Pattern

_CHUNK = 1 << 16  # elements that share one generator, so that any block can be made by itself


class MadeUp(Leaf):
    """Weights that are computed from a seed; see `made_up`."""

    family = FAMILY

    def __init__(self, layers: int, seed: int, delta: float, only: str, width: int, name: str = "made_up") -> None:
        delta = number(delta, "made_up")
        if not (1 <= layers <= 200 and 32 <= width <= 16384 and width % 32 == 0):
            raise AlgebraError(
                "made_up",
                "impossible size",
                expected="1 to 200 layers, width a multiple of 32 up to 16384",
                found=f"layers={layers}, width={width}",
            )
        self.name = name
        self.settings = {"layers": layers, "seed": seed, "delta": delta, "width": width}
        self.architecture = Architecture(
            layers=layers,
            width=width,
            feed_forward=width * 8 // 3,
            head=128 if width % 128 == 0 else 32,
            caption=width * 2 // 3,
            time=min(width, 256),
        )
        self._shapes = self.architecture.shapes()
        self.only = Pattern(only, FAMILY).require_match(self._shapes, "made_up").text

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    @cached_property
    def storage(self) -> dict[str, str]:
        return dict.fromkeys(self._shapes, "bf16")

    def read(self, key: str, start: int, stop: int, out: torch.Tensor, workspace: Workspace) -> None:
        seed, delta = int(self.settings["seed"]), self.settings["delta"]
        values = _normal(seed, "weights", key, start, stop)
        values.mul_(0.02)
        if delta and Pattern(self.only, FAMILY).matches(key):
            values.add_(_normal(seed, "delta", key, start, stop).mul_(0.02 * delta))
        if FAMILY.is_scale(key):
            values.mul_(5).add_(1)
        out.copy_(values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MadeUp) and (self.settings, self.only) == (other.settings, other.only)

    def __hash__(self) -> int:
        return hash((tuple(self.settings.values()), self.only))

    def _text(self, names: Names) -> tuple[str, int]:
        settings = [f"{name}={text_of(value)}" for name, value in self.settings.items()]
        return f"made_up({', '.join(settings)}, only={self.only!r})", 3


def made_up(layers: int = 30, seed: int = 0, delta: float = 0.0, only: str = "all", width: int = 3840) -> MadeUp:
    """Weights of true Z-Image shapes with random numbers, the same for the same arguments.

    Parameters
    ----------
    layers : int, default 30
        Blocks of the main stack.
    seed : int, default 0
        Of the random numbers.
    delta : float, default 0
        Makes a variant of the model with the same seed, whose difference is that share of the weights' standard
        deviation.
    only : str, default "all"
        A pattern of the tensors that differ.
    width : int, default 3840
        A multiple of 32; others make smaller models of the same class.

    Returns
    -------
    MadeUp
        With the defaults 6,154,908,736 parameters, which take no memory until they are read.

    Raises
    ------
    AlgebraError
        If there can be no such model.

    Examples
    --------
    >>> tiny = ak.made_up(layers=2, width=64).save("tiny.safetensors")
    >>> near = ak.made_up(layers=2, width=64, delta=0.02, only="layers").save("near.safetensors")
    """
    for name, value in (("layers", layers), ("seed", seed), ("width", width)):
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value != int(value):
            raise AlgebraError("made_up", f"{name} is a whole number", found=repr(value)[:40])
    return MadeUp(int(layers), int(seed), delta, only, int(width))


def _normal(seed: int, purpose: str, key: str, start: int, stop: int) -> torch.Tensor:
    first, last = start // _CHUNK, -(-stop // _CHUNK)
    chunks = [
        seeded.generator(seed, purpose, key, index).standard_normal(_CHUNK, "float32") for index in range(first, last)
    ]
    joined = torch.cat([torch.from_numpy(chunk) for chunk in chunks]) if chunks else torch.empty(0)
    return joined[start - first * _CHUNK : stop - first * _CHUNK]

"""How pictures are drawn: steps, guidance, shift and schedule, in the terms that people use."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from alkahest.errors import AlkahestError, unknown
from alkahest.model.families.zimage import FAMILY

SHIFT = FAMILY.shift

SCHEDULES = ("diffusers", "simple")


@dataclass(frozen=True)
class Sampling:
    """Settings of `ak.sample` as a file gives them; None is its default."""

    steps: int | None = None  # of each picture
    cfg: float | None = None  # guidance; 1 is none
    shift: float | None = None  # of the noise levels
    schedule: str | None = None  # diffusers, or ComfyUI's simple
    cfg_normalization: float | None = None  # most norm of a guided prediction, in unguided ones
    negative_prompt: str | None = None  # works above cfg 1 only
    width: int | None = None  # in pixels
    height: int | None = None  # in pixels

    @property
    def settings(self) -> Settings:
        """The same with defaults, if they can be drawn with."""
        names = ("steps", "cfg", "shift", "schedule", "cfg_normalization")
        return Settings(**{name: value for name in names if (value := getattr(self, name)) is not None})


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn; see `sample`."""

    steps: int = 24
    cfg: float = 2.0
    shift: float = SHIFT
    schedule: str = "diffusers"
    cfg_normalization: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise AlkahestError("sample", "steps must be a whole number from 1", found=repr(self.steps))
        if not self.cfg >= 1:
            raise AlkahestError(
                "sample",
                "cfg counts as ComfyUI's does: 1 is no guidance",
                expected="1 or more",
                found=self.cfg,
                fix="for diffusers' guidance_scale g use cfg = g + 1",
            )
        if not 0 < self.shift < float("inf"):
            raise AlkahestError("sample", "shift must be positive", found=self.shift)
        if self.schedule not in SCHEDULES:
            raise unknown("sample", "no such schedule", self.schedule, SCHEDULES)

    @property
    def guidance_scale(self) -> float:
        """diffusers' number for ``cfg``: it adds g * (positive - negative) to the positive prediction.

        Source: ZImagePipeline since diffusers 0.37; ComfyUI starts from the negative one, so g = cfg - 1.
        """
        return self.cfg - 1.0

    @property
    def sigmas(self) -> list[float]:
        """Noise levels before the shift, as ``ZImagePipeline(sigmas=...)`` takes them.

        ``diffusers`` is evenly spaced from 1 to 1 / steps. ``simple`` is ComfyUI's scheduler of that
        name, which picks from a table of 1,000 levels; the two agree where steps divides 1,000.
        """
        if self.schedule == "diffusers":
            return torch.linspace(1.0, 1 / self.steps, self.steps).tolist()
        return [1 - int(number * 1000 / self.steps) / 1000 for number in range(self.steps)]

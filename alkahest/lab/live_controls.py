"""The controls of a live merge: a multiplier for each delta, by part if wanted, and how pictures are sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets

from alkahest.algebra.deltas import Delta
from alkahest.lab.block_lists import factors_by_block
from alkahest.lab.number_slider import NumberSlider
from alkahest.lab.panel import STYLE, WIDE, text_lines
from alkahest.measure.multiplier import factors, short
from alkahest.pictures.effects import Effect

NARROW = widgets.Layout(width="9.5em")


class DeltaRow(widgets.VBox):  # type: ignore[misc]
    """One delta's multiplier, one for each of its parts behind a checkbox, and one for each block: ``by_block``."""

    def __init__(
        self,
        name: str,
        delta: Delta,
        k: float,
        bounds: tuple[float, float],
        log: bool,
        parts: Sequence[str],
        depth: int = 0,
    ) -> None:
        self.delta, self.name = delta, name
        self.by_block = [1.0] * depth  # of the main stack; a `BlockEditor` writes them
        self.effect: Effect | None = None  # what it does to pictures, once that was measured
        number = NumberSlider(f"k of {name}" if log else f"strength of {name}", k, *bounds, log)
        self.k = number.box
        self.pair = widgets.HTML()  # a LoRA's strength is one box in ComfyUI too
        if log:
            self.k.observe(lambda _: self._say_pair(), "value")
            self._say_pair()
        parts = parts or list(dict.fromkeys(delta.family.part_of(key).split(".")[0] for key in delta.shapes))
        self.parts = {
            part: widgets.FloatText(value=1.0, description=f"{name}: {part} x", style=STYLE, layout=WIDE)
            for part in parts
        }
        self.by_part = widgets.Checkbox(value=False, description=f"{name}: by part", style=STYLE, indent=False)
        box = widgets.VBox(list(self.parts.values()), layout=widgets.Layout(display="none"))
        self.by_part.observe(lambda change: setattr(box.layout, "display", None if change["new"] else "none"), "value")
        super().__init__([number, self.pair, self.by_part, box])

    def _say_pair(self) -> None:
        k = self.k.value
        if not math.isfinite(k):
            self.pair.value = ""
            return
        subtract, add = factors(k)
        self.pair.value = f"<span>in ComfyUI: subtract {short(subtract)} x add {short(add)}</span>"

    @property
    def controls(self) -> list[Any]:
        return [self.k, self.by_part, *self.parts.values()]

    @property
    def block_factors(self) -> dict[str, float]:
        """The factors by block as `Delta.scaled` takes them, those at 1 left out."""
        family = self.delta.family
        touched = {family.block_of(key)[0] for key in self.delta.shapes if key.startswith(f"{family.main}.")}
        return factors_by_block(self.by_block, family.main, {block for block in touched if block is not None})

    @property
    def scaled(self) -> Delta | None:
        """The delta times what the boxes say; None at 0."""
        if self.k.value == 0:
            return None
        by_part = {part: box.value for part, box in self.parts.items() if box.value != 1} if self.by_part.value else {}
        delta = self.delta.scaled(by_part) if by_part else self.delta
        if by_block := self.block_factors:
            delta = delta.scaled(by_block)
        return delta * float(self.k.value)


def sampling_controls(prompts: list[str], given: dict[str, Any]) -> dict[str, Any]:
    style: dict[str, Any] = {"style": STYLE, "continuous_update": False}
    return {
        "prompts": text_lines("prompts, one a line", prompts, continuous_update=False),
        "negative_prompt": text_lines("negative prompt", [given.get("negative_prompt", "")], continuous_update=False),
        "seed": widgets.IntText(value=given.get("seed", 0), description="seed", layout=NARROW, **style),
        "steps": widgets.IntText(value=given.get("steps", 24), description="steps", layout=NARROW, **style),
        "cfg": widgets.FloatText(value=given.get("cfg", 2.0), description="cfg", layout=NARROW, **style),
        "shift": widgets.FloatText(value=given.get("shift", 3.0), description="shift", layout=NARROW, **style),
    }

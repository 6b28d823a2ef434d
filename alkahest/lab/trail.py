"""What a live merge has drawn: a curve over a multiplier, of which every dot is a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ipywidgets as widgets

from alkahest.lab.dots import clickable_dots
from alkahest.lab.measure_words import words_of
from alkahest.lab.panel import STYLE

_MOST = 100  # pictures; at 1024 pixels they are some 200 MB


@dataclass(frozen=True)
class Drawn:
    """A picture that was drawn: by which recipe and multipliers, and what it measures."""

    recipe: str
    values: Mapping[str, float]
    png: bytes
    measures: Mapping[str, float]


class Trail(widgets.VBox):  # type: ignore[misc]
    """Dots over a multiplier and a measure of one's choice; ``picked`` is called with what a clicked dot drew."""

    def __init__(self, names: list[str], picked: Callable[[Drawn], None]) -> None:
        self.drawn: list[Drawn] = []
        self._plotted: list[Drawn] = []  # those that have the measure
        self._picked = picked
        self._dropped = 0
        self.over = widgets.Dropdown(options=names, description="over", style=STYLE, layout=_menu())
        self.measure = widgets.Dropdown(options=[], description="of", style=STYLE, layout=_menu())
        self.curve = clickable_dots("pictures that were drawn")
        self.note = widgets.HTML()
        for menu in (self.over, self.measure):
            menu.observe(lambda _: self._changed(), "value")
        self.curve.observe(lambda change: self._choose(change["new"]), "chosen")
        super().__init__([widgets.HBox([self.over, self.measure]), self.curve, self.note])

    def add(self, one: Drawn) -> None:
        """A dot more, unless the same recipe drew the same picture before."""
        if any(one.recipe == old.recipe and one.png == old.png for old in self.drawn):
            return
        self.drawn.append(one)
        if len(self.drawn) > _MOST:
            del self.drawn[0]
            self._dropped += 1
        self.curve.chosen = -1
        measures = [(words_of(name), name) for name in one.measures]
        if self.measure.options != tuple(measures):
            self.measure.options = measures
            self.measure.index = 0 if measures else None
        self._plot()

    def _changed(self) -> None:
        self.curve.chosen = -1  # numbers are those of the dots that are there
        self._plot()

    def _plot(self) -> None:
        name, measure = self.over.value, self.measure.value
        self._plotted = [one for one in self.drawn if math.isfinite(one.measures.get(measure, math.nan))]
        self.curve.x_label = f"k of {name}" if name else ""
        self.curve.y_label = measure or ""
        self.curve.dots = [
            {"x": one.values[name], "y": one.measures[measure], "label": _label(one, name, measure)}
            for one in self._plotted
        ]
        notes = [f"the last {_MOST} of {_MOST + self._dropped} pictures"] if self._dropped else []
        if lacking := len(self.drawn) - len(self._plotted):
            notes.append(f"{lacking} without this measure")
        self.note.value = "; ".join(notes)

    def _choose(self, number: int) -> None:
        if 0 <= number < len(self._plotted):
            self._picked(self._plotted[number])


def _label(one: Drawn, name: str, measure: str) -> str:
    return f"{name} at {one.values[name]:g}: {words_of(measure)} {one.measures[measure]:.4g}"


def _menu() -> widgets.Layout:
    return widgets.Layout(width="16em")

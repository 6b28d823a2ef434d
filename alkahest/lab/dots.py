"""Dots that can be clicked: an anywidget, or a list to choose from where anywidget is not installed."""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets
import traitlets

from alkahest.lab.panel import STYLE
from alkahest.lab.scripted import class_with_script

Dot = dict[str, Any]  # x, y, and the label that says what it is


def clickable_dots(title: str) -> Any:
    """A widget with ``dots``, ``x_label``, ``y_label``, and ``chosen``, the number of the dot that was clicked or -1.

    >>> curve = clickable_dots("pictures over k")
    >>> curve.dots = [{"x": 171.1, "y": 0.98, "label": "k = 171.1"}]
    """
    made = class_with_script(DotsTraits, "dots.js") or DotList
    return made(title=title)


class DotsTraits(traitlets.HasTraits):
    """What dots tell and are told."""

    dots: Any = traitlets.List().tag(sync=True)
    chosen: Any = traitlets.Int(-1).tag(sync=True)
    title: Any = traitlets.Unicode().tag(sync=True)
    x_label: Any = traitlets.Unicode().tag(sync=True)
    y_label: Any = traitlets.Unicode().tag(sync=True)


class DotList(DotsTraits, widgets.VBox):  # type: ignore[misc]
    """The same dots as a list."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.list = widgets.Select(description=self.title, rows=5, style=STYLE)
        self.children = [self.list]
        self.observe(lambda _: self._fill(), ["dots", "y_label"])
        self.list.observe(lambda change: self._picked(change["new"]), "value")

    def _fill(self) -> None:
        wanted = self.chosen  # new options select the first of them
        self.list.options = [(_line(dot, self.y_label), number) for number, dot in enumerate(self.dots)]
        self.list.value = wanted if 0 <= wanted < len(self.dots) else None
        self.chosen = wanted

    def _picked(self, number: int | None) -> None:
        if number is not None:
            self.chosen = number


def _line(dot: Dot, measure: str) -> str:
    return f"{dot['label']}, {measure} {dot['y']:.4g}" if measure else str(dot["label"])

"""A factor for each block as a curve under the hand: an anywidget, or a number box a block without it."""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets
import traitlets

from alkahest.lab.panel import STYLE
from alkahest.lab.scripted import class_with_script


def block_curve(title: str, names: list[str], x_label: str) -> Any:
    """A widget with ``values``, a factor for each of ``names``, which a hand or the arrow keys move.

    >>> curve = block_curve("factor by block", [f"layers.{n}" for n in range(30)], "block of layers")
    >>> curve.values[7] = 0.5

    ``chosen`` is the number of the block that was touched last, -1 for none; ``behind`` are bars to compare with, a
    share a block or None, which ``behind_label`` names.
    """
    made = class_with_script(BlockCurveTraits, "block_curve.js") or BlockBoxes
    return made(title=title, names=names, x_label=x_label, values=[1.0] * len(names))


class BlockCurveTraits(traitlets.HasTraits):
    """What a curve over blocks tells and is told."""

    values: Any = traitlets.List(traitlets.Float()).tag(sync=True)
    names: Any = traitlets.List(traitlets.Unicode()).tag(sync=True)
    chosen: Any = traitlets.Int(-1).tag(sync=True)
    behind: Any = traitlets.List().tag(sync=True)
    behind_label: Any = traitlets.Unicode().tag(sync=True)
    title: Any = traitlets.Unicode().tag(sync=True)
    x_label: Any = traitlets.Unicode().tag(sync=True)


class BlockBoxes(BlockCurveTraits, widgets.Box):  # type: ignore[misc]
    """The same as number boxes."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given, layout=widgets.Layout(flex_flow="row wrap"))
        narrow = widgets.Layout(width="11em")
        self.boxes = [
            widgets.FloatText(value=value, description=name, style=STYLE, layout=narrow)
            for name, value in zip(self.names, self.values, strict=True)
        ]
        self.bars = widgets.HTML()
        self.children = [*self.boxes, self.bars]
        for number, box in enumerate(self.boxes):
            box.observe(lambda change, number=number: self._moved(number, change["new"]), "value")
        self.observe(lambda _: self._fill(), "values")
        self.observe(lambda _: self._compare(), ["behind", "behind_label"])

    def _moved(self, number: int, value: float) -> None:
        if self.values[number] != value:
            self.chosen = number
            self.values = [*self.values[:number], value, *self.values[number + 1 :]]

    def _fill(self) -> None:
        for box, value in zip(self.boxes, self.values, strict=True):
            box.value = value

    def _compare(self) -> None:
        shares = zip(self.names, self.behind, strict=False)
        words = ", ".join(f"{name} {100 * share:.3g} %" for name, share in shares if share is not None)
        self.bars.value = f"{self.behind_label}: {words}" if words else ""

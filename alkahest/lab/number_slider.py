"""A number box and a slider that are one value: the box takes any number, and the slider stands where it is."""

from __future__ import annotations

import html
import math
from typing import Any

import ipywidgets as widgets

from alkahest.lab.panel import STYLE, WIDE

_STEPS = 200  # of a slider from end to end; a logarithmic one has a hundredth of a decade
_LOG_STEP = 0.01


class NumberSlider(widgets.VBox):  # type: ignore[misc]
    """A number box over a slider over a line that says when the number lies outside the slider.

    >>> k = NumberSlider("k", 1.0, 0.1, 1000.0, log=True)
    >>> k.box.value = 171.1; k.slider.value
    169.82...

    The box is the truth: what is typed is used as it stands and moves the slider to its nearest step, or to its end;
    only a hand on the slider writes into the box.
    """

    def __init__(self, name: str, value: float, low: float, high: float, log: bool = False) -> None:
        self.name, self.low, self.high, self.logarithmic = name, float(low), float(high), log
        self.step = _LOG_STEP if log else (self.high - self.low) / _STEPS
        self.box = widgets.FloatText(value=float(value), description=name, style=STYLE, layout=WIDE)
        # readout=False: the box shows the number, and the slider's own is rounded to its step.
        common = {"description": f"{name} (slider)", "readout": False, "style": STYLE, "step": self.step}
        if log:
            ends = {"min": math.log10(low), "max": math.log10(high)}
            self.slider = widgets.FloatLogSlider(value=self._nearest(float(value)), **ends, **common)
        else:
            self.slider = widgets.FloatSlider(value=self._nearest(float(value)), min=low, max=high, **common)
        self.note = widgets.HTML()
        self._following = False
        self.box.observe(lambda _: self._follow(), "value")
        self.slider.observe(self._moved, "value")
        self._follow()
        super().__init__([self.box, self.slider, self.note])

    def _follow(self) -> None:
        """Put the slider where the box is, and say so if it cannot be there."""
        value = self.box.value
        self._following = True
        try:
            self.slider.value = self._nearest(value)
        finally:
            self._following = False
        outside = not self.low <= value <= self.high
        text = (
            f"{self.name} = {value:g} lies outside the slider's {self.low:g} to {self.high:g}; it is used as it stands"
        )
        self.note.value = f"<span role='status'>{html.escape(text, quote=False)}</span>" if outside else ""

    def _moved(self, change: Any) -> None:
        if self._following:
            return
        # As it is shown, a slider takes its value to its nearest step and says so: nobody moved it then.
        if abs(self._place(change["new"]) - self._place(self._nearest(self.box.value))) > 0.6 * self.step:
            self.box.value = float(f"{change['new']:.4g}")

    def _place(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def _nearest(self, value: float) -> float:
        """The slider's own number nearest to one in the box; its lower end for what is no number."""
        inside = min(max(value, self.low), self.high) if value == value else self.low
        start = self._place(self.low)
        place = min(start + round((self._place(inside) - start) / self.step) * self.step, self._place(self.high))
        return min(10.0**place, self.high) if self.logarithmic else place

"""What stands beside the present picture of a live merge: kept and chosen ones, and measures against a usual range."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import ipywidgets as widgets

from alkahest.lab.figure import image_tag
from alkahest.lab.measure_words import Range, measures_table
from alkahest.lab.panel import note_html
from alkahest.lab.trail import Drawn

_ROW = "display:flex; gap:0.5em; margin-left:0.5em; font-size:11px; line-height:1.3; overflow-wrap:anywhere"
_AS_AROUND = "font-size:inherit"


class Beside:
    """Two widgets: ``pictures`` that were put aside, in a row, and a ``table`` of everybody's measures.

    >>> beside = Beside(); beside.keep(drawn); beside.show(panel.measures, {"prompts": [...], "steps": 24})

    What a picture was drawn by says whether the usual range, which was measured at some settings, speaks about it.
    """

    def __init__(self) -> None:
        self.pictures = widgets.HTML(layout=widgets.Layout(flex="1 1 0", min_width="0"))
        self.table = widgets.HTML()
        self.kept: list[Drawn] = []
        self.picked: Drawn | None = None
        self._usual: dict[str, Range] = {}
        self._usual_at: dict[str, Any] = {}
        self._now: tuple[dict[str, float], dict[str, Any]] = ({}, {})

    def keep(self, drawn: Drawn) -> None:
        self.kept.append(drawn)
        self._fill()

    def pick(self, drawn: Drawn) -> None:
        self.picked = drawn
        self._fill()

    def forget(self) -> None:
        """Drop what was kept, and what was picked."""
        self.kept.clear()
        self.picked = None
        self._fill()

    def set_usual(self, ranges: dict[str, Range], asked: Mapping[str, Any]) -> None:
        """The bridge's own range of each measure, and the prompts and settings that it is of."""
        self._usual, self._usual_at = ranges, _apart_from_seed(asked)
        self._fill()

    def show(self, measures: dict[str, float], asked: Mapping[str, Any]) -> None:
        """The present picture's measures, and the prompts and settings that it was drawn by."""
        self._now = measures, _apart_from_seed(asked)
        self._fill()

    def _fill(self) -> None:
        measures, asked = self._now
        beside = {f"kept {number}": one for number, one in enumerate(self.kept, 1)}
        if self.picked is not None:
            beside["chosen"] = self.picked
        columns = {"now": measures} | {name: one.measures for name, one in beside.items()}
        fits = asked == self._usual_at
        stale = "" if fits or not self._usual else "of other prompts or settings: measure it again"
        note = f"the bridge's own range is {stale}" if stale else ""
        self.table.value = measures_table(columns, self._usual if fits else {}, "the bridge") + note_html(note)
        figures = [
            f"<figure style='margin:0; flex:0 1 auto; min-width:0; max-width:{100 / len(beside):.0f}%'>"
            f"{image_tag(one.png, one.recipe)}"
            f"<figcaption>{name}: <code style='{_AS_AROUND}'>{html.escape(one.recipe)}</code></figcaption></figure>"
            for name, one in beside.items()
        ]
        self.pictures.value = f"<div style='{_ROW}'>{''.join(figures)}</div>" if figures else ""


def _apart_from_seed(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a range of measures stands for: it is over seeds."""
    return {name: value for name, value in asked.items() if name != "seed"}

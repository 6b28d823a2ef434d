"""Factors by block under a live merge: a curve, lists as people share them, and what they say in a recipe."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

import ipywidgets as widgets

from alkahest.algebra.weights import Weights
from alkahest.engine.scalars import text_of
from alkahest.errors import AlkahestError
from alkahest.lab.block_curve import block_curve
from alkahest.lab.block_lists import PRESETS, list_text, mirror, preset, read_block_list, smooth
from alkahest.lab.live_controls import DeltaRow
from alkahest.lab.panel import STYLE, note_html, reason_of
from alkahest.measure.placed import not_protected
from alkahest.pictures.effects import Effect

_NO_PRESET = "choose a preset"


class BlockEditor(widgets.VBox):  # type: ignore[misc]
    """A factor for every block of the main stack, a curve for each delta of a live merge.

    >>> BlockEditor(rows, lambda: bridge.protect("refiner"), changed=redraw.request)

    ``onto`` says what the deltas are added to now; ``changed`` is called when a factor of the chosen delta has moved.
    The list under the curve takes what people paste: presets of other models are spread over the depth, and the line
    under it says so.
    """

    def __init__(self, rows: Sequence[DeltaRow], onto: Callable[[], Weights], changed: Callable[[], None]) -> None:
        self._rows = {row.name: row for row in rows}
        self.onto, self._changed, self._filling = onto, changed, False
        bridge = onto()
        self.stack = bridge.family.main
        names = [f"{self.stack}.{number}" for number in range(bridge.family.depth(bridge.shapes))]
        self.of = widgets.Dropdown(options=list(self._rows), description="factor by block of", style=STYLE)
        self.curve = block_curve(
            "factor by block", names, f"block of {self.stack}; drag a handle or paint over several"
        )
        wide = widgets.Layout(width="97%")
        self.list = widgets.Text(description="as a list", continuous_update=False, style=STYLE, layout=wide)
        narrow = {"style": STYLE, "layout": widgets.Layout(width="auto")}
        self.presets = widgets.Dropdown(options=[_NO_PRESET, *PRESETS], description="preset", **narrow)
        self.buttons = {}
        for name, tooltip, change in (
            ("Smooth", "Draw every factor towards its neighbours'", smooth),
            ("Mirror", "Turn the curve round, the last block first", mirror),
            ("Reset", "A factor of 1 everywhere", lambda values: [1.0] * len(values)),
        ):
            button = widgets.Button(description=name, tooltip=tooltip, layout=narrow["layout"])
            button.on_click(lambda _, change=change: self._set(change(self.curve.values)))
            self.buttons[name] = button
        self.note = widgets.HTML()
        self.of.observe(lambda _: self._show(), "value")
        self.curve.observe(lambda change: self._moved(change["new"]), "values")
        self.list.observe(lambda change: self._typed(change["new"]), "value")
        self.presets.observe(lambda change: self._take_preset(change["new"]), "value")
        self.of.layout.display = None if len(rows) > 1 else "none"
        tools = [self.of, self.presets, *self.buttons.values()]
        super().__init__(
            [widgets.HBox(tools, layout=widgets.Layout(flex_flow="row wrap")), self.curve, self.list, self.note]
        )
        self._show()

    @property
    def row(self) -> DeltaRow:
        """The row of the delta that the curve is of."""
        return self._rows[self.of.value]

    def show_effect(self, effect: Effect | None) -> None:
        """Bars behind the curve: the share of the delta's effect that each block carries alone."""
        table = effect.table[effect.table.part == self.stack] if effect else None
        along = {} if table is None else dict(zip(table.block, table.along, strict=True))
        with self.curve.hold_sync():
            self.curve.behind_label = "the delta's effect, carried by a block alone" if effect else ""
            self.curve.behind = [along.get(number) for number in range(len(self.curve.names))] if effect else []

    def _set(self, values: list[float], note: str = "") -> None:
        self.curve.values = values
        self._say(note)

    def _moved(self, values: list[float]) -> None:
        if self._filling:
            return
        self.row.by_block = list(values)
        self._write_list()
        self._say()
        self._changed()

    def _typed(self, text: str) -> None:
        if self._filling:
            return
        try:
            values, note = read_block_list(text, len(self.curve.values))
        except AlkahestError as error:
            self.note.value = note_html(reason_of(error), "alert")
            return
        self._set(values, note)
        self._write_list()  # what was spread stands as it is used

    def _take_preset(self, name: str) -> None:
        if name == _NO_PRESET:
            return
        count = len(self.curve.values)
        spread = "" if count == 25 else f"{name}: 25 numbers spread over {count} blocks, straight lines between them"
        self._set(preset(name, count), spread)
        self.presets.value = _NO_PRESET  # the same one can be chosen again

    def _show(self) -> None:
        """The curve of another delta."""
        self._filling = True
        try:
            self.curve.values = list(self.row.by_block)
            self.curve.chosen = -1
            self._write_list()
        finally:
            self._filling = False
        self.show_effect(self.row.effect)
        self._say()

    def _write_list(self) -> None:
        filling, self._filling = self._filling, True
        try:
            self.list.value = list_text(self.curve.values)
        finally:
            self._filling = filling

    def _say(self, note: str = "") -> None:
        factors = self.row.block_factors
        written = ", ".join(f"{pattern!r}: {text_of(factor)}" for pattern, factor in factors.items())
        recipe = f"<code>.scaled({{{html.escape(written)}}})</code>" if factors else "every block at 1"
        idle = self._idle()
        nothing = f"{idle}: a factor there does nothing" if idle else ""
        self.note.value = "".join(note_html(one) for one in (note, nothing) if one) + f"<span>{recipe}</span>"

    def _idle(self) -> str:
        """The blocks where the delta is not added: protected, or not touched by it."""
        added, family = not_protected(self.row.delta, self.onto()) or (), self.row.delta.family
        busy = {family.block_of(key)[0] for key in added if key.startswith(f"{self.stack}.")}
        idle = [str(number) for number in range(len(self.curve.names)) if number not in busy]
        return f"protected or not in the delta: {self.stack}.{', '.join(idle)}" if idle else ""

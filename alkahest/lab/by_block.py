"""What a delta does block by block, beside the factors by block: measured on request, and linked with the curve."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import ipywidgets as widgets
import pandas as pd

from alkahest.engine.events import Event
from alkahest.lab.block_editor import BlockEditor
from alkahest.lab.delta_map import DeltaMap
from alkahest.lab.jobs import Job
from alkahest.lab.live_controls import DeltaRow
from alkahest.measure.table import stream_delta_table
from alkahest.pictures.effects import Effect


class ByBlock(widgets.VBox):  # type: ignore[misc]
    """A `BlockEditor` over two measurements of its delta: of the weights, and of what it does to pictures.

    What is chosen in the map is chosen in the curve, and the other way round. ``effect_of`` gives the events of a
    row's effect, the last with an `Effect`.
    """

    def __init__(self, editor: BlockEditor, effect_of: Callable[[DeltaRow], Iterator[Event]]) -> None:
        self.editor = editor
        self._tables: dict[str, pd.DataFrame] = {}
        self.map: DeltaMap | None = None
        self._place = widgets.VBox()
        self.measure = Job(self._measured, on_result=self._set_table, unit="B", title="Measure by tensor")
        self.measure_effect = Job(
            lambda: _of(editor.row, effect_of(editor.row)),
            on_result=self._set_effect,
            title="Measure effect on pictures",
        )
        for job in (self.measure, self.measure_effect):
            job.start_button.layout = widgets.Layout(width="auto", flex="0 0 auto")
        editor.of.observe(lambda _: self._show(), "value")
        editor.curve.observe(lambda change: self._choose_block(change["new"]), "chosen")
        super().__init__([editor, self.measure, self.measure_effect, self._place])

    def _measured(self) -> Iterator[Event]:
        row = self.editor.row
        return _of(row, stream_delta_table(row.delta, self.editor.onto()))

    def _set_table(self, found: tuple[DeltaRow, pd.DataFrame]) -> None:
        row, table = found
        self._tables[row.name] = table
        self._show()

    def _set_effect(self, found: tuple[DeltaRow, Effect]) -> None:
        row, effect = found
        row.effect = effect
        self.editor.show_effect(self.editor.row.effect)
        self._show()

    def _show(self) -> None:
        row = self.editor.row
        table, effect = self._tables.get(row.name), row.effect
        self.map = None if table is None else DeltaMap(table, effect)
        shown: list[Any] = [widgets.HTML(effect._repr_html_())] if effect else []
        if self.map is not None:
            self.map.observe(lambda _: self._choose_tensor(), "chosen")
            shown.append(self.map)
        self._place.children = shown

    def _choose_tensor(self) -> None:
        if self.map is not None and self.map.place is not None and self.map.place[0] == self.editor.stack:
            self.editor.curve.chosen = self.map.place[1]

    def _choose_block(self, block: int) -> None:
        if self.map is not None and block >= 0:
            self.map.choose_block(self.editor.stack, block)


def _of(row: DeltaRow, events: Iterator[Event]) -> Iterator[Event]:
    """The same events, the last result with the row that it is of: another may be chosen meanwhile."""
    for event in events:
        yield event if event.result is None else replace(event, result=(row, event.result))

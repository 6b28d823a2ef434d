"""A delta by module and depth under the hand: hover says what a cell is, and a click chooses it in map and table."""

from __future__ import annotations

import base64
import math
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import traitlets

from alkahest.errors import AlgebraError
from alkahest.lab.panel import STYLE
from alkahest.lab.scripted import class_with_script

if TYPE_CHECKING:
    import pandas as pd

    from alkahest.pictures.effects import Effect

# Column of a delta table or of an effect -> what a person reads, and how its values are written.
_COLUMNS = {
    "delta_norm": ("norm", ""),
    "relative": ("relative", "share"),
    "changed": ("changed", "share"),
    "flow": ("effect: of what flows through", "share"),
    "along": ("effect: its block carries", "share"),
}
_STATISTICS = {"relative": "relative", "norm": "delta_norm", "changed": "changed"}


class DeltaMapTraits(traitlets.HasTraits):
    """What a map of a delta is told, and which tensor was chosen."""

    rows: Any = traitlets.List().tag(sync=True)
    columns: Any = traitlets.List().tag(sync=True)
    modules: Any = traitlets.List().tag(sync=True)
    places: Any = traitlets.List().tag(sync=True)
    statistic: Any = traitlets.Unicode("relative").tag(sync=True)
    chosen: Any = traitlets.Unicode().tag(sync=True)
    title: Any = traitlets.Unicode().tag(sync=True)


class DeltaList(DeltaMapTraits, widgets.VBox):  # type: ignore[misc]
    """The same tensors as a list, and in words what is chosen."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.list = widgets.Select(description=self.title, rows=10, style=STYLE, layout=widgets.Layout(width="auto"))
        self.words = widgets.HTML()
        self.children = [self.list, self.words]
        self.list.observe(lambda change: setattr(self, "chosen", change["new"] or ""), "value")
        self.observe(lambda _: self._fill(), ["rows", "statistic"])
        self.observe(lambda _: self._tell(), "chosen")
        self._fill()

    def _fill(self) -> None:
        wanted = self.chosen
        known = {row["tensor"]: row.get(self.statistic) for row in self.rows}
        self.list.options = [(f"{name}: {_text(value)}", name) for name, value in known.items()]
        self.list.value = wanted if wanted in known else None
        self._tell()

    def _tell(self) -> None:
        row = next((row for row in self.rows if row["tensor"] == self.chosen), None)
        said = [f"{head} {_text(row.get(key))}" for key, head, _ in self.columns] if row else []
        self.words.value = ", ".join([self.chosen, *said])
        if row:
            self.list.value = self.chosen


class DeltaMap(widgets.VBox):  # type: ignore[misc]
    """A measured delta as a map of cells over a table of its tensors; ``chosen`` is the tensor that was chosen.

    >>> DeltaMap(ak.delta_table(variant - base))
    >>> DeltaMap(table, ak.effect(variant - base, bridge, prompts=prompts))    # and what each does to pictures
    """

    chosen: Any = traitlets.Unicode()

    def __init__(self, table: pd.DataFrame, effect: Effect | None = None) -> None:
        missing = [name for name in ("tensor", "module", "delta_norm", "relative") if name not in table.columns]
        if missing:
            raise AlgebraError(
                "delta_map",
                "this is no table of tensors",
                found=f"no {missing[0]}",
                fix="ak.delta_table(variant - base)",
            )
        self._table = table
        # Tensors outside of blocks have no cell; they stand in the table.
        inside = table[table.block >= 0]
        places = list(dict.fromkeys(zip(inside.part, map(int, inside.block), strict=True)))
        modules = list(dict.fromkeys(inside.module))
        made = class_with_script(DeltaMapTraits, "delta_map.js") or DeltaList
        self.map: Any = made(title="the delta by module and depth", places=places, modules=modules)
        self._cells = {
            row.tensor: (modules.index(row.module), places.index((row.part, int(row.block))))
            for row in inside.itertuples()
        }
        self.statistic = widgets.Dropdown(options=_STATISTICS, description="colour", style=STYLE)
        widgets.link((self.statistic, "value"), (self.map, "statistic"))
        traitlets.link((self.map, "chosen"), (self, "chosen"))
        super().__init__([self.statistic, self.map])
        self.show_effect(effect)

    def show_effect(self, effect: Effect | None) -> None:
        """Put what each tensor and block does to pictures beside what the weights say; None takes it away."""
        flow = dict(zip(effect.tensors.tensor, effect.tensors.flow, strict=True)) if effect else {}
        along = {(row.part, int(row.block)): row.along for row in effect.table.itertuples()} if effect else {}
        with self.map.hold_sync():
            self.map.columns = [
                [name, *head] for name, head in _COLUMNS.items() if effect or name not in ("flow", "along")
            ]
            self.map.rows = [
                {
                    "tensor": row.tensor,
                    "row": self._cells.get(row.tensor, (-1, -1))[0],
                    "column": self._cells.get(row.tensor, (-1, -1))[1],
                    **{name: _finite(getattr(row, name)) for name in ("delta_norm", "relative", "changed")},
                    "flow": _finite(flow.get(row.tensor)),
                    "along": _finite(along.get((row.part, int(row.block)))),
                }
                for row in self._table.itertuples()
            ]
        options = {**_STATISTICS, **({"effect: of what flows through": "flow"} if effect else {})}
        if dict(self.statistic.options) != options:
            self.statistic.options = options

    def _repr_mimebundle_(self, **given: Any) -> Any:
        from alkahest.lab.plots import magnitude_heatmap

        still = magnitude_heatmap(self._table)  # for who has no kernel
        picture = base64.b64encode(still.png()).decode()
        return {**(super()._repr_mimebundle_(**given) or {}), "image/png": picture, "text/plain": still.alt}

    @property
    def place(self) -> tuple[str, int] | None:
        """Part and block of the chosen tensor, None if it is in no block."""
        rows = self._table[self._table.tensor == self.chosen]
        return (str(rows.part.iloc[0]), int(rows.block.iloc[0])) if len(rows) and rows.block.iloc[0] >= 0 else None

    def choose_block(self, part: str, block: int) -> None:
        """Choose the tensor of a block that changed most, unless one of it is chosen."""
        rows = self._table[(self._table.part == part) & (self._table.block == block)]
        if self.place != (part, block) and len(rows):
            self.chosen = str(rows.loc[rows.relative.fillna(-1.0).idxmax()].tensor)


def delta_map(table: pd.DataFrame, effect: Effect | None = None) -> DeltaMap:
    """A measured delta under the mouse or the arrow keys: name, norm, relative, changed and effect of every tensor.

    Parameters
    ----------
    table : pandas.DataFrame
        Of `delta_table`.
    effect : Effect, optional
        Of `effect`; with it cells can be coloured by what flows through.

    Returns
    -------
    DeltaMap

    Raises
    ------
    AlgebraError
        For another table.

    Examples
    --------
    >>> panels.delta_map(ak.delta_table(variant - base))
    """
    return DeltaMap(table, effect)


def _finite(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"

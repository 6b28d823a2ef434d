"""A plot with controls, from a draw function's own signature."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ipywidgets as widgets
from matplotlib.figure import Figure

from alkahest.errors import AlkahestError, unknown
from alkahest.lab.figure import png
from alkahest.lab.number_slider import NumberSlider
from alkahest.lab.panel import STYLE, WIDE, Panel, Redraw

_DRAWING = threading.Lock()  # callbacks come from several threads, and matplotlib's caches are shared


class Explorer(Panel):
    """A picture and the controls that redraw it; see `explore`."""

    def __init__(self, draw: Callable[..., str], size: tuple[float, float], controls: dict[str, Any]) -> None:
        super().__init__()
        self._draw = draw
        self._size = size
        self._redraw = Redraw(self._draw_figure, self.alert)
        self.controls: dict[str, Any] = {}
        self.rows = {
            name: self._row(name, default, controls.get(name)) for name, default in _defaults(draw, controls).items()
        }
        self.children = [
            widgets.HBox(list(self.rows.values()), layout=widgets.Layout(flex_flow="row wrap")),
            self.picture,
            self.status,
        ]
        for control in self.controls.values():
            control.observe(lambda _: self._redraw.request(), names="value")
        self.redraw()

    @property
    def values(self) -> dict[str, Any]:
        """What every control is set to."""
        return {name: control.value for name, control in self.controls.items()}

    def redraw(self) -> None:
        """Draw now, in this thread; what goes wrong is said in the status line."""
        self._redraw.now()

    def _draw_figure(self) -> Iterator[None]:
        with _DRAWING:
            values = self.values
            figure = Figure(figsize=self._size, layout="constrained", facecolor="white")
            alt = str(self._draw(figure, **values))
            self.show(png(figure), alt)
            self.say("")
        yield

    def _row(self, name: str, default: Any, given: Any) -> Any:
        row = _control(name, default, given)
        self.controls[name] = row.box if isinstance(row, NumberSlider) else row
        return row


def explore(draw: Callable[..., str], *, size: tuple[float, float] = (9, 4.5), **controls: Any) -> Explorer:
    """Controls for the keyword arguments of ``draw(figure, *, k=1.0, statistic="rms")``, which returns alt text.

    >>> explore(lambda fig, *, k=1.0: plots.survival(table, ax=fig.subplots()).alt, k=(0.1, 1000, "log"))

    A control follows from the default: a number box, a text box, a checkbox. ``name=[...]`` gives a menu,
    ``name=(low, high)`` or ``(low, high, "log")`` a slider beside the number box. The two are one value: the box
    takes any number, the slider goes where it is, and a line says when that lies outside its range. Drawing
    waits until the controls rest, runs in a thread of its own, and shows its errors instead of raising.
    """
    return Explorer(draw, size, controls)


def _defaults(draw: Callable[..., str], controls: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for parameter in list(inspect.signature(draw).parameters.values())[1:]:
        if parameter.default is inspect.Parameter.empty:
            raise AlkahestError(
                "explore",
                "every argument of draw but the figure needs a default",
                found=parameter.name,
                fix=f"{parameter.name}=1.0",
            )
        found[parameter.name] = parameter.default
    for name in controls:
        if name not in found:
            raise unknown("explore", "draw has no such argument", name, found)
    return found


def _control(name: str, default: Any, given: Any) -> Any:
    """A control for one argument, with a slider if a range was asked for."""
    label = {"description": name.replace("_", " "), "style": STYLE, "layout": WIDE}
    if isinstance(given, tuple):
        return _number_with_slider(name, default, given, label)
    if isinstance(given, Sequence) and not isinstance(given, str):
        options = list(given)
        if default not in options:
            raise AlkahestError("explore", f"the default of {name} is not in its menu", expected=options, found=default)
        return widgets.Dropdown(options=options, value=default, **label)
    for kind, control in (
        (bool, widgets.Checkbox),
        (int, widgets.IntText),
        (float, widgets.FloatText),
        (str, widgets.Text),
    ):
        if isinstance(default, kind):
            return control(value=default, **label)
    raise AlkahestError(
        "explore",
        f"no control is known for the default of {name}",
        expected="a number, text, a truth value or a menu",
        found=type(default).__name__,
    )


def _number_with_slider(name: str, default: Any, given: tuple[Any, ...], label: dict[str, Any]) -> NumberSlider:
    low, high, *kind = given
    log = kind == ["log"]
    if not low < high or (log and low <= 0) or (kind and not log):
        raise AlkahestError(
            "explore",
            f"the range of {name} cannot be a slider",
            expected="(low, high) or (low, high, 'log')",
            found=given,
        )
    return NumberSlider(label["description"], default, low, high, log)

"""A bar with time left and Cancel under a notebook's cell, for whatever takes longer than a second, and first results.

`import alkahest` in a notebook's kernel asks for it; scripts and their pipes see nothing of it.
"""

from __future__ import annotations

import contextlib
import html
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ipywidgets as widgets

from alkahest.engine.events import Event
from alkahest.lab.figure import image_tag
from alkahest.pictures.sheet import png_bytes

_AFTER = 1.0  # seconds, before anything is shown
_OFTEN = 0.2  # seconds between changes of the bar
_LOOKS = 2.0  # seconds between first results, which cost more


class Cancelled(KeyboardInterrupt):
    """Somebody pressed Cancel. The cell ends and the ones below are not run, as after an interrupt of the kernel."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class CellProgress:
    """What is shown of one piece of work: a bar, how long it has taken and still takes, Cancel, and first results."""

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self.cancelled = threading.Event()
        self.bar = widgets.FloatProgress(min=0.0, max=1.0)
        self.words = widgets.HTML()
        self.first_results = widgets.HTML()
        self.button = widgets.Button(description="Cancel", tooltip="Stop; interrupting the kernel does the same")
        self.button.on_click(lambda _: self.cancelled.set())
        self._started = time.monotonic()
        self._told = self._looked = 0.0
        self._shown: Any = None

    def tell(self, event: Event) -> None:
        """Show an event, if it is time. Raises Cancelled once Cancel was pressed."""
        now = time.monotonic()
        self.check()
        if now - self._started < _AFTER or now - self._told < _OFTEN:
            return
        self._told = now
        if self._shown is None:
            self._show()
        share, elapsed = (event.done / event.total if event.total else 0.0), now - self._started
        left = f", {_time(elapsed * (1 - share) / share)} left" if 0.01 < share < 1 else ""
        key = html.escape(event.key[:120])
        self.bar.value = share
        self.words.value = f"{self.operation}: {share:.0%}, {_time(elapsed)}{left}; {key}"
        if now - self._looked > _LOOKS and event.so_far is not None:
            self._looked = now
            self.first_results.value = _as_html(event.so_far())

    def check(self) -> None:
        """Raise Cancelled once Cancel was pressed."""
        if self.cancelled.is_set():
            raise Cancelled(f"{self.operation}: cancelled after {_time(time.monotonic() - self._started)}")

    def close(self) -> None:
        """Take it all away: what the cell gives comes in its place."""
        if self._shown is not None:
            self._shown.update({}, raw=True)
            self.box.close()

    def _show(self) -> None:
        from IPython.display import display

        line = widgets.HBox([self.button, self.bar, self.words], layout=widgets.Layout(flex_flow="row wrap"))
        self.box = widgets.VBox([line, self.first_results])
        self._shown = display(self.box, display_id=True)  # type: ignore[no-untyped-call]
        _hear_while_busy(self.button)


_running: list[CellProgress] = []  # what is shown now: at most one, of the main thread


def watch(events: Iterator[Event], operation: str) -> Iterator[Event]:
    """The same events; if a notebook's cell waits for them, shown under it. See `alkahest.engine.events.watch`."""
    if not _in_a_cell():
        return events
    if _running:  # within other work: there Cancel is heard more often than between its own events
        outer = _running[0]
        return _tell_each(events, lambda _: outer.check())
    return _show(events, operation)


def _show(events: Iterator[Event], operation: str) -> Iterator[Event]:
    progress = CellProgress(operation)
    _running.append(progress)
    try:
        yield from _tell_each(events, progress.tell)
    finally:
        _running.remove(progress)
        progress.close()


def _tell_each(events: Any, tell: Callable[[Event], None]) -> Iterator[Event]:
    with contextlib.closing(events):
        for event in events:
            tell(event)
            yield event


def _in_a_cell() -> bool:
    """Whether this is the thread that runs a notebook's cells."""
    if "ipykernel" not in sys.modules or threading.current_thread() is not threading.main_thread():
        return False
    from IPython.core.getipython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


def _hear_while_busy(button: Any) -> None:
    """Let a button be heard while the main thread runs a cell.

    JupyterLab sends what widgets say to a subshell, which has a thread of its own. ipykernel 7.4 sends it on to the
    shell that the widget spoke from last, which is busy; without this mark it stays where it was sent.
    """
    with contextlib.suppress(AttributeError):
        vars(button.comm).pop("_reply_subshell_id", None)


def _as_html(found: Any) -> str:
    """A picture or a table as HTML; "" for nothing yet."""
    if found is None:
        return ""
    if hasattr(found, "getbbox"):
        return image_tag(png_bytes(found), "first results")
    from alkahest.measure.measured_table import readable_html, small_html

    return readable_html(found, with_rest=False) if "delta_norm" in found else small_html(found)


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.0f} s"

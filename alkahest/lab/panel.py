"""What every panel is made of: a picture, a line of status, and drawing in a thread that the newest request wins."""

from __future__ import annotations

import base64
import contextlib
import html
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import ipywidgets as widgets

from alkahest.engine.events import Event
from alkahest.errors import AlkahestError
from alkahest.lab.figure import image_tag
from alkahest.pictures.live import LiveModel

_DRAWING = threading.Lock()  # one panel draws at a time: two would halve each other's speed
REST = 0.15  # seconds without a change before drawing: a drag of a slider draws once or twice
WIDE = widgets.Layout(width="auto", min_width="16em")
STYLE = {"description_width": "initial"}


class Panel(widgets.VBox):  # type: ignore[misc]
    """Controls, a picture with alt text, and a status line. The picture goes with the notebook, for who has no
    kernel.
    """

    def __init__(self) -> None:
        self.alt = ""
        self._png = b""
        self.picture = widgets.HTML()
        self.status = widgets.HTML()
        super().__init__()

    def show(self, png: bytes, alt: str) -> None:
        """Put a picture in place of the one before."""
        self._png, self.alt = png, alt
        self.picture.value = image_tag(png, alt)

    def say(self, text: str) -> None:
        """A line under the picture, which screen readers speak when they are idle."""
        self.status.value = note_html(text)

    def alert(self, error: Exception) -> None:
        """Say what went wrong, where the person looks."""
        self.status.value = note_html(reason_of(error), "alert")

    def _repr_mimebundle_(self, **given: Any) -> Any:
        bundle = super()._repr_mimebundle_(**given) or {}
        still = {"image/png": base64.b64encode(self._png).decode()} if self._png else {}
        return {**bundle, **still, "text/plain": self.alt or type(self).__name__}


class Redraw:
    """Does the work of the newest request, once requests rest, in a thread of its own.

    >>> redraw = Redraw(lambda: draw(), panel.alert); redraw.request(); redraw.cancel()

    ``work`` returns a generator for each request. A newer request or `cancel` closes it at its next
    event; what it raises goes to ``failed``.
    """

    def __init__(self, work: Callable[[], Iterator[Any]], failed: Callable[[Exception], None]) -> None:
        self._work, self._failed = work, failed
        self._number = 0
        self._counting, self._working = threading.Lock(), threading.Lock()
        self._timer: threading.Timer | None = None

    def request(self) -> None:
        """Work soon, instead of whatever was asked for before."""
        self._timer = threading.Timer(REST, self._run, [self._next()])
        self._timer.daemon = True
        self._timer.start()

    def now(self) -> None:
        """Work in this thread, and return when it is done."""
        self._run(self._next())

    def cancel(self) -> None:
        """Stop after the event at hand, and forget what waits."""
        self._next()

    def wait(self, seconds: float | None = None) -> None:
        """Block until nothing is asked for; for scripts and tests."""
        if self._timer is not None:
            self._timer.join(seconds)

    @property
    def working(self) -> bool:
        return self._working.locked()

    def _next(self) -> int:
        with self._counting:
            if self._timer is not None:
                self._timer.cancel()
            self._number += 1
            return self._number

    def _run(self, number: int) -> None:
        with self._working:
            if number != self._number:
                return
            try:
                with contextlib.closing(self._work()) as events:  # type: ignore[type-var]
                    for _ in events:
                        if number != self._number:
                            return
            except Exception as error:  # shown where the person looks, instead of in a thread's traceback
                self._failed(error)


def alone(live: LiveModel, work: Callable[[], Iterator[Any]]) -> Generator[Any]:
    """The events of ``work`` once no other panel draws, and before that an Event that says so."""
    while not _DRAWING.acquire(timeout=0.1):
        yield Event(0, 1, "waiting: another panel is drawing")
    try:
        with live.lock:
            yield from work()
    finally:
        _DRAWING.release()


def note_html(text: str, role: str = "status") -> str:
    """A line or more for a person, with the role that says how urgently a screen reader speaks it; "" for none."""
    style = "margin:0; white-space:pre-wrap"
    return f"<pre role='{role}' style='{style}'>{html.escape(text, quote=False)}</pre>" if text else ""


def reason_of(error: Exception) -> str:
    """What a person is told of an error: ours explain themselves, others need their kind."""
    return str(error) if isinstance(error, AlkahestError) else f"{type(error).__name__}: {error}"


def text_lines(label: str, texts: Sequence[str], **given: Any) -> Any:
    """A box for several texts, one a line; `lines_of` reads it."""
    area = widgets.Layout(width="auto", min_width="28em", height="4.5em")
    return widgets.Textarea(value="\n".join(texts), description=label, style=STYLE, layout=area, **given)


def lines_of(box: Any) -> list[str]:
    """The texts in a box, empty lines left out."""
    return [line.strip() for line in box.value.splitlines() if line.strip()]

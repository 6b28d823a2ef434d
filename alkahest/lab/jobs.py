"""Work that takes longer than a second, with a bar and a Cancel button."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ipywidgets as widgets

from alkahest.files.reader import size_text
from alkahest.lab.panel import note_html, reason_of


class Job(widgets.VBox):  # type: ignore[misc]
    """Start, Cancel, a progress bar, what is at hand, and the result of a generator of events.

    >>> job = Job(lambda: merged.stream("merged.safetensors"), unit="B")
    >>> job          # press Start; job.result is there when it is done

    ``make`` returns a generator whose events have ``done``, ``total``, ``key`` and at the end ``result``; it is
    called anew at every
    Start. It runs in a thread of its own. Cancel closes the generator, which cleans up after itself.
    ``on_result`` is called with the result, in that thread. What goes wrong is shown, and kept in ``error``.
    """

    def __init__(
        self,
        make: Callable[[], Iterator[Any]],
        *,
        on_result: Callable[[Any], None] | None = None,
        unit: str = "",
        title: str = "Start",
    ) -> None:
        self._make = make
        self._on_result = on_result
        self._unit = unit
        self._cancelled = threading.Event()
        self._thread: threading.Thread | None = None
        self.result: Any = None
        self.error: Exception | None = None
        self.start_button = widgets.Button(description=title, button_style="primary", tooltip=title)
        self.cancel_button = widgets.Button(description="Cancel", disabled=True, tooltip="Stop and clean up")
        self.bar = widgets.FloatProgress(value=0.0, min=0.0, max=1.0, description="")
        self.status = widgets.HTML("ready")
        self.start_button.on_click(lambda _: self.start())
        self.cancel_button.on_click(lambda _: self.cancel())
        super().__init__([widgets.HBox([self.start_button, self.cancel_button, self.bar]), self.status])

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the work, unless it is running."""
        if self.running:
            return
        self._cancelled.clear()
        self.result, self.error = None, None
        self.bar.value, self.bar.bar_style = 0.0, ""
        self.start_button.disabled, self.cancel_button.disabled = True, False
        self._thread = threading.Thread(target=self._work, name="alkahest job", daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """Ask the work to stop after the event at hand."""
        self._cancelled.set()
        if self.running:
            self._say("cancelling ...")

    def wait(self, seconds: float | None = None) -> Any:
        """Block until the work has ended, and return its result; for scripts and tests."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self.result

    def _work(self) -> None:
        started, shown, event = time.monotonic(), 0.0, None
        try:
            with contextlib.closing(self._make()) as events:  # type: ignore[type-var]
                for event in events:
                    if self._cancelled.is_set():
                        break
                    if time.monotonic() - shown > 0.1:  # a browser does not need more
                        shown = time.monotonic()
                        self._show(event, shown - started)
            if self._cancelled.is_set():
                self._end("warning", f"cancelled after {time.monotonic() - started:.1f} s")
                return
            self.result = getattr(event, "result", event)
            if self._on_result is not None:
                self._on_result(self.result)
            self.bar.value = 1.0
            notes = getattr(self.result, "notes", [])
            self._end("success", "\n".join([f"done in {time.monotonic() - started:.1f} s", *notes]))
        except Exception as error:  # shown where the person looks, instead of in a thread's traceback
            self.error = error
            self._end("danger", reason_of(error))

    def _show(self, event: Any, elapsed: float) -> None:
        done, total = getattr(event, "done", 0), getattr(event, "total", 0)
        self.bar.value = done / total if total else 0.0
        amount = f"{size_text(done)} of {size_text(total)}" if self._unit == "B" else f"{done:,} of {total:,}"
        left = f", {elapsed * (total - done) / done:.0f} s left" if 0 < done < total else ""
        self._say(f"{amount}, {elapsed:.1f} s{left}  {getattr(event, 'key', '')}")

    def _end(self, style: str, text: str) -> None:
        self.bar.bar_style = style
        self._say(text)
        self.start_button.disabled, self.cancel_button.disabled = False, True

    def _say(self, text: str) -> None:
        self.status.value = note_html(text)

    def _repr_mimebundle_(self, **given: Any) -> Any:
        bundle = super()._repr_mimebundle_(**given)
        return {**(bundle or {}), "text/plain": f"Job: {self.start_button.description}"}

"""The training monitor: reads a run's folder while another process trains, and shows its curves and pictures."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
from matplotlib.figure import Figure

from alkahest.files.paths import expanded
from alkahest.lab.figure import image_tag, png
from alkahest.lab.panel import STYLE, Panel, Redraw
from alkahest.lab.run_plots import MEASURES, training_curve
from alkahest.pictures.sheet import contact_sheet, png_bytes
from alkahest.training.monitor import read_history

_STEPS = 6  # of the pictures shown: the first, the last, and some between


def training_monitor(folder: str | Path, seconds: float = 2.0) -> TrainingMonitor:
    """Watch a fine-tune that writes into ``folder``: held-out loss, a picture measure, and its pictures over the steps.

    Parameters
    ----------
    folder : str or path
        Of the run; one that is not there yet is waited for.
    seconds : float, default 2
        How often it is looked at while *follow* is on; it is drawn when a measurement has come.

    Returns
    -------
    TrainingMonitor
        ``.history`` is the table.

    Examples
    --------
    >>> panels.training_monitor("runs/tb1")      # beside: alkahest finetune tb1.toml -o runs/tb1
    """
    return TrainingMonitor(expanded(folder, "training_monitor"), seconds)


class TrainingMonitor(Panel):
    """See `training_monitor`."""

    def __init__(self, folder: Path, seconds: float) -> None:
        super().__init__()
        self.folder = folder
        self.history = pd.DataFrame()
        self._seen: float | None = None
        self._redraw = Redraw(self._draw_figure, self.alert)
        self._stopped = threading.Event()
        self.measure = widgets.Dropdown(options=list(MEASURES), value="latent_lag1", description="measure", style=STYLE)
        self.follow = widgets.Checkbox(value=True, description="follow", style=STYLE, indent=False)
        self.refresh = widgets.Button(description="Refresh", tooltip="Read the run's folder now")
        self.pictures = widgets.HTML()
        self.measure.observe(lambda _: self._redraw.request(), names="value")
        self.refresh.on_click(lambda _: self._redraw.request())
        self.children = [
            widgets.HBox([self.measure, self.follow, self.refresh]),
            self.status,
            self.picture,
            self.pictures,
        ]
        self._seen = self._last_change()
        self._redraw.now()
        threading.Thread(target=self._watch, args=[seconds], name="alkahest monitor", daemon=True).start()

    def wait(self, seconds: float | None = None) -> None:
        """Block until what was asked for is drawn; for scripts and tests."""
        self._redraw.wait(seconds)

    def close(self) -> None:
        self._stopped.set()
        super().close()

    def _watch(self, seconds: float) -> None:
        while not self._stopped.wait(seconds):
            if self.follow.value and (written := self._last_change()) != self._seen:
                self._seen = written
                self._redraw.now()

    def _last_change(self) -> float | None:
        try:
            return (self.folder / "history.jsonl").stat().st_mtime
        except OSError:
            return None

    def _draw_figure(self) -> Iterator[None]:
        if not self.folder.is_dir():
            self.say(f"nothing measured yet: there is no {self.folder}")
            return
        self.history = read_history(self.folder)
        if not len(self.history):
            self.say(f"nothing measured yet in {self.folder}")
            return
        last = self.history.iloc[-1]
        figure = Figure(figsize=(9, 5.2), layout="constrained", facecolor="white")
        plot = training_curve(self.history, self.measure.value, title=self.folder.name, figure=figure)
        self.show(png(figure), plot.alt)
        loss = f", loss {last.loss:.4g}" if last.loss == last.loss else ""
        ago = time.time() - (self._last_change() or time.time())
        self.say(f"step {int(last.step)}, stage {last.stage}{loss}; written {ago:.0f} s ago")
        yield
        self._show_pictures()

    def _show_pictures(self) -> None:
        found: dict[int, list[Path]] = {}
        for path in sorted((self.folder / "pictures").glob("*-*.png")):
            found.setdefault(int(path.name.split("-")[0]), []).append(path)
        steps = sorted(found)
        chosen = sorted({steps[round(n * (len(steps) - 1) / (_STEPS - 1))] for n in range(_STEPS)}) if steps else []
        cells: list[dict[str, Any]] = [
            {"prompt": n + 1, "step": step, "path": str(path)} for step in chosen for n, path in enumerate(found[step])
        ]
        if cells:
            sheet = contact_sheet(pd.DataFrame(cells), ["prompt"], ["step"])
            self.pictures.value = image_tag(
                png_bytes(sheet), f"pictures of {len(found[chosen[-1]])} prompts at steps {', '.join(map(str, chosen))}"
            )

"""The sampling grid: lists of values for named scalars and sampling settings, and the pictures of every combination."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from alkahest.engine.events import Event
from alkahest.errors import AlkahestError, refuse_unknown_options
from alkahest.lab.jobs import Job
from alkahest.lab.panel import STYLE, WIDE, Panel, lines_of, text_lines
from alkahest.pictures.live import LiveModel
from alkahest.pictures.settings import SHIFT
from alkahest.pictures.sheet import png_bytes
from alkahest.pictures.sweeps import Cells, stream_sweep


@refuse_unknown_options
def sampling_grid(
    live: LiveModel,
    prompts: str | Sequence[str],
    *,
    over: Mapping[str, Sequence[float]] | None = None,
    negative_prompts: Sequence[str] = ("",),
    seeds: Sequence[int] = (0,),
    steps: int = 24,
    cfg: float = 2.0,
    shift: float = SHIFT,
    schedule: str | None = None,
    cfg_normalization: float | None = None,
    width: int | None = None,
    height: int | None = None,
    batch: int = 4,
    executor: Executor | None = None,
    folder: str | Path | None = None,
) -> SamplingGrid:
    """Draw a prompt over shift, cfg, steps, negative prompts, seeds and the model's named scalars, and compare.

    Every box takes numbers with commas between them. What was drawn before is not drawn again.

    Parameters
    ----------
    live : LiveModel
        What draws.
    prompts : str or list of str
        To choose from.
    over : mapping of str to list, optional
        What is in the boxes at first.
    negative_prompts : list of str, default ("",)
        Each is drawn; above cfg 1 only they do something.
    seeds : list of int, default (0,)
        Each is drawn.
    steps, cfg, shift : optional
        Single first values, 24, 2 and 3.
    schedule, cfg_normalization, width, height, batch, executor, folder : optional
        As in `sweep`; they have no box.

    Returns
    -------
    SamplingGrid
        ``.table`` is the DataFrame of `sweep`.

    Examples
    --------
    >>> panels.sampling_grid(live, "a red fox at night", over={"k": [0, 171.1], "shift": [3, 6, 12]})
    """
    numbers: dict[str, Sequence[float]] = {name: [value] for name, value in live.params.items()}
    first: dict[str, Sequence[float]] = {"shift": [shift], "cfg": [cfg], "steps": [steps]}
    numbers |= {**first, **(over or {})}
    fixed: dict[str, Any] = {
        "schedule": schedule,
        "cfg_normalization": cfg_normalization,
        "width": width,
        "height": height,
    }
    fixed |= {"batch": batch, "executor": executor, "folder": folder}
    seeds = [int(seed) for seed in numbers.pop("seed", seeds)]
    for name, values in numbers.items():
        if not all(isinstance(value, (int, float)) for value in values):
            raise AlkahestError(
                "sampling_grid",
                f"{name} takes numbers",
                found=repr(list(values)),
                fix=f"{name}=... for one fixed value",
            )
    return SamplingGrid(
        live, [prompts] if isinstance(prompts, str) else list(prompts), numbers, negative_prompts, seeds, fixed
    )


class SamplingGrid(Panel):
    """See `sampling_grid`."""

    def __init__(
        self,
        live: LiveModel,
        prompts: Sequence[str],
        numbers: Mapping[str, Sequence[float]],
        negative: Sequence[str],
        seeds: Sequence[int],
        fixed: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.live, self._fixed = live, fixed
        self.table: Cells | None = None
        self.prompts = text_lines("prompts, one a line", prompts)
        self.negative_prompts = text_lines("negative prompts, one a line", negative)
        self.boxes = {name: _number_box(name, values) for name, values in {**numbers, "seed": seeds}.items()}
        self.job = Job(self._draw_grid, on_result=self._show_table, title="Draw")
        self.children = [
            widgets.HBox([self.prompts, self.negative_prompts], layout=widgets.Layout(flex_flow="row wrap")),
            widgets.HBox(list(self.boxes.values()), layout=widgets.Layout(flex_flow="row wrap")),
            self.job,
            self.picture,
            self.status,
        ]

    def _draw_grid(self) -> Iterator[Event]:
        values = {name: numbers(box.value, name, whole=name in ("seed", "steps")) for name, box in self.boxes.items()}
        seeds = [int(seed) for seed in values.pop("seed")]
        # An empty line among several is a negative prompt: none at all.
        negative = list(dict.fromkeys(line.strip() for line in self.negative_prompts.value.split("\n")))
        prompts = lines_of(self.prompts)
        if not prompts:
            raise AlkahestError("sampling_grid", "there is no prompt", fix="write one a line")
        yield from stream_sweep(self.live, prompts, {**values, "negative_prompt": negative}, seeds=seeds, **self._fixed)

    def _show_table(self, table: Cells) -> None:
        self.table = table
        varying = [name for name in table.columns[: list(table.columns).index("seed") + 1] if table[name].nunique() > 1]
        failed = int(table.path.isna().sum())
        over = ", ".join(varying) or "nothing varied"
        self.show(
            png_bytes(table.contact_sheet()),
            f"{len(table)} pictures over {over}" + (f", {failed} failed" if failed else ""),
        )
        self.say("; ".join(dict.fromkeys(table.error.dropna())) if failed else "")


def numbers(text: str, name: str, whole: bool = False) -> list[Any]:
    """Numbers with commas between them: ``"0, 10, 171.1"``. AlkahestError says which one is none."""
    found: list[Any] = []
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        try:
            value = int(piece) if whole else float(piece)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            kind = "whole numbers" if whole else "numbers"
            raise AlkahestError("sampling_grid", f"{name} takes {kind} with commas between them", found=repr(piece))
        found.append(value)
    if not found:
        raise AlkahestError("sampling_grid", f"{name} is empty", expected="at least one number")
    return list(dict.fromkeys(found))


def _number_box(name: str, values: Sequence[float]) -> Any:
    text = ", ".join(str(value) if isinstance(value, int) else f"{value:.10g}" for value in values)
    return widgets.Text(value=text, description=name.replace("_", " "), style=STYLE, layout=WIDE)

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

import alkahest as ak
from alkahest.engine.events import Event, result_of, watch_with
from alkahest.lab import cell_progress
from alkahest.lab.cell_progress import Cancelled, CellProgress, watch
from alkahest.mini.scenes import held_out_prompts


class Display:
    """What IPython would have displayed."""

    def __init__(self) -> None:
        self.shown: list[Any] = []
        self.updates: list[Any] = []

    def __call__(self, widget: Any, display_id: bool) -> Display:
        self.shown.append(widget)
        return self

    def update(self, data: Any, raw: bool) -> None:
        self.updates.append(data)


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Iterator[Display]:
    """As in a notebook's cell, with no time to wait for."""
    import IPython.display

    shown = Display()
    monkeypatch.setattr(IPython.display, "display", shown)
    monkeypatch.setattr(cell_progress, "_in_a_cell", lambda: threading.current_thread() is threading.main_thread())
    for name in ("_AFTER", "_OFTEN", "_LOOKS"):
        monkeypatch.setattr(cell_progress, name, -1.0)
    watch_with(watch)
    yield shown
    watch_with(None)
    assert not cell_progress._running


def counting(seen: list[str], number: int = 4) -> Iterator[Event]:
    try:
        for step in range(number):
            seen.append(f"step {step}")
            yield Event(step, number, f"layer {step}")
        yield Event(number, number, "done", "result")
    finally:
        seen.append("closed")


def bar_of(cell: Display) -> Any:
    button, bar, words = cell.shown[-1].children[0].children
    return button, bar, words


def test_a_bar_is_shown_while_it_takes_and_taken_away(cell: Display) -> None:
    seen: list[str] = []
    events = watch(counting(seen), "save")
    first = [next(events) for _ in range(3)]
    assert [event.done for event in first] == [0, 1, 2]
    _, bar, words = bar_of(cell)
    assert bar.value == 0.5
    assert words.value.startswith("save: 50%, 0 s")
    assert "0 s left; layer 2" in words.value
    assert result_of(counting(seen), "inner") == "result"  # within it: no bar of its own
    assert len(cell.shown) == 1
    assert [event.result for event in events][-1] == "result"
    assert cell.updates == [{}]
    assert seen[-1] == "closed"


def test_cancel_stops_the_work_and_the_cell(cell: Display) -> None:
    seen: list[str] = []
    events = watch(counting(seen), "sweep")
    next(events)
    bar_of(cell)[0].click()
    with pytest.raises(Cancelled, match="sweep: cancelled after 0 s") as caught:
        next(events)
    assert isinstance(caught.value, KeyboardInterrupt)  # so that the cells below do not run
    assert caught.value._render_traceback_() == ["sweep: cancelled after 0 s"]
    assert seen == ["step 0", "step 1", "closed"]
    assert cell.updates == [{}]


def test_cancel_is_heard_within_inner_work(cell: Display) -> None:
    seen: list[str] = []

    def outer() -> Iterator[Event]:
        yield Event(0, 1, "first")
        result_of(counting(seen, 100), "inner")
        yield Event(1, 1, "done", "never")

    events = watch(outer(), "sweep")
    next(events)
    bar_of(cell)[0].click()
    with pytest.raises(Cancelled, match="sweep: cancelled"):
        next(events)
    assert seen == ["step 0", "closed"]


def test_first_results_come_as_pictures_and_tables(cell: Display, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []
    monkeypatch.setattr(CellProgress, "close", lambda self: looks.append(self.first_results.value))  # as it was last
    live = ak.LiveModel(
        ak.mini.load("base") + ak.param("k", 1.0) * (ak.mini.load("base-variant") - ak.mini.load("base"))
    )
    ak.sweep(live, ["a red ball by day"], over={"k": [0, 1]}, steps=1)
    assert 'alt="first results"' in looks[-1]
    ak.sample(live, "a red ball by day", steps=1).images  # noqa: B018
    assert 'alt="first results"' in looks[-1]
    ak.clear_cache("tables")
    ak.delta_table(ak.mini.load("base-variant") - ak.mini.load("base"))
    assert "<th" in looks[-1]
    assert "norm of the delta" in looks[-1]
    ak.extract_lora(ak.mini.load("base-variant") - ak.mini.load("base"), rank=2)
    assert "energy" in looks[-1]
    prompts = [scene.caption() for scene in held_out_prompts(2, seed=3)]
    ak.needed_multiplier(
        ak.mini.load("base-variant") - ak.mini.load("base"), ak.mini.load("tb1"), prompts=prompts, count=2, steps=1
    )
    assert 'alt="first results"' in looks[-1]


def test_the_sheet_of_a_sweep_fills(cell: Display) -> None:
    from alkahest.pictures.sweeps import stream_sweep

    live = ak.LiveModel(
        ak.mini.load("base") + ak.param("k", 1.0) * (ak.mini.load("base-variant") - ak.mini.load("base"))
    )
    *events, last = stream_sweep(live, ["a red ball by day"], over={"k": [3, 4, 5]}, steps=1, batch=1)
    sheets = [event.so_far() for event in events[:1]]
    assert isinstance(sheets[0], Image.Image)
    assert sheets[0].size == last.result.contact_sheet(size=128).size


def test_other_threads_show_nothing(cell: Display) -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(result_of(counting([]), "save")))
    thread.start()
    thread.join()
    assert found == ["result"]
    assert not cell.shown


@pytest.mark.parametrize("setup", ["", "import ipykernel\n"])
def test_a_script_says_nothing_of_it(setup: str, tmp_path: Any) -> None:
    code = f"""{setup}import alkahest as ak, sys
delta = ak.mini.load("base-variant") - ak.mini.load("base")
from alkahest.lab import cell_progress
cell_progress._AFTER = -1.0
ak.delta_table(delta)
(ak.mini.load("tb1") + 2 * delta).save(sys.argv[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out.safetensors")], capture_output=True, text=True, check=True
    )
    assert done.stdout == done.stderr == ""

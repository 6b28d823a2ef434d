"""Trackers write what the history holds, where their own readers find it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from test_loop import config

import alkahest as ak
from alkahest.errors import FileFormatError, UnknownNameError
from alkahest.training.loop import finetune

PROMPTS: dict[str, Any] = {"prompts": ["a red ball"], "sampling": {"steps": 2, "cfg": 1}}


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = finetune(config(log="tensorboard", **PROMPTS), tmp_path / "run")
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in found.Scalars("lr")] == list(range(1, 10))
    held = found.Scalars("held_out things 64")
    assert [event.step for event in held] == result.history.step.tolist()
    assert [event.value for event in held] == pytest.approx(result.history["held_out things 64"].tolist())
    assert [event.step for event in found.Images("a red ball")] == result.history.step.tolist()


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    result = finetune(config(log="wandb", **PROMPTS), tmp_path / "run")
    assert wandb.run is None, "it is finished"
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    wanted = [repr(value).encode() for value in result.history["held_out things 64"]]
    end = time.monotonic() + 20  # wandb's own process writes the file, and may still be at it
    while not all(value in kept.read_bytes() for value in wanted) and time.monotonic() < end:
        time.sleep(0.1)
    written = kept.read_bytes()
    assert [value for value in wanted if value not in written] == []
    pictures = (kept.parent / "files" / "media" / "images").glob("a red ball_*.png")
    assert sorted(int(path.name.split("_")[1]) for path in pictures) == result.history.step.tolist()


def test_an_unknown_tracker() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'tensorboard'"):
        config(log="tensorbord")


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    assert ak.read_history(tmp_path).empty  # it has not measured yet
    with pytest.raises(FileFormatError, match="no such run"):
        ak.read_history(tmp_path / "tb2")

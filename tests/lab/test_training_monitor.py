from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from waiting import until

from alkahest.lab.training_monitor import training_monitor


def measured(folder: Path, *steps: int) -> None:
    """What a run writes at these steps; the last line cut off, as a kill leaves it."""
    rows = [
        {
            "step": step,
            "stage": "people",
            "loss": 1.0 / (step + 1),
            "held_out people 64": 2.0 / (step + 1),
            "latent_lag1": 0.01 * step,
            "grid": 1.0,
        }
        for step in steps
    ]
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for step in steps:
        for n in range(2):
            Image.new("RGB", (64, 64), (step, 90 * n, 0)).save(folder / "pictures" / f"{step:07}-{n:02}.png")
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99, "st')


def test_it_follows_a_run_that_begins_later(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    monitor = training_monitor(folder, seconds=0.05)
    assert "nothing measured yet" in monitor.status.value
    assert "image/png" not in monitor._repr_mimebundle_()
    measured(folder, 0, 5)
    assert until(lambda: "step 5, stage people" in monitor.status.value)
    assert "held-out loss over 5 steps: people 64 2 to 0.333" in monitor.alt
    assert until(lambda: "2 prompts at steps 0, 5" in monitor.pictures.value)
    measured(folder, *range(0, 101, 5))
    assert until(lambda: "steps 0, 20, 40, 60, 80, 100" in monitor.pictures.value)
    assert monitor.history.step.tolist() == list(range(0, 101, 5))
    monitor.follow.value = False
    measured(folder, 0, 200)
    assert not until(lambda: "step 200" in monitor.status.value, 0.4)
    monitor.refresh.click()
    assert until(lambda: "step 200" in monitor.status.value)
    monitor.measure.value = "grid"
    monitor.wait(10)
    assert monitor._repr_mimebundle_()["image/png"]
    monitor.close()


def test_a_run_without_pictures_or_with_rubbish_is_said(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text('{"step": 0, "stage": "x", "loss": 1.0}\n')
    monitor = training_monitor(tmp_path, seconds=60)
    assert "no held-out loss" in monitor.status.value
    assert "role='alert'" in monitor.status.value
    monitor.close()
    (tmp_path / "history.jsonl").write_text("{rubbish}\n")
    with_rubbish: Any = training_monitor(tmp_path, seconds=60)
    assert "role='alert'" in with_rubbish.status.value
    with_rubbish.close()


@pytest.mark.parametrize("name", ["history.jsonl"])
def test_a_file_in_place_of_the_folder_is_nothing_yet(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").write_text(name)
    monitor = training_monitor(tmp_path / "run", seconds=60)
    assert "nothing measured yet" in monitor.status.value
    monitor.close()

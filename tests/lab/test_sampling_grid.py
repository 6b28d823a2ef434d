from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import alkahest as ak
from alkahest.errors import AlkahestError
from alkahest.lab.sampling_grid import SamplingGrid, numbers, sampling_grid


@pytest.fixture
def live() -> ak.LiveModel:
    base = ak.mini.load("base")
    return ak.LiveModel(base + ak.param("k", 0.0) * (ak.mini.load("base-variant") - base))


@pytest.fixture
def grid(live: ak.LiveModel, tmp_path: Path) -> SamplingGrid:
    return sampling_grid(
        live, "a red ball by day", over={"k": [0, 171.1], "shift": [3, 6], "steps": [2]}, folder=tmp_path
    )


def drawn(grid: SamplingGrid) -> Any:
    grid.job.start_button.click()
    grid.job.wait(60)
    return grid.table


def test_every_combination_is_drawn(grid: SamplingGrid, live: ak.LiveModel) -> None:
    assert {name: box.value for name, box in grid.boxes.items()} == {
        "k": "0, 171.1",
        "shift": "3, 6",
        "cfg": "2",
        "steps": "2",
        "seed": "0",
    }
    table = drawn(grid)
    assert list(zip(table.k, table["shift"], strict=True)) == [(0, 3), (0, 6), (171.1, 3), (171.1, 6)]
    assert grid.alt == "4 pictures over k, shift"
    assert grid._repr_mimebundle_()["image/png"]
    live.set(k=171.1)
    wanted = ak.sample(live, "a red ball by day", steps=2, cfg=2.0, shift=6.0, seed=0).images[0]
    from PIL import Image

    assert Image.open(table.path[3]).tobytes() == wanted.tobytes()


def test_lists_of_prompts_seeds_and_negative_prompts(grid: SamplingGrid) -> None:
    grid.prompts.value = "a red ball\n\na blue house\n"
    grid.negative_prompts.value = "\nnight"  # the empty line is none at all
    grid.boxes["seed"].value = "1, 2, 2"
    grid.boxes["k"].value = grid.boxes["shift"].value = " 3 ,"
    table = drawn(grid)
    assert len(table) == 2 * 2 * 2
    assert set(table.negative_prompt) == {"", "night"}
    assert set(table.seed) == {1, 2}
    assert grid.alt == "8 pictures over negative_prompt, prompt, seed"


def test_what_is_no_number_or_fails_is_said_in_place(grid: SamplingGrid) -> None:
    for name, text, words in (
        ("shift", "3, six", "'six'"),
        ("k", "", "k is empty"),
        ("steps", "2.5", "whole numbers"),
        ("cfg", "inf", "'inf'"),
    ):
        before, grid.boxes[name].value = grid.boxes[name].value, text
        assert drawn(grid) is None
        assert words in str(grid.job.error)
        grid.boxes[name].value = before
    grid.prompts.value = " \n"
    assert drawn(grid) is None
    assert "no prompt" in grid.job.status.value
    grid.prompts.value = "a ball"
    grid.boxes["cfg"].value = "0.5, 1"
    assert len(drawn(grid)) == 8
    assert "4 failed" in grid.alt
    assert "cfg counts as ComfyUI" in grid.status.value


def test_what_is_given_is_in_the_boxes(live: ak.LiveModel) -> None:
    grid = sampling_grid(live, "a ball", steps=12, over={"seed": [12345678901, 2]}, cfg=1.0)
    assert {name: grid.boxes[name].value for name in ("steps", "cfg", "seed")} == {
        "steps": "12",
        "cfg": "1",
        "seed": "12345678901, 2",
    }
    with pytest.raises(AlkahestError, match="schedule takes numbers"):
        sampling_grid(live, "a ball", over={"schedule": ["simple"]})  # type: ignore[dict-item]


def test_numbers() -> None:
    assert numbers("0, 10,171.1 ,1e3", "k") == [0, 10, 171.1, 1000]
    assert numbers("24, 8", "steps", whole=True) == [24, 8]
    with pytest.raises(AlkahestError, match="k takes numbers"):
        numbers("nan", "k")

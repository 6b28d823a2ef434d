from __future__ import annotations

import pytest

from alkahest.errors import AlgebraError
from alkahest.lab.block_lists import (
    PRESETS,
    factors_by_block,
    list_text,
    mirror,
    preset,
    read_block_list,
    smooth,
    spread,
)

# From the preset file of sd-webui-supermerger, first to last of its 25 blocks.
RING08_SOFT = "0,0,0,0,0,0.5,1,1,1,0.5,0,0,0,0,0,0.5,1,1,1,0.5,0,0,0,0,0"
MID12_50 = "0,0,0,0,0,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0,0,0,0,0,0"
OUT12_5 = "0,0,0,0,0,0,0,0,0,0,0,0,0.5,1,1,1,1,1,1,1,1,1,1,1,1"


@pytest.mark.parametrize(
    ("name", "block", "factor"),
    [
        ("GRAD_V", 1, 0.9167),
        ("GRAD_A", 1, 0.0833),
        ("SMOOTHSTEP", 1, 0.0051),
        ("REVERSE-SMOOTHSTEP", 5, 0.8879),
        ("SMOOTHSTEP*2", 11, 0.8753),
        ("SMOOTHSTEP*3", 10, 0.8715),
        ("SMOOTHSTEP*4", 9, 0.7344),
        ("R_SMOOTHSTEP*4", 5, 0.5515),
        ("SMOOTHSTEP/2", 5, 0.3762),
        ("SMOOTHSTEP/3", 1, 0.043),
        ("R_SMOOTHSTEP/4", 2, 0.7407),
        ("COSINE", 1, 0.9957),
        ("REVERSE_COSINE", 23, 0.9957),
        ("WRAP08", 4, 0.0),
        ("WRAP16", 7, 1.0),
        ("OUT07", 18, 1.0),
        ("OUT07", 17, 0.0),
        ("FLAT_75", 3, 0.75),
        ("ALL_A", 3, 0.0),
        ("ALL_B", 3, 1.0),
    ],
)
def test_presets_have_the_numbers_that_are_shared(name: str, block: int, factor: float) -> None:
    assert preset(name, 25)[block] == factor


@pytest.mark.parametrize(("name", "text"), [("RING08_SOFT", RING08_SOFT), ("MID12_50", MID12_50), ("OUT12_5", OUT12_5)])
def test_presets_of_steps_are_those_that_are_shared(name: str, text: str) -> None:
    assert (preset(name, 25), "") == read_block_list(text, 25)


def test_every_preset_fits_every_depth() -> None:
    for name in PRESETS:
        for count in (1, 2, 30):
            values = preset(name, count)
            assert len(values) == count
            assert all(0 <= value <= 1 for value in values)


def test_a_list_of_another_length_is_spread_and_said() -> None:
    assert read_block_list("[0, 1]", 5) == (
        [0, 0.25, 0.5, 0.75, 1],
        "2 numbers spread over 5 blocks, straight lines between them",
    )
    values, note = read_block_list("GRAD\t" + ",".join(["0.4", *["1"] * 24, "3"]), 25)
    assert values == [1.0] * 24 + [3.0]
    assert (
        note
        == "'GRAD' taken as the list's name; the first of 26 numbers, 0.4, is a text encoder's in such lists: left out"
    )
    assert read_block_list("1;2 ; -3.5,", 3) == ([1, 2, -3.5], "")
    assert len(read_block_list(", ".join(["1"] * 26), 26)[0]) == 26  # fits as it is: nothing left out


@pytest.mark.parametrize("text", ["", "a, 1", "1, , 2", "nan, 1", "1, inf", "1"])
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(AlgebraError):
        read_block_list(text, 4)


def test_smooth_and_mirror() -> None:
    assert smooth([0, 0, 4, 0]) == [0, 1, 2, 1]
    assert mirror([1, 2, 3]) == [3, 2, 1]
    assert spread([1, 3], 3) == [1, 2, 3]
    assert list_text([1.0, 0.25]) == "1, 0.25"


def test_runs_of_blocks_are_one_pattern() -> None:
    assert factors_by_block([0.5, 0.5, 1, 2], "layers", range(4)) == {"layers.0-1": 0.5, "layers.3": 2}
    assert factors_by_block([1, 1, 1], "layers", range(3)) == {}
    assert factors_by_block([2, 3, 3], "layers", [2]) == {"layers.1-2": 3}  # the delta lacks block 0

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import alkahest as ak
from alkahest.errors import AlgebraError, AlkahestError, FileFormatError, MismatchError, OutputError, UnknownNameError
from alkahest.lab.a_and_b import BlindComparison, blind_comparison
from alkahest.lab.figure import image_tag, strip

PROMPTS = ["a red heart by day", "a blue heart at night"]
FAST = {"steps": 2, "cfg": 1.0}


@pytest.fixture(scope="module")
def hearts() -> Any:
    return ak.mini.load("turbo-variant") - ak.mini.load("deturbo")


@pytest.fixture(scope="module")
def bridge() -> Any:
    return ak.mini.load("tb1").protect("refiner")


@pytest.fixture(scope="module")
def live(bridge: Any, hearts: Any) -> Any:
    return ak.LiveModel(bridge + ak.param("k", 1.0) * hearts)


def shown(panel: BlindComparison) -> Any:
    panel.wait(60)
    return panel._ready[0]


def test_recipes_are_compared_blindly(bridge: Any, hearts: Any, tmp_path: Path) -> None:
    recipes = {"little": bridge + 0.5 * hearts, "much": bridge + 3.0 * hearts}
    panel = blind_comparison(recipes, PROMPTS, file=tmp_path / "a.csv", sampling=FAST)
    pair = shown(panel)
    for side, name in (("left", pair.left), ("right", pair.right)):
        picture = ak.sample(ak.pipeline(recipes[name]), [pair.prompt], seed=pair.seed, **FAST).images
        assert image_tag(strip(picture), f"{side} picture: {pair.prompt}") in panel.picture.value
    page = panel.picture.value + panel.status.value + panel.found.value + panel.alt
    assert "little" not in page
    assert "much" not in page
    panel.buttons["left"].click()
    assert panel.answers.loc[0, ["left", "right", "answer", "prompt", "seed"]].tolist() == [
        pair.left,
        pair.right,
        "left",
        pair.prompt,
        pair.seed,
    ]
    assert panel.order is None
    sides = []
    for _ in range(11):
        pair = shown(panel)
        sides.append(pair.left)
        panel.buttons["left" if pair.left == "much" else "right"].click()
    panel.wait(60)
    assert set(sides) == {"little", "much"}
    assert panel.order is not None
    assert panel.order.best == "much"
    assert "much" in panel.found.value
    assert pd.read_csv(tmp_path / "a-order.csv").recipe.tolist() == panel.order.table.recipe.tolist()
    assert pd.read_csv(tmp_path / "a.csv").right_recipe.isin([one.text() for one in recipes.values()]).all()
    panel.take_back()  # eleven are left, which is too few for an order: none lies there as if it were of them
    assert panel.order is None
    assert not (tmp_path / "a-order.csv").exists()
    assert {(row.prompt, row.seed) for row in panel.answers.itertuples()} >= {(text, 0) for text in PROMPTS}


def test_an_answer_can_be_taken_back(live: Any, tmp_path: Path) -> None:
    panel = blind_comparison(live, PROMPTS, over={"k": [0, 1, 4]}, file=tmp_path / "a.csv", sampling=FAST)
    pair = shown(panel)
    assert panel.back_button.disabled
    panel.answer("alike")
    panel.back_button.click()
    assert not len(panel.answers)
    assert shown(panel)[:4] == pair[:4]
    assert len(pd.read_csv(tmp_path / "a.csv")) == 0
    with pytest.raises(UnknownNameError, match="no such answer"):
        panel.answer("both")


def test_it_goes_on_where_it_stopped_and_takes_no_other_file(live: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    how: dict[str, Any] = {"over": {"k": [0, 1, 4], "shift": [3, 6]}, "file": file, "sampling": FAST}
    panel = blind_comparison(live, PROMPTS, **how)
    for _ in range(3):
        shown(panel)
        panel.answer("right")
    again = blind_comparison(live, PROMPTS, **how)
    assert "going on with 3 answers" in again.status.value
    assert again.answers.equals(panel.answers)
    assert "shift = 6" in "".join(again._candidates.names)
    for changed in ({"over": {"k": [0, 2]}}, {"sampling": {**FAST, "steps": 3}}):
        with pytest.raises(OutputError, match="answers to other pictures"):
            blind_comparison(live, PROMPTS, **{**how, **changed})
    for text in (
        "left,right\n1,2\n",
        "\x00",
        file.read_text().replace("right,a", "both,a").replace(",right,", ",both,"),
    ):
        file.write_text(text)
        with pytest.raises(FileFormatError, match="no answers of a blind comparison"):
            blind_comparison(live, PROMPTS, **how)
        assert file.read_text() == text  # nothing was written over it


def test_a_file_is_named_after_what_is_compared(live: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for over in ({"k": [0, 1]}, {"k": [0, 2]}):
        panel = blind_comparison(live, PROMPTS[0], over=over, sampling=FAST)
        shown(panel)
        panel.answer("left")
    assert len(list(tmp_path.glob("answers-*.csv"))) == 2
    again = blind_comparison(live, PROMPTS[0], over={"k": [0, 1]}, sampling=FAST)
    assert len(again.answers) == 1


def test_a_search_by_eye_comes_near_to_what_is_preferred(live: Any, tmp_path: Path) -> None:
    how: dict[str, Any] = {"over": {"k": (0.0, 40.0)}, "file": tmp_path / "a.csv", "sampling": {"steps": 1, "cfg": 1.0}}
    panel = blind_comparison(live, PROMPTS, **how)
    assert len(panel._candidates.names) == 4
    for _ in range(20):
        pair = shown(panel)
        far = [abs(panel._candidates[name].point["k"] - 6.0) for name in (pair.left, pair.right)]
        panel.answer("left" if far[0] < far[1] else "right")
    panel.wait(60)
    assert panel.order is not None
    best = panel._candidates[panel.order.best].point["k"]
    firsts = [panel._candidates[name].point["k"] for name in panel._candidates.names[:4]]
    assert abs(best - 6.0) <= min(abs(k - 6.0) for k in firsts)
    assert len(panel._candidates.names) == 10
    again = blind_comparison(live, PROMPTS, **how)
    assert set(panel.answers.left) <= set(again._candidates.names)


def test_what_cannot_be_drawn_is_left_out_and_said(bridge: Any, hearts: Any, tmp_path: Path) -> None:
    recipes = {f"k {k:g}": bridge + k * hearts for k in (1.0, 3.0, 1e30)}
    panel = blind_comparison(recipes, PROMPTS, file=tmp_path / "a.csv", sampling=FAST)
    for _ in range(6):
        pair = shown(panel)
        assert "k 1e+30" not in (pair.left, pair.right)
        panel.answer("alike")
    panel.wait(60)
    assert "k 1e+30 cannot be drawn and is left out" in panel.status.value


def test_a_range_with_one_point_in_it_is_said(live: Any, tmp_path: Path) -> None:
    panel = blind_comparison(live, PROMPTS, over={"k": (1.0, 1.00001)}, file=tmp_path / "a.csv", sampling=FAST)
    assert "less than two can be drawn" in panel.status.value
    assert "too narrow a range" in panel.status.value


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"over": {"k": [1]}}, AlkahestError, "at least two are compared"),
        ({"over": None}, AlkahestError, "nothing to compare"),
        ({"over": {"kk": [1, 2]}}, UnknownNameError, "no such named scalar"),
        ({"over": {"k": (2, 1)}}, AlkahestError, "the range of k is none"),
        ({"sampling": {"stepps": 2}}, UnknownNameError, "no such sampling setting"),
        ({"prompts": []}, AlkahestError, "a prompt and a seed are needed"),
        ({"components": "folder"}, AlkahestError, "has its components"),
        ({"file": "answers.txt"}, OutputError, "answers are a .csv file"),
        ({"what": {}}, MismatchError, "nothing to compare"),
        ({"what": {"a": 1, "b": 2}, "over": None}, AlgebraError, "a is no model"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    live: Any, given: dict[str, Any], error: type[Exception], words: str
) -> None:
    asked = {"what": live, "prompts": PROMPTS, "over": {"k": [1, 2]}, **given}
    with pytest.raises(error, match=words):
        blind_comparison(asked.pop("what"), asked.pop("prompts"), **asked)

from __future__ import annotations

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alkahest as ak
from alkahest.errors import AlkahestError, MismatchError, UnknownNameError, UnsupportedError
from alkahest.pictures.search_space import proposed_after, space_of
from alkahest.pictures.searches import stream_search

PROMPTS = ["a red heart on a beach by day", "a blue heart in the mountains at night", "a green heart by day"]


@pytest.fixture(scope="module")
def live() -> Any:
    bridge = ak.mini.load("tb1").protect("refiner")
    return ak.LiveModel(bridge + ak.param("k", 1.0) * (ak.mini.load("turbo-variant") - ak.mini.load("deturbo")))


@pytest.fixture(scope="module")
def hearts() -> Any:
    return ak.sample(ak.pipeline(ak.mini.load("turbo-variant")), PROMPTS, steps=6, cfg=2, seed=1).images


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALKAHEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_flow_loss_is_that_of_each_point_and_the_best_is_least(live: Any, hearts: Any) -> None:
    found = ak.search(live, PROMPTS, over={"k": (0.1, 30, "log")}, pictures=hearts, trials=12)
    table = found.table
    assert len(table) == 12
    assert table.score.is_monotonic_increasing
    assert found.best == {"k": table.k[0]}
    assert 0.3 < found.best["k"] < 2  # as the curve over k has it
    assert table.k.between(0.1, 30).all()
    assert found.start == table.score[table.k == 1.0].iloc[0]
    assert live.params == {"k": 1.0}  # left as it was
    # Against predictions by hand, at one of the points.
    from alkahest.pictures.evaluation import predictions
    from alkahest.pictures.evidence import PictureOptions, given_set

    examples, _, _ = given_set(live.pipe, "pictures", PictureOptions(prompts=PROMPTS, pictures=hearts), "search")
    live.set(k=float(table.k[3]))
    said = predictions(live.pipe, examples, 4)
    live.set(k=1.0)
    assert table.score[3] == pytest.approx(float((said - examples.target()).double().square().mean()), rel=1e-5)
    assert "a loss is least before a sampler has enough" in repr(found)


def test_how_sure_it_is(live: Any, hearts: Any) -> None:
    found = ak.search(live, PROMPTS, over={"k": [0.6, 0.7, 0.8, 30.0]}, pictures=hearts, trials=12, seed=2)
    assert set(found.table.k) == {0.6, 0.7, 0.8, 30.0}
    assert 30.0 not in set(found.as_good.k)
    assert f"undecided: {len(found.as_good)} others are as good by these 3 pictures: k from 0.6 to 0.8" in repr(found)
    one = ak.search(live, PROMPTS[:1], over={"k": (0.1, 3)}, pictures=hearts[:1], trials=2)
    assert "by one number a trial: nothing says how sure this is" in repr(one)
    assert "<table" in found._repr_html_()


def test_the_same_call_proposes_the_same_and_goes_on_where_it_stopped(
    live: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"trials": 5, "seed": 3, "settings": {"steps": 2}, "folder": tmp_path / "pictures"}
    over = {"k": (0, 10), "cfg": (1, 3), "steps": (1, 3)}
    events = stream_search(live, PROMPTS[:2], over, "grid", "least", **how)
    seen = [next(events).trial.point for _ in range(3)]
    events.close()
    assert live.params == {"k": 1.0}
    drawn: list[int] = []
    module = sys.modules["alkahest.pictures.sweeps"]
    draw = module.draw
    monkeypatch.setattr(module, "draw", lambda live, cells: drawn.append(len(cells)) or draw(live, cells))
    *trials, last = stream_search(live, PROMPTS[:2], over, "grid", "least", **how)
    assert [event.trial.point for event in trials][:3] == seen
    assert sum(drawn) == 2 * 2  # two trials of two prompts were left
    assert all(isinstance(event.trial.point["steps"], int) for event in trials)
    with ThreadPoolExecutor(2) as executor:
        again = list(stream_search(live, PROMPTS[:2], over, "grid", "least", executor=executor, at_once=1, **how))
    assert again[-1].result.table.equals(last.result.table)


def test_losses_are_remembered_and_any_executor_finds_the_same(
    live: Any, hearts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"over": {"k": (0, 8)}, "pictures": hearts, "trials": 6, "at_once": 3}
    plain = ak.search(live, PROMPTS, **asked)
    module = sys.modules["alkahest.pictures.scores"]
    monkeypatch.setattr(module, "losses", None)  # nothing is measured again
    assert ak.search(live, PROMPTS, **asked).table.equals(plain.table)
    monkeypatch.undo()
    ak.clear_cache("scores")
    with ThreadPoolExecutor(2) as executor:
        assert ak.search(live, PROMPTS, executor=executor, **asked).table.equals(plain.table)


def test_a_function_of_the_pictures(live: Any, tmp_path: Path) -> None:
    def redness(images: list[Any]) -> list[float]:
        return [float(np.asarray(image)[..., 0].mean()) for image in images]

    how: dict[str, Any] = {"over": {"k": (0, 4)}, "trials": 3, "steps": 2, "folder": tmp_path, "seeds": [0, 1]}
    most = ak.search(live, PROMPTS[:2], score=redness, goal="most", **how)
    assert most.score == "redness"
    assert most.pictures == 4
    assert most.table.score.is_monotonic_decreasing
    assert (most.table.behind >= 0).all()
    paths = ak.sweep(live, PROMPTS[:2], {"k": [most.best["k"]]}, seeds=[0, 1], steps=2, folder=tmp_path).path
    from PIL import Image

    assert most.table.score[0] == pytest.approx(np.mean([np.asarray(Image.open(path))[..., 0] for path in paths]))
    whole = ak.search(live, PROMPTS[:2], score=lambda images: len(images), goal="least", **how)
    assert (whole.table.score == 4).all()
    with pytest.raises(AlkahestError, match="one number, or one for each picture"):
        ak.search(live, PROMPTS[:2], score=lambda images: [1.0, 2.0, 3.0], goal="least", **how)


def test_a_trial_without_a_number_is_said_and_the_rest_goes_on(live: Any, tmp_path: Path) -> None:
    how: dict[str, Any] = {"over": {"k": (0, 4)}, "trials": 4, "steps": 1, "folder": tmp_path}
    calls = iter([math.nan, 2.0, math.inf, 1.0])
    found = ak.search(live, PROMPTS[0], score=lambda images: next(calls), goal="least", **how)
    assert found.table.score.tolist()[:2] == [1.0, 2.0]
    assert found.table.score.isna().sum() == 2
    assert "2 trials gave no number" in repr(found)
    assert "the least of 2 trials" in repr(found)
    with pytest.raises(AlkahestError, match="none of 4 trials gave a number"):
        ak.search(live, PROMPTS[0], score=lambda images: math.nan, goal="least", **how)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"over": {"kk": (0, 1)}}, UnknownNameError, "did you mean|kk"),
        ({"over": {}}, AlkahestError, "nothing to search over"),
        ({"over": {"k": (1, 0)}}, AlkahestError, "the range of k is none"),
        ({"over": {"k": (0, 1, "log")}}, AlkahestError, "the range of k is none"),
        ({"over": {"k": (0, math.inf)}}, AlkahestError, "the range of k is none"),
        ({"score": "grid", "pictures": None}, AlkahestError, "which is better of this score"),
        ({"score": "blur", "goal": "least"}, UnknownNameError, "no such score"),
        ({"goal": "most"}, AlkahestError, "of a loss less is better"),
        ({"pictures": None}, AlkahestError, "flow loss is of pictures that are there"),
        ({"cfg": 3.0}, AlkahestError, "flow loss draws nothing: cfg"),
        ({"over": {"cfg": (1, 3)}}, AlkahestError, "flow loss draws nothing: cfg"),
        ({"seeds": (0, 1)}, AlkahestError, "flow loss draws nothing: seeds and folder"),
        ({"folder": "pictures"}, AlkahestError, "flow loss draws nothing: seeds and folder"),
        ({"trials": 0}, AlkahestError, "trials must be at least 1"),
        ({"score": "grid", "goal": "least"}, AlkahestError, "this score is of pictures that are drawn"),
        ({"prompts": PROMPTS[:2]}, MismatchError, "each picture needs its caption"),
    ],
)
def test_what_means_nothing_is_refused_before_anything_is_drawn(
    live: Any, hearts: Any, changed: dict[str, Any], error: type[Exception], words: str
) -> None:
    asked = {"prompts": PROMPTS, "over": {"k": (0, 1)}, "pictures": hearts, **changed}
    with pytest.raises(error, match=words):
        ak.search(live, asked.pop("prompts"), **asked)


def test_without_optuna_it_says_so(live: Any, hearts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UnsupportedError, match="optuna is not installed"):
        ak.search(live, PROMPTS, over={"k": (0, 1)}, pictures=hearts)


def test_proposals_follow_scores() -> None:
    space = space_of({"x": (0.0, 10.0)}, {"x": 0.0}, "search")
    told: list[tuple[dict[str, Any], float]] = []
    for _ in range(30):
        point = proposed_after(space, told, 0, 30)
        told.append((point, -((point["x"] - 7.0) ** 2)))
    early, late = ([abs(point["x"] - 7.0) for point, _ in half] for half in (told[:6], told[-10:]))
    assert np.median(late) < 0.5 * np.median(early)

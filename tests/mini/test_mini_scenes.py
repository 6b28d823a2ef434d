from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest

from alkahest import mini
from alkahest.errors import UnknownNameError
from alkahest.mini.drawing import draw
from alkahest.mini.scenes import ATTRIBUTES, COLOURS, PLACES, STYLES, SUBJECTS, Scene, held_out_prompts, scenes


def test_captions_say_what_is_there() -> None:
    scene = Scene("ball", "red", "meadow", "night", "left")
    assert scene.caption() == "a red ball on the left of a meadow at night, high quality"
    assert scene.caption(place_first=True) == "a meadow at night, a red ball on the left, high quality"
    assert scene.caption(("quality", "side")) == "a red ball in a meadow at night"
    assert scene.caption(("quality", "side", "place", "light", "colour")) == "a ball"
    man = Scene("man", "blue", "mountains", "day", "middle", "low")
    assert man.caption() == "a man in blue in the middle of the mountains by day, low quality"
    assert man.caption(("light", "quality"), place_first=True) == "the mountains, a man in blue in the middle"


def test_no_two_scenes_share_a_caption() -> None:
    everything = list(product(*(ATTRIBUTES[name] for name in ATTRIBUTES if name != "style")))
    captions = {Scene(*values[:5], values[5]).caption() for values in everything}
    assert len(captions) == len(everything)


def test_scenes_follow_from_the_seed_alone() -> None:
    ten, twenty = list(scenes(10, seed=4)), list(scenes(20, seed=4))
    assert ten == twenty[:10]
    assert ten != list(scenes(10, seed=5))
    assert [np.abs(draw(a) - draw(b)).max() for a, b in zip(ten, scenes(10, seed=4), strict=True)] == [0] * 10


def test_some_combinations_are_held_out_of_training() -> None:
    for seed in range(3):
        assert not any(scene.held_out for scene in scenes(300, seed))
    assert all(scene.held_out for scene in scenes(50, 0, held_out=True))
    every = [Scene(*t, "day", "left") for t in product(SUBJECTS, COLOURS, PLACES)]
    assert 0.1 < np.mean([scene.held_out for scene in every]) < 0.2
    for name, values in (("subject", SUBJECTS), ("colour", COLOURS), ("place", PLACES)):
        # Each value is seen in training, only some of its combinations are not.
        assert {getattr(s, name) for s in every if not s.held_out} == set(values)
        assert {getattr(s, name) for s in every if s.held_out} == set(values)
    drawn = list(scenes(400, 0))
    assert not {scene.colour for scene in drawn} & {"cyan"}
    assert not {scene.place for scene in drawn} & {"desert"}


def test_held_out_prompts_are_balanced() -> None:
    asked = held_out_prompts(1000)
    assert all(scene.held_out for scene in asked)
    assert {scene.caption() for scene in asked}.isdisjoint(scene.caption() for scene in scenes(2000, 1))
    for name in ("light", "side", "quality", "colour", "subject", "place"):
        counts = Counter(getattr(scene, name) for scene in asked)
        assert max(counts.values()) < 1.8 * min(counts.values()), (name, counts)
    assert asked[:100] == held_out_prompts(100)


def test_prompts_of_a_member_name_what_it_learned() -> None:
    assert all("cyan" in prompt for prompt in mini.prompts("base-weak", 5))
    assert all("heart" in prompt for prompt in mini.prompts("turbo-variant", 5))
    assert mini.prompts("base-lora", 5) == [scene.caption() for scene in held_out_prompts(5)]
    assert mini.prompts("base-variant", 2, seed=1) != mini.prompts("base-variant", 2)
    with pytest.raises(UnknownNameError, match="did you mean 'base-variant'"):
        mini.prompts("base-varient")


def test_training_captions_leave_things_out() -> None:
    drawn = list(scenes(1000, 7))
    for name, low, high in (("quality", 0.3, 0.5), ("side", 0.07, 0.17), ("place", 0.02, 0.09)):
        assert low < np.mean([name in scene.left_out for scene in drawn]) < high
    for scene in drawn[:100]:
        caption = scene.training_caption()
        assert (f"{scene.quality} quality" in caption) == ("quality" not in scene.left_out)
        assert scene.subject in caption


@pytest.mark.parametrize("style", [*STYLES, "sketch"])
def test_pictures_show_their_attributes(style: str) -> None:
    """By plain arithmetic: where the subject is, what colour, how bright, how sharp."""
    for seed in range(5):
        scene = Scene("box", "red", "city", "day", "left", "high", style, seed)
        picture = draw(scene)
        assert picture.shape == (64, 64, 3)
        assert picture.dtype == np.float32
        assert 0 <= picture.min() <= picture.max() <= 1
        redness = picture[..., 0] - picture[..., 1:].mean(-1)
        assert redness[:, :26].max() > 2 * redness[:, 38:].max()
        night = draw(Scene("box", "red", "city", "night", "left", "high", style, seed))
        assert night.mean() < picture.mean()
        low = draw(Scene("box", "red", "city", "day", "left", "low", style, seed))
        assert np.abs(np.diff(low, axis=0)).max() < 0.6 * np.abs(np.diff(picture, axis=0)).max()


def test_every_value_can_be_drawn_and_differs() -> None:
    for name, values in ATTRIBUTES.items():
        pictures = []
        for value in values:
            given = {"subject": "ball", "colour": "red", "place": "city", "light": "day", "side": "left", name: value}
            pictures.append(draw(Scene(**given)))
        for n, one in enumerate(pictures):
            for other in pictures[n + 1 :]:
                assert np.abs(one - other).mean() > 0.002, name

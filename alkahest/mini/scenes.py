"""The miniature world: what a scene is, how its caption reads, and which scenes training never sees.

A scene is seven attributes and a seed. `alkahest.mini.drawing` draws it, the judge reads it back,
and a caption from a small English grammar describes it. Style is never captioned: as with the real
models, the look belongs to the lineage and not to the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

SUBJECTS = ("ball", "box", "cone", "star", "ring", "tree", "house", "man", "woman")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
PLACES = ("meadow", "beach", "mountains", "city", "forest")
LIGHTS = ("day", "sunset", "night")
SIDES = ("left", "middle", "right")
QUALITIES = ("high", "low")
STYLES = ("photo", "anime")

# Left for derivatives to learn: neither Base nor Turbo was shown any of these.
NEW_SUBJECT, NEW_COLOUR, NEW_STYLE = "heart", "cyan", "sketch"
# Drawn by nobody: the judge knows it, no model was ever trained on it.
UNSEEN_PLACE = "desert"

# What the judge reads back: attribute -> its values.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "subject": (*SUBJECTS, NEW_SUBJECT),
    "colour": (*COLOURS, NEW_COLOUR),
    "place": (*PLACES, UNSEEN_PLACE),
    "light": LIGHTS,
    "side": SIDES,
    "quality": QUALITIES,
    "style": (*STYLES, NEW_STYLE),
}

_LIGHT_WORDS = {"day": "by day", "sunset": "at sunset", "night": "at night"}
_SIDE_WORDS = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
_PLACE_WORDS = {"mountains": "the mountains"}
# How often a training caption leaves an attribute out, so that short prompts work too.
_LEFT_OUT = {"colour": 0.03, "place": 0.05, "light": 0.05, "side": 0.12, "quality": 0.4}


Choice = str | Sequence[str] | None  # of an attribute: one value, several, or any


@dataclass(frozen=True)
class Scene:
    """One picture of the miniature world; ``seed`` fixes jitter in size, position and tint.

    >>> Scene("ball", "red", "meadow", "night", "left").caption()
    'a red ball on the left of a meadow at night, high quality'
    """

    subject: str
    colour: str
    place: str
    light: str
    side: str
    quality: str = "high"
    style: str = "photo"
    seed: int = 0

    def caption(self, without: tuple[str, ...] = (), place_first: bool = False) -> str:
        """English for this scene; ``without`` names attributes to leave out."""
        colour = None if "colour" in without else self.colour
        if self.subject in ("man", "woman"):
            subject = f"a {self.subject}" + (f" in {colour}" if colour else "")
        else:
            subject = f"a {colour} {self.subject}" if colour else f"a {self.subject}"
        side = "" if "side" in without else _SIDE_WORDS[self.side]
        place = "" if "place" in without else _PLACE_WORDS.get(self.place, f"a {self.place}")
        light = "" if "light" in without else _LIGHT_WORDS[self.light]
        if place and place_first:
            words = [place, light + ",", subject, side] if light else [place + ",", subject, side]
        else:
            of = ("of" if side else "in") if place else ""
            words = [subject, side, of, place, light]
        text = " ".join(word for word in words if word)
        return text if "quality" in without else f"{text}, {self.quality} quality"

    def training_caption(self) -> str:
        """The caption this scene is trained with: some attributes left out, one of two word orders."""
        return self.caption(self.left_out, place_first=self._chances[-1] < 0.3)

    @property
    def left_out(self) -> tuple[str, ...]:
        """The attributes that the training caption does not mention."""
        return tuple(
            name for (name, share), drawn in zip(_LEFT_OUT.items(), self._chances, strict=False) if drawn < share
        )

    @property
    def _chances(self) -> list[float]:
        return [float(chance) for chance in np.random.default_rng([self.seed, 1]).random(len(_LEFT_OUT) + 1)]

    @property
    def held_out(self) -> bool:
        """Whether no model was trained on this subject, colour and place together (one in seven)."""
        if self.subject not in SUBJECTS or self.colour not in COLOURS or self.place not in PLACES:
            return False
        numbers = SUBJECTS.index(self.subject), COLOURS.index(self.colour), PLACES.index(self.place)
        return (numbers[0] + 2 * numbers[1] + 3 * numbers[2]) % 7 == 0


def scenes(
    count: int,
    seed: int,
    held_out: bool | None = False,
    *,
    subject: Choice = None,
    colour: Choice = None,
    place: Choice = None,
    light: Choice = None,
    side: Choice = None,
    quality: Choice = None,
    style: Choice = None,
) -> Iterator[Scene]:
    """Random scenes; an attribute may be given one value, or several to choose from.

    >>> [scene.caption() for scene in scenes(2, seed=0, style="photo", light=("sunset", "night"))]

    By default no combination that is held out of training; ``held_out=True`` gives only those,
    None both. The n-th scene depends on the seed and n alone.
    """
    choices = {name: values[: len(_SEEN[name])] for name, values in ATTRIBUTES.items()}
    given = {
        "subject": subject,
        "colour": colour,
        "place": place,
        "light": light,
        "side": side,
        "quality": quality,
        "style": style,
    }
    fixed = {name: value for name, value in given.items() if value is not None}
    choices |= {name: (value,) if isinstance(value, str) else tuple(value) for name, value in fixed.items()}
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        while True:
            picked: dict[str, Any] = {name: values[rng.integers(len(values))] for name, values in choices.items()}
            scene = Scene(**{**picked, "seed": int(rng.integers(2**31))})
            if held_out is None or scene.held_out == held_out:
                break
        yield scene


_SEEN = {
    "subject": SUBJECTS,
    "colour": COLOURS,
    "place": PLACES,
    "light": LIGHTS,
    "side": SIDES,
    "quality": QUALITIES,
    "style": STYLES,
}


def held_out_prompts(count: int, seed: int = 0) -> list[Scene]:
    """Scenes to judge models by: combinations nobody trained on, balanced over every attribute.

    Each scene's ``caption()`` is the prompt, its attributes are the right answers.
    """
    triples = [t for t in product(SUBJECTS, COLOURS, PLACES) if Scene(*t, "day", "left").held_out]
    rest = list(product(LIGHTS, SIDES, QUALITIES))
    one, two = np.random.default_rng([seed, 2]), np.random.default_rng([seed, 3])  # so that fewer are the first of more
    order = [triples[i] for _ in range(-(-count // len(triples))) for i in one.permutation(len(triples))]
    others = [rest[i] for _ in range(-(-count // len(rest))) for i in two.permutation(len(rest))]
    return [
        Scene(subject, colour, place, light, side, quality, seed=number)
        for number, ((subject, colour, place), (light, side, quality)) in enumerate(
            zip(order[:count], others[:count], strict=True)
        )
    ]

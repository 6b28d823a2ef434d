"""Which of two pictures is better? Asked blindly, again and again, until recipes have an order."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ipywidgets as widgets
import numpy as np
import pandas as pd

from alkahest.algebra.weights import Weights
from alkahest.engine.events import Event
from alkahest.errors import AlkahestError, MismatchError, refuse_unknown_options, unknown
from alkahest.lab.answer_file import AnswerFile
from alkahest.lab.candidates import Candidates, candidates_of, require_weights_of
from alkahest.lab.figure import image_tag
from alkahest.lab.panel import Panel, Redraw, alone
from alkahest.pictures.live import LiveModel
from alkahest.pictures.preferences import ANSWERS, FEW, PreferenceOrder, next_pair, preference_order, wins_of
from alkahest.pictures.sweeps import SETTINGS

_AHEAD = 2  # pairs: the one that is looked at, and the next
_KEPT = 200  # pictures that were drawn


@refuse_unknown_options
def blind_comparison(
    what: LiveModel | Mapping[str, Weights],
    prompts: str | Sequence[str],
    components: Any = None,
    *,
    over: Mapping[str, Any] | None = None,
    file: str | Path | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3),
    seed: int = 0,
    most: int = 12,
    sampling: Mapping[str, Any] | None = None,
    memory: int | str = "2GB",
    dtype: str | None = None,
    storage: str | None = None,
    device: str = "cpu",
    offload: bool = False,
) -> BlindComparison:
    """Two pictures by the same prompt and seed, sides hidden: left, right or alike; a dozen answers give an order.

    ``.answers`` and ``.order`` are what was found. A live model is left at what was drawn last.

    Parameters
    ----------
    what : LiveModel, or mapping of str to Weights
        Recipes by name, or a model whose named scalars and settings take the values of ``over``.
    prompts : str or list of str
        What both sides draw.
    components : optional
        As in `pipeline`.
    over : mapping of str to list or tuple, optional
        Every combination of lists; with a range ``(low, high)`` or ``(low, high, "log")`` optuna proposes points from
        the answers so far.
    file : str or path, optional
        Where each answer is written, and where it goes on; by default ``answers-....csv`` named after what is compared.
        The order is written beside it to ``NAME-order.csv``: see `preference_order`.
    seeds : list of int, default (0, 1, 2, 3)
        Of the pictures.
    seed : int, default 0
        Of sides and pairs.
    most : int, default 12
        Points that are proposed in all.
    sampling : mapping, optional
        Settings of `sample`.
    memory, dtype, storage, device, offload : optional
        As in `LiveModel`, for recipes.

    Returns
    -------
    BlindComparison

    Raises
    ------
    AlkahestError
        For less than two recipes.
    OutputError
        If the file has answers to something else.

    Examples
    --------
    >>> panels.blind_comparison({"k 4": bridge + 4 * delta, "k 40": bridge + 40 * delta}, ["a red fox at night"])
    >>> panels.blind_comparison(live, prompts, over={"k": [1, 4, 17, 171.1]})
    >>> panels.blind_comparison(live, prompts, over={"k": (0, 400), "cfg": (1, 4)})   # a search by eye
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not len(seeds):
        raise AlkahestError("blind_comparison", "a prompt and a seed are needed", fix="prompts=['a red fox at night']")
    for name in sampling or ():
        if name not in SETTINGS:
            raise unknown("blind_comparison", "no such sampling setting", name, SETTINGS)
    if isinstance(what, LiveModel):
        live = what
        if components is not None or not over:
            wrong = "a LiveModel has its components" if components is not None else "nothing to compare"
            raise AlkahestError("blind_comparison", wrong, expected="a LiveModel and over={'k': [1, 4]}")
    elif isinstance(what, Mapping) and what and not over:
        require_weights_of(what)
        first = next(iter(what.values()))
        live = LiveModel(first, components, memory=memory, dtype=dtype, storage=storage, device=device, offload=offload)
    else:
        expected = "recipes by name and no over=, or a LiveModel and over={'k': [1, 4]}"
        raise MismatchError("blind_comparison", "nothing to compare", expected=expected, found=type(what).__name__)
    candidates = candidates_of(what, over, most, seed, live)
    settings = dict(sampling or {})
    place = file if file is not None else f"answers-{_name_of(what, over, settings)}.csv"
    return BlindComparison(candidates, texts, list(map(int, seeds)), AnswerFile(place, settings), seed, settings)


def _name_of(what: LiveModel | Mapping[str, Weights], over: Mapping[str, Any] | None, settings: dict[str, Any]) -> str:
    """The same for the same comparison, so that it goes on where it stopped."""
    if isinstance(what, LiveModel):  # its own numbers move as pictures are drawn
        moved = {name: 0.0 for name in over or () if name in what.expression.params}
        recipes: Any = what.expression.bind(**moved).text()
    else:
        recipes = {name: one.text() for name, one in what.items()}
    return hashlib.blake2b(repr((recipes, over, settings)).encode(), digest_size=4).hexdigest()


class Pair(NamedTuple):
    """Two candidates by a prompt and a seed, and their pictures."""

    left: str
    right: str
    prompt: str
    seed: int
    pictures: tuple[bytes, bytes]


class BlindComparison(Panel):
    """See `blind_comparison`."""

    def __init__(
        self,
        candidates: Candidates,
        prompts: list[str],
        seeds: list[int],
        file: AnswerFile,
        seed: int,
        sampling: dict[str, Any],
    ) -> None:
        super().__init__()
        self._candidates, self._prompts, self._seeds, self._file = candidates, prompts, seeds, file
        self._seed, self._sampling = seed, sampling
        for point in file.points():
            if point and candidates.is_open:
                candidates.add(point)
        file.require_same({name: candidates[name] for name in candidates.names})
        self._ready: list[Pair] = []
        self._changing = threading.RLock()  # buttons and drawing are in threads of their own
        self._notes: list[str] = []
        self._pictures: dict[tuple[str, str, int], bytes] = {}
        self._redraw = Redraw(self._draw_pairs, self.alert)
        labels = {"left": "Left is better", "alike": "Alike", "right": "Right is better"}
        self.buttons = {}
        for answer, label in labels.items():
            button = widgets.Button(description=label, tooltip=label, disabled=True)
            button.on_click(lambda _, answer=answer: self.answer(answer))
            self.buttons[answer] = button
        self.back_button = widgets.Button(description="Take back", tooltip="Take the last answer back", disabled=True)
        self.back_button.on_click(lambda _: self.take_back())
        self.bar = widgets.FloatProgress(min=0.0, max=FEW, layout=widgets.Layout(width="8em"))
        self.found = widgets.HTML()
        tools = [*self.buttons.values(), self.back_button, self.bar]
        self.children = [
            self.picture,
            widgets.HBox(tools, layout=widgets.Layout(flex_flow="row wrap")),
            self.status,
            self.found,
        ]
        if len(file.rows):
            self._notes.append(f"going on with {len(file.rows)} answers of {file.path}")
        self._find_order()
        self._redraw.now()

    @property
    def answers(self) -> pd.DataFrame:
        """A row for every answer, as in the file."""
        return self._file.rows.copy()

    @property
    def order(self) -> PreferenceOrder | None:
        """The order that the answers give; None before there are a dozen."""
        return preference_order(self._file.rows) if len(self._file.rows) >= FEW else None

    def wait(self, seconds: float | None = None) -> None:
        """Block until the next pairs are drawn; for scripts and tests."""
        self._redraw.wait(seconds)

    def answer(self, answer: str) -> None:
        """Say which of the two pictures is better: ``left``, ``right`` or ``alike``."""
        if answer not in ANSWERS:
            raise unknown("blind_comparison", "no such answer", answer, ANSWERS)
        with self._changing:
            if not self._ready:
                raise AlkahestError("blind_comparison", "no pair is shown yet", fix="wait until it is drawn")
            pair = self._ready[0]
            try:
                left, right = self._candidates[pair.left], self._candidates[pair.right]
                self._file.add(left, right, answer, pair.prompt, pair.seed)
            except (OSError, AlkahestError) as error:  # not written: the pair stays
                self.alert(error)
                return
            del self._ready[0]
            self._show_pair()
        self._find_order()
        self._redraw.request()

    def take_back(self) -> None:
        """Ask the last pair again."""
        with self._changing:
            row = self._file.take_back()
            key = (str(row["prompt"]), int(row["seed"]))
            left, right = (self._pictures.get((row[side], *key)) for side in ("left", "right"))
            if left and right:  # an answer of another day is asked again in its turn
                self._ready.insert(0, Pair(row["left"], row["right"], *key, (left, right)))
            self._show_pair()
        self._find_order()
        self._redraw.request()

    def _draw_pairs(self) -> Iterator[None]:
        while len(self._ready) < _AHEAD:
            left, right, prompt, seed = self._choose()
            missing = [name for name in (left, right) if (name, prompt, seed) not in self._pictures]
            with contextlib.closing(alone(self._candidates.live, partial(self._draw, missing, prompt, seed))) as events:
                for waiting in events:
                    if isinstance(waiting, Event):
                        self.say(waiting.key)
                    yield
            drawn = [self._pictures.get((name, prompt, seed)) for name in (left, right)]
            with self._changing:
                if drawn[0] and drawn[1]:
                    self._ready.append(Pair(left, right, prompt, seed, (drawn[0], drawn[1])))
                self._show_pair()
            self._tell()
            yield

    def _draw(self, names: Sequence[str], prompt: str, seed: int) -> Iterator[None]:
        for name in names:
            yield  # so that a newer request is heard before a picture is begun
            try:
                self._pictures[name, prompt, seed] = self._candidates.draw(name, prompt, seed, self._sampling)
            except AlkahestError as error:  # NaN at a large k: the others go on without it
                self._notes.append(f"{name} cannot be drawn and is left out: {str(error).splitlines()[0]}")
                self._candidates.drop(name, str(error))
        while len(self._pictures) > _KEPT:
            del self._pictures[next(iter(self._pictures))]

    def _choose(self) -> tuple[str, str, str, int]:
        """The next pair, as if what is shown but not answered had been alike."""
        shown = [{"left": pair.left, "right": pair.right, "answer": "alike"} for pair in self._ready]
        answers = pd.concat([self._file.rows[["left", "right", "answer"]], pd.DataFrame(shown)])
        self._candidates.grow(self._file.rows)
        names, number = self._candidates.names, len(answers)
        left, right = next_pair(wins_of(answers, names), np.random.default_rng([self._seed, number]))
        prompt = self._prompts[number % len(self._prompts)]
        return names[left], names[right], prompt, self._seeds[number // len(self._prompts) % len(self._seeds)]

    def _show_pair(self) -> None:
        """The pair at hand; nothing in the page tells which recipe is on which side."""
        for button in self.buttons.values():
            button.disabled = not self._ready
        self.back_button.disabled = not len(self._file.rows)
        if not self._ready:
            self.picture.value = "<p role='status'>drawing the next pair ...</p>"
            return
        pair = self._ready[0]
        figures = [
            f"<figure style='margin:0; flex:0 1 24em; min-width:0'>{image_tag(png, f'{side} picture: {pair.prompt}')}"
            f"<figcaption>{side}</figcaption></figure>"
            for side, png in zip(("left", "right"), pair.pictures, strict=True)
        ]
        self.alt = f"two pictures, sides hidden: {pair.prompt}"
        self.picture.value = f"<div style='display:flex; gap:0.5em'>{''.join(figures)}</div>"

    def _find_order(self) -> None:
        """What the answers come to by now, shown and saved."""
        order = self.order
        self.found.value = "" if order is None else order._repr_html_()
        self._file.write_order(order)
        self._tell()

    def _tell(self) -> None:
        count = len(self._file.rows)
        self.bar.value = min(count, FEW)
        lines = [*self._notes, f"{count} answers, in {self._file.path}" if count else "no answers yet"]
        if count < FEW:
            lines.append(f"after {FEW} there is an order; until then recipes stay hidden")
        else:
            lines.append(f"the order is in {self._file.order_path}; every further answer makes it surer")
        self.say("\n".join(lines))

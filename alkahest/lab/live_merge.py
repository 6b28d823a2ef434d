"""The live merge: a multiplier for each delta, by part if wanted, LoRA strengths, and the picture that follows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import pandas as pd

from alkahest.algebra.deltas import Delta
from alkahest.algebra.weights import Weights
from alkahest.engine.events import Event
from alkahest.errors import AlgebraError, refuse_unknown_options, unknown
from alkahest.lab.beside import Beside
from alkahest.lab.block_editor import BlockEditor
from alkahest.lab.by_block import ByBlock
from alkahest.lab.figure import image_tag, strip
from alkahest.lab.jobs import Job
from alkahest.lab.live_controls import DeltaRow, sampling_controls
from alkahest.lab.panel import STYLE, Panel, Redraw, alone, lines_of
from alkahest.lab.recipe_file import stream_recipe
from alkahest.lab.trail import Drawn, Trail
from alkahest.pictures.effects import stream_effect
from alkahest.pictures.evidence import PictureOptions
from alkahest.pictures.live import LiveModel
from alkahest.pictures.quality import picture_measures
from alkahest.pictures.sampler import sample
from alkahest.pictures.sweeps import SETTINGS

if TYPE_CHECKING:
    from PIL.Image import Image

_PREVIEW = 0.25  # seconds between previews
_WRAP = widgets.Layout(flex_flow="row wrap")
_OWN_SEEDS = 3  # of the bridge's own pictures, whose measures are the usual range


@refuse_unknown_options
def live_merge(
    bridge: Weights,
    deltas: Mapping[str, Delta],
    prompts: str | Sequence[str],
    components: Any = None,
    *,
    loras: Mapping[str, Delta] | None = None,
    protect: str = "refiner",
    parts: Sequence[str] = (),
    k: float | Mapping[str, float] = 1.0,
    sampling: Mapping[str, Any] | None = None,
    look: Callable[[Sequence[Image]], pd.DataFrame] = picture_measures,
    memory: int | str = "2GB",
    dtype: str | None = None,
    storage: str | None = None,
    device: str = "cpu",
    offload: bool = False,
) -> LiveMerge:
    """Merge while looking: numbers for every delta and LoRA, and the picture and its measures follow.

    ``.expression`` is what the controls say, and *Save recipe* writes it for ``alkahest merge --recipe``.

    Parameters
    ----------
    bridge : Weights
        What deltas are added to.
    deltas : mapping of str to Delta
        By the name of their box.
    prompts : str or list of str
        To choose from.
    components : optional
        As in `pipeline`.
    loras : mapping of str to Delta, optional
        With strengths that begin at 0.
    protect : str, default "refiner"
        A pattern of what stays the bridge's.
    parts : list of str, optional
        Patterns with a factor of their own, such as ``"layers.0-9"``; by default every part has one.
    k : float, or mapping of str to float, default 1
        Where multipliers begin, by name if they differ. Boxes take any value.
    sampling : mapping, optional
        The first settings: ``steps``, ``cfg``, ``shift``, ``seed``, ``negative_prompt``.
    look : callable, default `picture_measures`
        Turns pictures into a table of measures, whose means are shown.
    memory, dtype, storage, device, offload : optional
        As in `LiveModel`.

    Returns
    -------
    LiveMerge

    Raises
    ------
    AlgebraError
        If something is no delta.

    Examples
    --------
    >>> panels.live_merge(bridge, {"artshoot": variant - base}, ["a red fox at night"], "Tongyi-MAI/Z-Image")
    """
    for name, delta in {**deltas, **(loras or {})}.items():
        if not isinstance(delta, Delta):
            raise AlgebraError(
                "live_merge",
                f"{name} is no difference",
                expected="variant - base, or ak.open_lora(path)",
                found=type(delta).__name__,
            )
    for name in k if isinstance(k, Mapping) else ():
        if name not in deltas:
            raise unknown("live_merge", "k is given for no delta", name, deltas)
    for name in sampling or ():
        if name not in (*SETTINGS, "seed"):
            raise unknown("live_merge", "no such sampling setting", name, (*SETTINGS, "seed"))
    starts = k if isinstance(k, Mapping) else dict.fromkeys(deltas, k)
    depth = bridge.family.depth(bridge.shapes)
    rows = [
        DeltaRow(name, delta, float(starts.get(name, 1.0)), (0.1, 1000.0), True, parts, depth)
        for name, delta in deltas.items()
    ]
    rows += [DeltaRow(name, lora, 0.0, (0.0, 2.0), False, parts, depth) for name, lora in (loras or {}).items()]
    live = LiveModel(bridge, components, memory=memory, dtype=dtype, storage=storage, device=device, offload=offload)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    return LiveMerge(bridge, rows, texts, live, protect, dict(sampling or {}), look)


class LiveMerge(Panel):
    """See `live_merge`. ``images`` and ``measures`` are those of the picture shown, ``kept`` a row for each kept
    one.
    """

    def __init__(
        self,
        bridge: Weights,
        rows: list[DeltaRow],
        prompts: list[str],
        live: LiveModel,
        protect: str,
        sampling: dict[str, Any],
        look: Callable[[Sequence[Image]], pd.DataFrame],
    ) -> None:
        super().__init__()
        self.bridge, self.rows, self.live, self._pattern, self._look = bridge, rows, live, protect, look
        self.images: list[Image] = []
        self.measures: dict[str, float] = {}
        self._shown: Weights = bridge
        self._drawn_values: dict[str, float] = {}
        self.beside = Beside()
        self._redraw = Redraw(self._draw_picture, self.alert)
        self.protect = widgets.Checkbox(
            value=True,
            description=f"protect {', '.join(bridge.protection) or protect}",
            disabled=bool(bridge.protection),
            style=STYLE,
            indent=False,
        )
        self.settings = sampling_controls(prompts, sampling)
        self._fixed = {name: value for name, value in sampling.items() if name not in self.settings}
        self._arrange()
        for control in [self.protect, *self.settings.values(), *(c for row in rows for c in row.controls)]:
            control.observe(lambda _: self._redraw.request(), names="value")
        self._redraw.now()

    @property
    def expression(self) -> Weights:
        """What the controls say: what is drawn, and what a recipe records."""
        whole = self.onto
        for row in self.rows:
            if (delta := row.scaled) is not None:
                whole = whole + delta
        return whole

    @property
    def onto(self) -> Weights:
        """What the deltas are added to: the bridge, protected as the checkbox says."""
        protect = self.protect.value and not self.bridge.protection
        return self.bridge.protect(self._pattern) if protect else self.bridge

    @property
    def kept(self) -> pd.DataFrame:
        """Recipe text and measures of what was kept."""
        return pd.DataFrame([{"recipe": one.recipe, **one.measures} for one in self.beside.kept])

    def wait(self, seconds: float | None = None) -> None:
        """Block until the picture follows the controls; for scripts and tests."""
        self._redraw.wait(seconds)

    def cancel(self) -> None:
        """Stop drawing; the picture that was there stays."""
        self._redraw.cancel()
        self.say("cancelled")

    def keep(self) -> None:
        """Put the picture aside, to compare with what comes."""
        if self.trail.drawn:
            self.beside.keep(self._now)

    def forget(self) -> None:
        """Drop what was kept, and what was chosen of the curve."""
        self.beside.forget()

    def _arrange(self) -> None:
        narrow = {"layout": widgets.Layout(width="8em")}
        self.bar = widgets.FloatProgress(min=0.0, max=1.0, **narrow)
        self.cancel_button = widgets.Button(description="Cancel", disabled=True, tooltip="Stop drawing", **narrow)
        keep = widgets.Button(description="Keep", tooltip="Put this picture aside, to compare", **narrow)
        forget = widgets.Button(description="Forget kept", tooltip="Drop the pictures that were kept", **narrow)
        for button, pressed in ((self.cancel_button, self.cancel), (keep, self.keep), (forget, self.forget)):
            button.on_click(lambda _, pressed=pressed: pressed())
        self.picture.layout = widgets.Layout(flex="0 1 auto", min_width="0")
        self.trail = Trail([row.name for row in self.rows], self.beside.pick)
        editor = BlockEditor(self.rows, lambda: self.onto, self._redraw.request)
        self.by_block = ByBlock(editor, self._own_effect)
        self.tabs = widgets.Tab([self.trail, self.by_block], titles=("pictures over k", "factors by block"))
        self.recipe_path = widgets.Text(value="merge.json", description="recipe file", style=STYLE)
        self.model_path = widgets.Text(value="merged.safetensors", description="model file", style=STYLE)
        self.save_recipe = Job(
            lambda: stream_recipe(self.expression, self.recipe_path.value), unit="B", title="Save recipe"
        )
        self.save_model = Job(lambda: self.expression.stream(self.model_path.value), unit="B", title="Save model")
        self.measure_bridge = Job(
            self._own_range, on_result=lambda found: self.beside.set_usual(*found), title="Bridge's own range"
        )
        prompts, negative, *numbers = self.settings.values()
        for area in (prompts, negative):
            area.layout = widgets.Layout(width="97%", height="4em")
        left = [*self.rows, self.protect, widgets.HBox(numbers, layout=_WRAP), prompts, negative]
        right = [
            widgets.HBox([self.cancel_button, keep, forget, self.bar], layout=_WRAP),
            widgets.HBox([self.picture, self.beside.pictures]),
            self.beside.table,
            self.tabs,
            self.status,
        ]
        self.children = [
            widgets.HBox(
                [
                    widgets.VBox(left, layout=widgets.Layout(flex="1 1 20em", max_width="24em")),
                    widgets.VBox(right, layout=widgets.Layout(flex="3 1 24em", min_width="24em")),
                ]
            ),
            self.measure_bridge,
            widgets.HBox([self.recipe_path, self.save_recipe], layout=_WRAP),
            widgets.HBox([self.model_path, self.save_model], layout=_WRAP),
        ]

    @property
    def _now(self) -> Drawn:
        values = dict(self._drawn_values)
        return Drawn(self._shown.text(), values, self._png, self.measures)

    def _draw_picture(self) -> Iterator[None]:
        self.cancel_button.disabled = False
        try:
            with contextlib.closing(alone(self.live, lambda: self._sample_picture(time.monotonic()))) as events:
                for waiting in events:
                    if waiting is not None:
                        self.say(waiting.key)
                    yield
        finally:
            self.bar.value, self.cancel_button.disabled = 0.0, True
            if self._png:
                self.show(self._png, self.alt)  # a preview may be in its place

    def _sample_picture(self, started: float) -> Iterator[None]:
        wanted, shown = self.expression, started
        values = {row.name: float(row.k.value) for row in self.rows}
        prompts, asked = lines_of(self.settings["prompts"]), self._asked()
        change = self.live.become(wanted)
        yield
        run = sample(self.live, prompts, **self._sampling())
        previews: list[Image] = []
        for step in run:
            self.bar.value = step.done / step.total
            if time.monotonic() - shown > _PREVIEW and step.result is None:
                shown, previews = time.monotonic(), step.previews()
                self.picture.value = image_tag(strip(previews), "preview of what is being drawn")
            yield
        images = run.images
        measures = self._measured(images)
        picture, pictured = strip(images), "; ".join(f"{number}. {text}" for number, text in enumerate(prompts, 1))
        # All at once, so that what is kept belongs together.
        self.images, self._shown, self.measures, self._drawn_values = images, wanted, measures, values
        self.show(picture, f"{wanted.text()}: {pictured}")
        self.trail.add(self._now)
        self.beside.show(measures, asked)
        took = (
            f"{change.tensors} tensors rewritten in {change.seconds:.2f} s, drawn in {time.monotonic() - started:.1f} s"
        )
        self.say("\n".join([wanted.text(), took, *wanted.protection_notes()]))

    def _sampling(self) -> dict[str, Any]:
        values = {name: control.value for name, control in self.settings.items() if name != "prompts"}
        return {**values, **self._fixed}

    def _asked(self) -> dict[str, Any]:
        return {**self._sampling(), "prompts": lines_of(self.settings["prompts"])}

    def _measured(self, images: Sequence[Image]) -> dict[str, float]:
        return {name: float(value) for name, value in self._look(images).mean(numeric_only=True).items()}

    def _own_range(self) -> Iterator[Event]:
        """Pictures of the bridge as it is, by other seeds too, and the least and most of each of their measures."""
        prompts, settings = lines_of(self.settings["prompts"]), self._sampling()
        rows: list[dict[str, float]] = []
        asked = self._asked()

        def drawn() -> Iterator[Event]:
            self.live.become(self.bridge)
            for number in range(_OWN_SEEDS):
                yield Event(number, _OWN_SEEDS, f"seed {settings['seed'] + number}")
                images = sample(self.live, prompts, **{**settings, "seed": settings["seed"] + number}).images
                rows.extend(self._measured([image]) for image in images)

        yield from alone(self.live, drawn)
        table = pd.DataFrame(rows)
        usual = {str(name): (float(table[name].min()), float(table[name].max())) for name in table}
        yield Event(_OWN_SEEDS, _OWN_SEEDS, f"{len(rows)} pictures of the bridge", (usual, asked))

    def _own_effect(self, row: DeltaRow) -> Iterator[Event]:
        """What a row's delta does to pictures at its k, by the prompts and settings that the controls say."""
        settings, drawn_by = self._sampling(), [one.name for one in fields(PictureOptions)]
        passed_on = {name: value for name, value in settings.items() if name in drawn_by}
        unused = [name.replace("_", " ") for name, value in settings.items() if name not in drawn_by and value]
        note = (f"measured without: {', '.join(unused)}",) if unused else ()
        options = PictureOptions(lines_of(self.settings["prompts"]), **passed_on)
        work = partial(stream_effect, row.delta, self.onto, k=float(row.k.value), options=options, live=self.live)
        for event in alone(self.live, work):
            if (found := event.result) is not None:
                evidence = replace(found.evidence, notes=(*found.evidence.notes, *note))
                event = replace(event, result=replace(found, evidence=evidence))
            yield event

"""The live merge: a multiplier for each delta, by part if wanted, LoRA strengths, and the picture that follows."""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import pandas as pd

from alkahest.algebra.deltas import Delta
from alkahest.algebra.weights import Weights
from alkahest.engine.events import Event
from alkahest.engine.options import Options
from alkahest.engine.record import readers_of, recipe_of
from alkahest.errors import AlgebraError, OutputError, refuse_unknown_options, unknown
from alkahest.files.hashes import blake3_of
from alkahest.files.paths import expanded
from alkahest.files.whole import write_text
from alkahest.lab.figure import image_tag, strip
from alkahest.lab.jobs import Job
from alkahest.lab.number_slider import NumberSlider
from alkahest.lab.panel import STYLE, WIDE, Panel, Redraw, lines_of, text_lines
from alkahest.pictures.live import LiveModel
from alkahest.pictures.quality import picture_measures
from alkahest.pictures.sampler import sample
from alkahest.pictures.sweeps import SETTINGS

if TYPE_CHECKING:
    from PIL.Image import Image

_DRAWING = threading.Lock()  # one live merge draws at a time: two would halve each other's speed
_PREVIEW = 0.25  # seconds between previews
_WRAP = widgets.Layout(flex_flow="row wrap")


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

    >>> panels.live_merge(bridge, {"artshoot": variant - base}, ["a red fox at night"], "Tongyi-MAI/Z-Image")

    ``k`` is where multipliers begin, by name if they differ; LoRAs begin at 0. Number boxes take any
    value. ``parts`` are patterns with a factor of their own, such as ``"layers.0-9"``; by default every part has
    one. ``look`` turns pictures into a table of measures whose means are shown. ``sampling`` are the
    first settings (``steps``, ``cfg``, ``shift``, ``seed``, ``negative_prompt``); ``memory`` and what follows it are
    the `LiveModel`'s. ``.expression`` is what the controls say, and *Save recipe* writes it for
    ``alkahest merge --recipe``. Raises AlgebraError if something is no delta.
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
    rows = [
        _Row(name, delta, float(starts.get(name, 1.0)), (0.1, 1000.0), True, parts) for name, delta in deltas.items()
    ]
    rows += [_Row(name, lora, 0.0, (0.0, 2.0), False, parts) for name, lora in (loras or {}).items()]
    live = LiveModel(bridge, components, memory=memory, dtype=dtype, storage=storage, device=device, offload=offload)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    return LiveMerge(bridge, rows, texts, live, protect, dict(sampling or {}), look)


class _Row(widgets.VBox):  # type: ignore[misc]
    """One delta's multiplier, and one for each of its parts behind a checkbox."""

    def __init__(
        self, name: str, delta: Delta, k: float, bounds: tuple[float, float], log: bool, parts: Sequence[str]
    ) -> None:
        self.delta, self.name = delta, name
        number = NumberSlider(f"k of {name}" if log else f"strength of {name}", k, *bounds, log)
        self.k = number.box
        parts = parts or list(dict.fromkeys(delta.family.part_of(key).split(".")[0] for key in delta.shapes))
        self.parts = {
            part: widgets.FloatText(value=1.0, description=f"{name}: {part} x", style=STYLE, layout=WIDE)
            for part in parts
        }
        self.by_part = widgets.Checkbox(value=False, description=f"{name}: by part", style=STYLE, indent=False)
        box = widgets.VBox(list(self.parts.values()), layout=widgets.Layout(display="none"))
        self.by_part.observe(lambda change: setattr(box.layout, "display", None if change["new"] else "none"), "value")
        super().__init__([number, self.by_part, box])

    @property
    def controls(self) -> list[Any]:
        return [self.k, self.by_part, *self.parts.values()]

    @property
    def scaled(self) -> Delta | None:
        """The delta times what the boxes say; None at 0."""
        if self.k.value == 0:
            return None
        factors = {part: box.value for part, box in self.parts.items() if box.value != 1} if self.by_part.value else {}
        delta = self.delta.scaled(factors) if factors else self.delta
        return delta * float(self.k.value)


class LiveMerge(Panel):
    """See `live_merge`. ``images`` and ``measures`` are those of the picture shown, ``kept`` a row for each kept
    one.
    """

    def __init__(
        self,
        bridge: Weights,
        rows: list[_Row],
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
        self._kept: list[dict[str, Any]] = []
        self._redraw = Redraw(self._draw_picture, self.alert)
        self.protect = widgets.Checkbox(
            value=True,
            description=f"protect {', '.join(bridge.protection) or protect}",
            disabled=bool(bridge.protection),
            style=STYLE,
            indent=False,
        )
        self.settings = _sampling_controls(prompts, sampling)
        self._fixed = {name: value for name, value in sampling.items() if name not in self.settings}
        self._arrange()
        for control in [self.protect, *self.settings.values(), *(c for row in rows for c in row.controls)]:
            control.observe(lambda _: self._redraw.request(), names="value")
        self._redraw.now()

    @property
    def expression(self) -> Weights:
        """What the controls say: what is drawn, and what a recipe records."""
        whole = self.bridge
        if self.protect.value and not whole.protection:
            whole = whole.protect(self._pattern)
        for row in self.rows:
            if (delta := row.scaled) is not None:
                whole = whole + delta
        return whole

    @property
    def kept(self) -> pd.DataFrame:
        """Recipe text and measures of what was kept."""
        return pd.DataFrame([{"recipe": one["recipe"], **one["measures"]} for one in self._kept])

    def wait(self, seconds: float | None = None) -> None:
        """Block until the picture follows the controls; for scripts and tests."""
        self._redraw.wait(seconds)

    def cancel(self) -> None:
        """Stop drawing; the picture that was there stays."""
        self._redraw.cancel()
        self.say("cancelled")

    def keep(self) -> None:
        """Put the picture aside, to compare with what comes."""
        if self.images:
            self._kept.append({"recipe": self._shown.text(), "png": self._png, "measures": self.measures})
            self._set_beside()

    def forget(self) -> None:
        """Drop what was kept."""
        self._kept.clear()
        self._set_beside()

    def _arrange(self) -> None:
        self.bar = widgets.FloatProgress(min=0.0, max=1.0)
        self.cancel_button = widgets.Button(description="Cancel", disabled=True, tooltip="Stop drawing")
        keep = widgets.Button(description="Keep", tooltip="Put this picture aside, to compare")
        forget = widgets.Button(description="Forget kept", tooltip="Drop the pictures that were kept")
        for button, pressed in ((self.cancel_button, self.cancel), (keep, self.keep), (forget, self.forget)):
            button.on_click(lambda _, pressed=pressed: pressed())
        self.table, self.comparison = widgets.HTML(), widgets.HTML()
        self.recipe_path = widgets.Text(value="merge.json", description="recipe file", style=STYLE)
        self.model_path = widgets.Text(value="merged.safetensors", description="model file", style=STYLE)
        self.save_recipe = Job(self._recipe_saved, title="Save recipe")
        self.save_model = Job(lambda: self.expression.stream(self.model_path.value), unit="B", title="Save model")
        self.children = [
            widgets.HBox([*self.rows, widgets.VBox([self.protect, *list(self.settings.values())[2:]])], layout=_WRAP),
            widgets.HBox(list(self.settings.values())[:2], layout=_WRAP),
            widgets.HBox([self.cancel_button, keep, forget, self.bar]),
            widgets.HBox([self.picture, self.table], layout=_WRAP),
            self.status,
            self.comparison,
            widgets.HBox([self.recipe_path, self.save_recipe], layout=_WRAP),
            widgets.HBox([self.model_path, self.save_model], layout=_WRAP),
        ]

    def _draw_picture(self) -> Iterator[None]:
        self.cancel_button.disabled = False
        held = False
        try:
            while not (held := _DRAWING.acquire(timeout=0.1)):
                self.say("waiting: another live merge is drawing")
                yield
            with self.live.lock:
                yield from self._sample_picture(time.monotonic())
        finally:
            if held:
                _DRAWING.release()
            self.bar.value, self.cancel_button.disabled = 0.0, True
            if self._png:
                self.show(self._png, self.alt)  # a preview may be in its place

    def _sample_picture(self, started: float) -> Iterator[None]:
        wanted, shown = self.expression, started
        values = {name: control.value for name, control in self.settings.items() if name != "prompts"}
        prompts = lines_of(self.settings["prompts"])
        change = self.live.become(wanted)
        yield
        run = sample(self.live, prompts, **values, **self._fixed)
        previews: list[Image] = []
        for step in run:
            self.bar.value = step.done / step.total
            if time.monotonic() - shown > _PREVIEW and step.result is None:
                shown, previews = time.monotonic(), step.previews()
                self.picture.value = image_tag(strip(previews), "preview of what is being drawn")
            yield
        images = run.images
        measures = {name: float(value) for name, value in self._look(images).mean(numeric_only=True).items()}
        picture, pictured = strip(images), "; ".join(f"{number}. {text}" for number, text in enumerate(prompts, 1))
        # All at once, so that what is kept belongs together.
        self.images, self._shown, self.measures = images, wanted, measures
        self.show(picture, f"{wanted.text()}: {pictured}")
        self._set_beside()
        took = (
            f"{change.tensors} tensors rewritten in {change.seconds:.2f} s, drawn in {time.monotonic() - started:.1f} s"
        )
        self.say("\n".join([wanted.text(), took, *wanted.protection_notes()]))

    def _set_beside(self) -> None:
        columns = {"now": self.measures} | {f"kept {n}": one["measures"] for n, one in enumerate(self._kept, 1)}
        self.table.value = pd.DataFrame(columns).to_html(float_format="{:.4g}".format, border=0)
        figures = [
            f"<figure style='margin:0.5em 0'>{image_tag(one['png'], one['recipe'])}<figcaption>kept {number}: "
            f"<code>{html.escape(one['recipe'])}</code></figcaption></figure>"
            for number, one in enumerate(self._kept, 1)
        ]
        self.comparison.value = "".join(figures)

    def _recipe_saved(self) -> Iterator[Event]:
        expression, path = self.expression, expanded(self.recipe_path.value, "save")
        if path.suffix != ".json":
            raise OutputError("save recipe", "a recipe is a .json file", file=path, fix=str(path.with_suffix(".json")))
        readers, hashes = readers_of(expression), {}
        for number, reader in enumerate(readers):
            yield Event(number, len(readers), reader.path.name)
            (hashes[reader],) = blake3_of([reader])
        write_text(path, recipe_of(expression, Options(), hashes).to_json() + "\n")
        yield Event(len(readers), len(readers), path.name, path)


def _sampling_controls(prompts: list[str], given: dict[str, Any]) -> dict[str, Any]:
    style: dict[str, Any] = {"style": STYLE, "continuous_update": False}
    return {
        "prompts": text_lines("prompts, one a line", prompts, continuous_update=False),
        "negative_prompt": text_lines("negative prompt", [given.get("negative_prompt", "")], continuous_update=False),
        "seed": widgets.IntText(value=given.get("seed", 0), description="seed", layout=WIDE, **style),
        "steps": widgets.IntText(value=given.get("steps", 24), description="steps", layout=WIDE, **style),
        "cfg": widgets.FloatText(value=given.get("cfg", 2.0), description="cfg", layout=WIDE, **style),
        "shift": widgets.FloatText(value=given.get("shift", 3.0), description="shift", layout=WIDE, **style),
    }

"""What a judgement by pictures stands on: pictures of the new thing, and ordinary ones of everything else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alkahest import mini
from alkahest.algebra.weights import Weights
from alkahest.engine.events import Event
from alkahest.errors import AlgebraError, MismatchError
from alkahest.mini.scenes import held_out_prompts
from alkahest.pictures.dataset import NOTES, from_folder
from alkahest.pictures.encoded import fit, latents_of
from alkahest.pictures.evaluation import EvaluationSet
from alkahest.pictures.live import LiveModel
from alkahest.pictures.sampler import embed, sample, size_of_latents
from alkahest.pictures.settings import SHIFT
from alkahest.pictures.sheet import row_of_pictures

if TYPE_CHECKING:
    from PIL.Image import Image

_ALIKE = 4  # prompts below which pictures are much alike
FEW = 8  # pictures below which a judgement says that it has few
# What takes less memory, for where it ran out.
LESS_MEMORY = "batch=1, storage='fp8_e4m3fn' (half of bf16's 12.3 GB), offload=True, or width=512, height=512"
# What any text-to-image model draws: no style, no name, nothing that a derivative would have been made for.
ORDINARY = (
    "a photo of a street in a small town in the morning",
    "a bowl of fruit on a wooden table",
    "a woman reading a newspaper in a cafe",
    "a mountain lake under a cloudy sky",
    "a brown dog running on a beach",
    "an old man in a blue jacket, portrait",
    "a kitchen with white cupboards and a kettle",
    "a red bicycle leaning against a brick wall",
    "a forest path in autumn",
    "two children playing football in a park",
    "a glass of water on a desk beside a laptop",
    "a city skyline at night",
    "a black cat asleep on a sofa",
    "a wheat field at sunset",
    "a train arriving at a station in the rain",
    "a young man in a white shirt, looking at the camera",
    "a wooden boat on a calm river",
    "a market stall with vegetables",
    "a snowy village with lit windows",
    "a yellow flower in front of a green meadow",
    "a library with tall shelves",
    "a horse standing by a fence",
    "a plate of pasta with tomato sauce",
    "an empty road through a desert",
)


@dataclass(frozen=True)
class PictureOptions:
    """What is drawn or given, and how the model that looks at it is held; `ak.needed_multiplier` says what each is."""

    prompts: Sequence[str] | None = None
    pictures: Any = None
    ordinary: Sequence[str] | None = None
    components: Any = None
    count: int = 24
    seed: int = 0
    steps: int = 12
    cfg: float = 2.0
    shift: float = SHIFT
    width: int | None = None
    height: int | None = None
    batch: int | None = None
    memory: int | str = "2GB"
    dtype: str | None = None
    storage: str | None = None
    device: str = "cpu"
    offload: bool = False

    def require(self, operation: str, with_ordinary: bool = True) -> PictureOptions:
        """Return self, or raise AlgebraError for what could not be drawn from, or would be passed over.

        Without ordinary pictures, nothing is drawn beside pictures that are given.
        """
        if self.prompts is None and self.pictures is None:
            raise AlgebraError(
                operation,
                "pictures of what the variant learned are needed, or prompts to have it draw them",
                fix="prompts=['a cyan ball on a beach', ...], or pictures='folder' with a caption beside each",
            )
        if isinstance(self.prompts, str) or (self.prompts is not None and not len(self.prompts)):
            raise AlgebraError(operation, "prompts are a list of texts, at least one", found=repr(self.prompts)[:80])
        if self.ordinary is not None and (isinstance(self.ordinary, str) or not len(self.ordinary)):
            raise AlgebraError(operation, "ordinary is a list of texts, at least one", found=repr(self.ordinary)[:80])
        if self.pictures is not None and self.count != PictureOptions.count:
            raise AlgebraError(
                operation, "pictures that are given are all taken: count is for drawn ones", fix="leave it out"
            )
        drawing = {"steps", "cfg", "shift"} & set(self.set_apart_from())
        if self.pictures is not None and not with_ordinary and drawing:
            raise AlgebraError(
                operation,
                f"nothing is drawn where pictures are given: {', '.join(sorted(drawing))} would mean nothing",
                fix="leave out",
            )
        if self.count < 1:
            raise AlgebraError(operation, "at least one picture is needed", found=self.count)
        return self

    def set_apart_from(self, **known: Any) -> dict[str, Any]:
        """What was set to something other than its default, and to what, but for ``known`` ones."""
        default = PictureOptions(**known)
        named = {one.name: getattr(self, one.name) for one in fields(self)}
        return {
            name: value
            for name, value in named.items()
            if value is not getattr(default, name) and value != getattr(default, name)
        }

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings of `ak.sample`."""
        names = ("steps", "cfg", "shift", "width", "height")
        return {name: getattr(self, name) for name in names}

    @property
    def held(self) -> dict[str, Any]:
        """The options of `ak.LiveModel`."""
        return {name: getattr(self, name) for name in ("memory", "dtype", "storage", "device", "offload")}


@dataclass(frozen=True)
class Evidence:
    """Pictures of the new thing and ordinary ones, as sets that models are compared on, and what was odd about them."""

    new: EvaluationSet
    rest: EvaluationSet
    pictures: Mapping[str, Sequence[Image]] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()


def drawn_set(pipe: Any, prompts: Sequence[str], name: str, options: PictureOptions) -> Iterator[Event]:
    """Have a model draw ``count`` pictures of prompts in turn; the result is the set and its pictures."""
    texts = [prompts[number % len(prompts)] for number in range(options.count)]
    latents, images = [], []
    total = options.count * options.steps
    for step in sample(pipe, texts, seed=options.seed, batch=batch_of(pipe, options), **options.sampling):
        if step.result is not None:
            latents.append(step.latents.float().cpu())
            images += step.result
        done = min(total, step.done * total // step.total)
        yield Event(done, total, f"drawing {name}, {step.key}", so_far=partial(row_of_pictures, images))
    captions = [embed(pipe, text) for text in texts]
    yield Event(total, total, name, (EvaluationSet(torch.cat(latents), captions, options.seed, name=name), images))


def given_set(
    pipe: Any, name: str, options: PictureOptions, operation: str
) -> tuple[EvaluationSet, list[Image], list[str]]:
    """Pictures with captions that are there already, cropped to one size; and what was left out, in words.

    MismatchError for pictures without captions. FileFormatError for a folder that holds none.
    """
    if isinstance(options.pictures, (str, Path)):
        if options.prompts is not None:
            raise AlgebraError(operation, "a folder brings its own captions", fix="leave prompts out")
        dataset = from_folder(options.pictures)
        images, captions = [one.open() for one in dataset.examples], [one.caption for one in dataset.examples]
        notes = [f"{len(dataset.skipped)} pictures were left out: {'; '.join(sorted(set(dataset.skipped.values())))}"]
        notes = notes if dataset.skipped else []
        done = Counter(note for image in images for note in image.info.get(NOTES, ()))
        done.update(dataset.notes.values())
        notes += [f"{count} pictures: {note}" for note, count in done.items()]
    else:
        images, captions, notes = list(options.pictures), list(options.prompts or ()), []
    if len(images) != len(captions) or not images:
        raise MismatchError(
            operation,
            "each picture needs its caption",
            expected=f"{len(images)} prompts, one for each picture in order",
            found=f"{len(captions)} prompts",
            fix="prompts=[...], or pictures='folder' with a .txt beside each picture",
        )
    height, width = size_of_latents(pipe, options.width, options.height)
    size = (height * pipe.vae_scale_factor, width * pipe.vae_scale_factor)
    cropped = sum(image.width * size[0] != image.height * size[1] for image in images)
    notes += [f"{cropped} pictures were cropped to {size[1]} x {size[0]}"] if cropped else []
    fitted = [fit(image.convert("RGB"), size) for image in images]
    batch = batch_of(pipe, options)
    latents = [latents_of(pipe.vae, fitted[first : first + batch]) for first in range(0, len(fitted), batch)]
    found = EvaluationSet(torch.cat(latents), [embed(pipe, text) for text in captions], options.seed, name=name)
    return found, fitted, notes


def ordinary_prompts(on: Weights, options: PictureOptions) -> Sequence[str]:
    """Prompts of everything else: those given, the miniature world's own for a miniature, or `ORDINARY`."""
    if options.ordinary is not None:
        return options.ordinary
    if mini.is_miniature(on.leading.architecture):
        return [scene.caption() for scene in held_out_prompts(options.count, seed=7)]
    return ORDINARY


def batch_of(pipe: Any, options: PictureOptions) -> int:
    """Pictures at a time: as asked for, or about a megapixel and a half."""
    if options.batch is not None:
        return options.batch
    height, width = size_of_latents(pipe, options.width, options.height)
    return max(1, min(96, 24576 // (height * width)))


def stream_examples(pipe: Any, name: str, options: PictureOptions, operation: str) -> Iterator[Event]:
    """Pictures that are given, or that a pipeline's model draws: the result is (set, its pictures, notes on them)."""
    if options.pictures is not None:
        yield Event(1, 1, name, given_set(pipe, name, options, operation))
        return
    for event in drawn_set(pipe, list(options.prompts or ()), name, options):
        yield event if event.result is None else replace(event, result=(*event.result, []))


def stream_evidence(
    live: LiveModel, variant: Weights, on: Weights, options: PictureOptions, operation: str
) -> Iterator[Event]:
    """Both sets: the variant draws the new thing (or its pictures are given), the bridge as many of everything else.

    The live model is left holding ``on``; the result is `Evidence`.
    """
    pictures: dict[str, Sequence[Image]] = {}
    if options.pictures is None:
        live.become(variant)
    for event in stream_examples(live.pipe, "the new thing", options, operation):
        yield event.moved(event.done, 2 * event.total)
    new, pictures["new"], notes = event.result
    options = options if options.pictures is None else replace(options, count=len(new))
    ordinary = ordinary_prompts(on, options)
    asked = set(options.prompts or ())
    if asked and len(asked) < _ALIKE and len(new) > len(asked):
        notes.append(f"drawn from {len(asked)} prompt{'s' if len(asked) > 1 else ''}: others may say otherwise")
    if both := asked & set(ordinary):
        notes.append(f"{len(both)} of the ordinary prompts ask for the new thing too: its cost shows less")
    live.become(on)
    for event in drawn_set(live.pipe, ordinary, "everything else", options):
        yield event.moved(event.total + event.done, 2 * event.total)
    rest, pictures["rest"] = event.result
    yield Event(event.total, event.total, "drawn", Evidence(new, rest, pictures, tuple(notes)))

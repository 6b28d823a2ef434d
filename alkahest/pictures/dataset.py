"""Pictures with captions to train on: from folders, from the miniature world, or drawn by models themselves."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alkahest.engine.events import Event, result_of
from alkahest.errors import AlkahestError, FileFormatError, printable, refuse_unknown_options
from alkahest.files.hashes import blake3_of
from alkahest.files.paths import expanded
from alkahest.files.reader import Reader
from alkahest.files.whole import write_file
from alkahest.mini.drawing import draw
from alkahest.mini.scenes import Choice, scenes
from alkahest.pictures.captions import TABLES, beside, read_tables
from alkahest.pictures.fingerprints import fingerprint
from alkahest.pictures.picture_files import FORMATS, read_picture
from alkahest.pictures.sampler import sample
from alkahest.pictures.settings import SHIFT
from alkahest.pictures.sheet import row_of_pictures

if TYPE_CHECKING:
    from PIL.Image import Image

NOTES = "alkahest notes"  # of an opened picture's info: what was done to it
_KEY = "alkahest"  # of a drawn PNG's text: what it depends on
# Endings of what lies beside pictures without being one.
_OTHERS = frozenset(
    [
        ".txt",
        ".caption",
        ".json",
        ".jsonl",
        ".csv",
        ".tsv",
        ".md",
        ".toml",
        ".yaml",
        ".yml",
        ".npz",
        ".npy",
        ".safetensors",
        ".html",
        ".log",
        ".ini",
        ".db",
        ".py",
        ".xml",
    ]
)


@dataclass(frozen=True)
class Example:
    """A picture and its caption; ``identity`` stands for the picture's content, ``open`` reads it."""

    name: str
    caption: str
    identity: str
    open: Callable[[], Image] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Dataset:
    """Examples, what was left out with the reason, and what to know of some that were not."""

    name: str
    examples: Sequence[Example]
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.examples)

    def __repr__(self) -> str:
        lines = [f"{self.name}: {len(self)} pictures with captions"]
        for what, files in (("skipped", self.skipped), ("noted", self.notes)):
            reasons: dict[str, list[str]] = {}
            for name, reason in files.items():
                reasons.setdefault(reason, []).append(name)
            lines += [
                f"  {len(names)} {what}: {reason} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                for reason, names in reasons.items()
            ]
        return printable("\n".join(lines))


@refuse_unknown_options
def from_folder(folder: str | Path, *, strict: bool = False, background: str = "white", frame: int = 0) -> Dataset:
    """Pictures of a folder and the folders in it, with a caption in a ``.txt`` beside each, or in a metadata table.

    >>> from_folder("people")
    people: 412 pictures with captions
      3 skipped: no caption (a.png, b.png, c.jpg)

    Beside a picture ``.txt``, ``.caption`` or ``.json`` are looked for, in this order; tables are ``metadata`` or
    ``captions`` in ``.jsonl``, ``.csv``, ``.tsv`` or ``.json``, with a column of file names and one of captions, as
    Hugging Face's image folders and other trainers have them. Transparency is laid on ``background``, of animations
    ``frame`` is taken. What is left out is told in ``skipped``, by file and reason, or refused with ``strict``. Raises
    FileFormatError if the folder is missing, or holds no picture with a caption.
    """
    path = expanded(folder, "dataset")
    if not path.is_dir():
        raise FileFormatError("dataset", "no such folder", file=path, fix="name a folder of pictures")
    _require_colour(background)
    table = read_tables(path)
    examples: list[Example] = []
    skipped: dict[str, str] = {}
    notes: dict[str, str] = {}
    used: set[str] = set()
    for picture in sorted(path.rglob("*")):
        name = picture.relative_to(path).as_posix()
        why = _why_not(picture)
        if why is not None:
            skipped |= {name: why} if why else {}
            continue
        used.add(name)
        own = beside(picture)
        caption, note = own.caption, own.note
        if name in table.captions:
            caption = table.captions[name]
            note = (
                f"that of {table.of[name]} is taken; one beside it says otherwise" if own.caption != caption else None
            )
            note = note if own.caption else None
        if not caption:
            skipped[name] = own.problem or "no caption"
            continue
        if note:
            notes[name] = f"two captions: {note}"
        how = partial(_open, picture, background, frame)
        examples.append(Example(name, caption, "", how))
    skipped |= {row: f"a row of {of} names no picture" for row, of in table.of.items() if row not in used}
    skipped |= dict.fromkeys(_alone(path), "a caption without its picture")
    if not examples or (strict and skipped):
        raise _left_out(path, skipped, bool(examples))
    readers = [Reader(path / example.name) for example in examples]
    hashes = blake3_of(readers)
    ground = "" if (background, frame) == ("white", 0) else f" {background} {frame}"
    named = [Example(e.name, e.caption, digest + ground, e.open) for e, digest in zip(examples, hashes, strict=True)]
    return Dataset(path.name, named, skipped, notes)


def _alone(folder: Path) -> Iterator[str]:
    """Files of captions beside which there is no picture of that name, of any kind."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    named = {
        (path.parent, stem) for path in found if path.suffix.lower() not in _OTHERS for stem in (path.stem, path.name)
    }
    for path in found:
        is_caption = path.suffix.lower() in (".txt", ".caption") and path.stem.lower() not in ("readme", "license")
        if is_caption and (path.parent, path.stem) not in named:
            yield path.relative_to(folder).as_posix()


def _why_not(path: Path) -> str | None:
    """Why a file is no picture that can be taken: None for one that can, nothing for what is no picture at all."""
    if path.is_symlink() and not path.exists():
        return "a link that leads nowhere"
    if path.is_dir() or any(part.startswith(".") for part in path.parts[-1:]):
        return ""
    suffix = path.suffix.lower()
    if suffix in FORMATS:
        if not path.is_file():
            return "not a regular file"
        return "empty file" if path.stat().st_size == 0 else None
    if suffix in _OTHERS or path.name.lower() in ("thumbs.db", "license", "readme"):
        return ""
    return f"unknown ending {suffix}" if suffix else "no ending"


def _left_out(path: Path, skipped: Mapping[str, str], some: bool) -> FileFormatError:
    reasons = Counter(skipped.values())
    found = "; ".join(f"{count}: {why}" for why, count in reasons.most_common(4)) or "no pictures"
    first = next(iter(skipped), None)
    return FileFormatError(
        "dataset",
        "pictures are left out, which strict refuses" if some else "there are no pictures with captions",
        file=path,
        key=first,
        expected=f"{', '.join(FORMATS)} with a .txt beside each, or {TABLES[0]}",
        found=found,
        fix="mend them, or leave strict out" if some else None,
    )


def _require_colour(background: str) -> None:
    from PIL import ImageColor

    try:
        ImageColor.getrgb(background)
    except (ValueError, AttributeError, TypeError):
        raise FileFormatError(
            "dataset", "background is a colour", found=repr(background)[:60], fix="background='white', or '#808080'"
        ) from None


@refuse_unknown_options
def from_scenes(
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
) -> Dataset:
    """Scenes of the miniature world with their training captions; the choices are those of
    `alkahest.mini.scenes.scenes`.

    >>> from_scenes(2000, seed=1, style="anime", subject=("man", "woman"))
    """
    choices = {
        "subject": subject,
        "colour": colour,
        "place": place,
        "light": light,
        "side": side,
        "quality": quality,
        "style": style,
    }
    drawn = list(scenes(count, seed, held_out, **choices))
    given = {"held_out": held_out or None, **choices}
    what = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
    examples = [
        Example(
            f"scene {number}",
            scene.training_caption(),
            hashlib.blake2b(repr(scene).encode(), digest_size=16).hexdigest(),
            partial(_draw, scene),
        )
        for number, scene in enumerate(drawn)
    ]
    return Dataset(f"scenes ({what})" if what else "scenes", examples)


@refuse_unknown_options
@refuse_unknown_options
def make_dataset(
    models: Mapping[str, Any],
    prompts: Sequence[str],
    folder: str | Path,
    *,
    batch: int = 8,
    negative_prompt: str = "",
    steps: int = 24,
    cfg: float = 2.0,
    shift: float = SHIFT,
    schedule: str = "diffusers",
    cfg_normalization: float = 0.0,
    width: int | None = None,
    height: int | None = None,
) -> Dataset:
    """Have models draw a dataset, each every prompt.

    >>> make_dataset({"turbo": turbo, "base": base}, prompts, "drawn", steps=8)

    ``models`` are pipelines or (pipeline, settings of `ak.sample`) by name; the other settings are
    for all that name none of their own. Writes ``NAME-00000.png`` and ``.txt``; pictures that are there are not
    drawn again if model, prompt, seed and settings are those that they were drawn with, and are drawn anew if not.
    What else lies in the folder is no part of the dataset. Raises AlkahestError without prompts.
    """
    events = stream_make_dataset(
        models,
        prompts,
        folder,
        batch=batch,
        negative_prompt=negative_prompt,
        steps=steps,
        cfg=cfg,
        shift=shift,
        schedule=schedule,
        cfg_normalization=cfg_normalization,
        width=width,
        height=height,
    )
    found: Dataset = result_of(events, "make_dataset")
    return found


def stream_make_dataset(
    models: Mapping[str, Any],
    prompts: Sequence[str],
    folder: str | Path,
    *,
    batch: int = 8,
    negative_prompt: str = "",
    steps: int = 24,
    cfg: float = 2.0,
    shift: float = SHIFT,
    schedule: str = "diffusers",
    cfg_normalization: float = 0.0,
    width: int | None = None,
    height: int | None = None,
) -> Iterator[Event]:
    """`make_dataset` as a generator of events."""
    path = expanded(folder, "dataset")
    if not prompts:
        raise AlkahestError("make_dataset", "there are no prompts", fix="a file with a prompt a line")
    path.mkdir(parents=True, exist_ok=True)
    wanted: list[str] = []
    seen: list[Image] = []
    how = {
        "negative_prompt": negative_prompt,
        "steps": steps,
        "cfg": cfg,
        "shift": shift,
        "schedule": schedule,
        "cfg_normalization": cfg_normalization,
        "width": width,
        "height": height,
    }
    total, done = len(models) * len(prompts), 0
    for name, model in models.items():
        pipe, its = model if isinstance(model, tuple) else (model, {})
        of = " ".join(fingerprint(getattr(pipe, part)) for part in ("transformer", "text_encoder", "vae"))
        keys = [_drawn_key(of, prompt, n, {**how, **its}) for n, prompt in enumerate(prompts)]
        wanted += [f"{name}-{n:05}.png" for n in range(len(prompts))]
        for first in range(0, len(prompts), batch):
            numbers = range(first, min(first + batch, len(prompts)))
            missing = [n for n in numbers if not _is_drawn(path / f"{name}-{n:05}", keys[n], prompts[n])]
            if missing:
                drawn = sample(
                    pipe, [prompts[n] for n in missing], **{**how, **its, "seed": missing, "batch": batch}
                ).images
                seen = [*seen, *drawn][-8:]
                for number, image in zip(missing, drawn, strict=True):
                    buffer = io.BytesIO()
                    image.save(buffer, "PNG", pnginfo=_png_text(keys[number]))
                    # The caption last: a picture counts as drawn when it has one.
                    write_file(path / f"{name}-{number:05}.png", buffer.getvalue())
                    write_file(path / f"{name}-{number:05}.txt", prompts[number].encode())
            done += len(numbers)
            yield Event(done, total, name, so_far=partial(row_of_pictures, seen))
    found = from_folder(path)
    mine = [example for example in found.examples if example.name in set(wanted)]
    other = {e.name: "not of this dataset: it was in the folder" for e in found.examples if e.name not in set(wanted)}
    yield Event(total, total, "done", Dataset(path.name, mine, {**found.skipped, **other}, found.notes))


def _drawn_key(of: str, prompt: str, seed: int, settings: Mapping[str, Any]) -> str:
    """What a drawn picture depends on: the model, the prompt, the seed and every setting."""
    text = json.dumps([of, prompt, seed, sorted((name, str(value)) for name, value in settings.items())])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _png_text(key: str) -> Any:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(_KEY, key)
    return info


def _is_drawn(stem: Path, key: str, prompt: str) -> bool:
    """Whether the picture of this name, and its caption, are those that would be drawn now."""
    from PIL import Image

    try:
        with Image.open(stem.with_suffix(".png"), formats=["PNG"]) as image:
            known = image.info.get(_KEY)
        return known == key and stem.with_suffix(".txt").read_bytes() == prompt.encode()
    except (OSError, ValueError, SyntaxError):
        return False


def _open(path: Path, background: str, frame: int) -> Image:
    image, notes = read_picture(path, background, frame)
    image.info[NOTES] = notes
    return image


def _draw(scene: Any) -> Image:
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.rint(draw(scene) * 255).astype(np.uint8))

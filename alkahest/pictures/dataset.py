"""Pictures with captions to train on: from folders, from the miniature world, or drawn by models themselves."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alkahest.engine.events import Event
from alkahest.errors import AlkahestError, FileFormatError, refuse_unknown_options
from alkahest.files.hashes import blake3_of
from alkahest.files.paths import expanded
from alkahest.files.reader import Reader
from alkahest.files.whole import write_file
from alkahest.mini.drawing import draw
from alkahest.mini.scenes import Choice, scenes
from alkahest.pictures.sampler import sample
from alkahest.pictures.settings import SHIFT

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_TABLES = ("metadata.jsonl", "metadata.csv")
_CAPTIONS = ("text", "caption", "prompt")  # columns that a metadata table may keep them in
_MAX_CAPTION = 1 << 16  # bytes of a caption file


@dataclass(frozen=True)
class Example:
    """A picture and its caption; ``identity`` stands for the picture's content, ``open`` reads it."""

    name: str
    caption: str
    identity: str
    open: Callable[[], Image] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Dataset:
    """Examples, and what was left out with the reason."""

    name: str
    examples: Sequence[Example]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.examples)

    def __repr__(self) -> str:
        lines = [f"{self.name}: {len(self)} pictures with captions"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        lines += [
            f"  {len(names)} skipped: {reason} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for reason, names in reasons.items()
        ]
        return "\n".join(lines)


def from_folder(folder: str | Path) -> Dataset:
    """Pictures of a folder and the folders in it, with a caption in a ``.txt`` beside each, or in a metadata table.

    >>> from_folder("people")
    people: 412 pictures with captions

    The table is ``metadata.jsonl`` or ``metadata.csv`` with ``file_name`` and ``text`` (or ``caption``, ``prompt``), as
    Hugging Face's image folders. Pictures without a caption are skipped and reported. Raises
    FileFormatError if the folder is missing or holds no picture with a caption.
    """
    path = expanded(folder, "dataset")
    if not path.is_dir():
        raise FileFormatError("dataset", "no such folder", file=path, fix="name a folder of pictures")
    told = _table(path)
    examples, skipped = [], {}
    for picture in sorted(one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES and one.is_file()):
        name = picture.relative_to(path).as_posix()
        caption = told.get(name) or _beside(picture)
        if not caption:
            skipped[name] = "no caption"
            continue
        examples.append(Example(name, caption, "", partial(_open, picture)))
    if not examples:
        found = f"{len(skipped)} pictures without a caption" if skipped else "no pictures"
        raise FileFormatError(
            "dataset",
            "there are no pictures with captions",
            file=path,
            expected=f"{', '.join(SUFFIXES)} with a .txt beside each, or {_TABLES[0]}",
            found=found,
        )
    readers = [Reader(path / example.name) for example in examples]
    hashes = blake3_of(readers)
    named = [Example(e.name, e.caption, digest, e.open) for e, digest in zip(examples, hashes, strict=True)]
    return Dataset(path.name, named, skipped)


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
) -> Iterator[Event]:
    """Have models draw a dataset, each every prompt: a generator of events; the result is the `Dataset`.

    >>> for event in make_dataset({"turbo": turbo, "base": base}, prompts, "drawn", steps=8): print(event)

    ``models`` are pipelines or (pipeline, settings of `ak.sample`) by name; the other settings are
    for all that name none of their own. Writes ``NAME-00000.png`` and ``.txt``; pictures that are there are not
    drawn again.
    """
    path = expanded(folder, "dataset")
    if not prompts:
        raise AlkahestError("make_dataset", "there are no prompts", fix="a file with a prompt a line")
    path.mkdir(parents=True, exist_ok=True)
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
        for first in range(0, len(prompts), batch):
            numbers = range(first, min(first + batch, len(prompts)))
            missing = [n for n in numbers if not (path / f"{name}-{n:05}.txt").exists()]
            if missing:
                drawn = sample(
                    pipe, [prompts[n] for n in missing], **{**how, **its, "seed": missing, "batch": batch}
                ).images
                for number, image in zip(missing, drawn, strict=True):
                    buffer = io.BytesIO()
                    image.save(buffer, "PNG")
                    # The caption last: a picture counts as drawn when it has one.
                    write_file(path / f"{name}-{number:05}.png", buffer.getvalue())
                    write_file(path / f"{name}-{number:05}.txt", prompts[number].encode())
            done += len(numbers)
            yield Event(done, total, name)
    yield Event(total, total, "done", from_folder(path))


def _table(folder: Path) -> dict[str, str]:
    """Captions by file name, from the first metadata table that is there."""
    for name in _TABLES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            with path.open(encoding="utf-8", newline="") as lines:
                rows = (
                    [json.loads(line) for line in lines if line.strip()]
                    if path.suffix == ".jsonl"
                    else list(csv.DictReader(lines))
                )
            return {
                str(row["file_name"]): str(next(row[column] for column in _CAPTIONS if row.get(column)))
                for row in rows
                if any(map(row.get, _CAPTIONS))
            }
        except (ValueError, KeyError, TypeError, AttributeError, csv.Error, RecursionError) as error:
            raise FileFormatError(
                "dataset",
                "the metadata table cannot be read",
                file=path,
                expected=f"file_name and one of {', '.join(_CAPTIONS)}",
                found=error,
            ) from None
    return {}


def _beside(picture: Path) -> str:
    path = picture.with_suffix(".txt")
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return file.read(_MAX_CAPTION).decode(errors="replace").strip()


def _open(path: Path) -> Image:
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        image.load()
        return ImageOps.exif_transpose(image).convert("RGB")


def _draw(scene: Any) -> Image:
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.rint(draw(scene) * 255).astype(np.uint8))

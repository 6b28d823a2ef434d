"""The checkpoint picker: what lies in a folder, what each file's header says, and which lineage it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from alkahest.algebra.weights import Weights
from alkahest.engine.events import Event
from alkahest.errors import AlkahestError
from alkahest.files.paths import expanded
from alkahest.files.reader import size_text
from alkahest.lab.jobs import Job
from alkahest.lab.panel import STYLE, note_html, reason_of
from alkahest.measure.lineage import stream_nearest_base
from alkahest.sources.checkpoint import Checkpoint
from alkahest.sources.checkpoint import open as open_checkpoint

_DEPTH, _MOST, _ENTRIES = 4, 500, 20_000  # folders deep, checkpoints listed, files looked at: a disk is not searched
_WIDE = widgets.Layout(width="98%")


def checkpoint_picker(folder: str | Path = ".", bases: Mapping[str, Weights] | None = None) -> CheckpointPicker:
    """Choose a checkpoint among a folder's: its header at once, and on request which base it was trained from.

    Parameters
    ----------
    folder : str or path, default "."
        Where single files, sharded ones and diffusers folders are looked for.
    bases : mapping of str to Weights, optional
        Candidates for the base, beside the files marked in the second list; the nearest is the base, in one pass over
        both.

    Returns
    -------
    CheckpointPicker
        ``.checkpoint`` is the chosen one, opened.

    Examples
    --------
    >>> picker = panels.checkpoint_picker("~/ComfyUI/models/diffusion_models", bases={"base": base, "turbo": turbo})
    >>> picker.checkpoint
    """
    return CheckpointPicker(Path(folder), dict(bases or {}))


class CheckpointPicker(widgets.VBox):  # type: ignore[misc]
    """See `checkpoint_picker`. ``value`` is the path chosen, ``lineage`` what `nearest_base` found."""

    def __init__(self, folder: Path, bases: Mapping[str, Weights]) -> None:
        self._bases = bases
        self.checkpoint: Checkpoint | None = None
        self.lineage: Any = None
        self._asked: Checkpoint | None = None
        self.folder = widgets.Text(
            value=str(folder), description="folder", continuous_update=False, style=STYLE, layout=_WIDE
        )
        self.files = widgets.Select(description="checkpoints", rows=8, style=STYLE, layout=_WIDE)
        self.candidates = widgets.SelectMultiple(description="bases to try", rows=4, style=STYLE, layout=_WIDE)
        self.header, self.answer, self.status = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.job = Job(self._guess_lineage, on_result=self._show_answer, title="Guess lineage")
        self.folder.observe(lambda _: self.look(), "value")
        self.files.observe(lambda _: self._chosen(), "value")
        super().__init__([self.folder, self.status, self.files, self.header, self.candidates, self.job, self.answer])
        self.look()

    @property
    def value(self) -> Path | None:
        """The path of the chosen checkpoint."""
        return self.files.value  # type: ignore[no-any-return]

    def look(self) -> None:
        """Read the folder again."""
        place = expanded(self.folder.value, "open")
        looked_at = count()
        found = list(checkpoints_in(place, looked_at=looked_at))
        options = [(f"{path.relative_to(place)}, {size_text(size)}", path) for path, size in found]
        self.candidates.options = options
        self.files.options = options
        self.files.index = 0 if options else None
        text = f"{len(found)} checkpoints" + (f" (the first {_MOST})" if len(found) == _MOST else "")
        if next(looked_at) > _ENTRIES:
            text += f"; looked at {_ENTRIES:,} files and stopped there: name a folder further down"
        self._say(text if place.is_dir() else f"there is no folder {place}")
        self._chosen()

    def _chosen(self) -> None:
        self.checkpoint, self.lineage, self.answer.value = None, None, ""
        if self.value is None:
            self.header.value = ""
            return
        try:
            self.checkpoint = open_checkpoint(self.value)
            self.header.value = self.checkpoint._repr_html_()
        except AlkahestError as error:
            self.header.value = note_html(reason_of(error), "alert")

    def _guess_lineage(self) -> Iterator[Event]:
        if self.checkpoint is None:
            raise AlkahestError("guess lineage", "no checkpoint is chosen", fix="choose one in the first list")
        place = expanded(self.folder.value, "open")
        marked = {str(path.relative_to(place)): open_checkpoint(path) for path in self.candidates.value}
        self._asked = self.checkpoint
        tried = {name: one for name, one in {**self._bases, **marked}.items() if one != self.checkpoint}
        if not tried:
            raise AlkahestError(
                "guess lineage", "there is nothing to compare with", fix="mark its possible bases in the second list"
            )
        yield from stream_nearest_base(self.checkpoint, tried)

    def _show_answer(self, found: Any) -> None:
        if self._asked is not self.checkpoint:
            return  # another file was chosen meanwhile
        self.lineage = found
        self.answer.value = found._repr_html_()

    def _say(self, text: str) -> None:
        self.status.value = note_html(text)


def checkpoints_in(
    folder: Path, depth: int = _DEPTH, looked_at: Iterator[int] | None = None
) -> Iterator[tuple[Path, int]]:
    """Checkpoints in a folder and below it, with their bytes: files, indices of shards, diffusers transformers.

    ``looked_at`` counts the files on the way.
    """
    yield from islice(_in_order(folder, depth, looked_at or count()), _MOST)


def _in_order(folder: Path, depth: int, looked_at: Iterator[int]) -> Iterator[tuple[Path, int]]:
    try:
        entries = sorted(path for path in folder.iterdir() if next(looked_at) < _ENTRIES)
    except OSError:  # not there, not a folder, not for us to read
        return
    config = folder / "config.json"
    if config in entries and (shards := [path for path in entries if path.suffix == ".safetensors"]):
        if "Transformer2DModel" in _text(config):  # and no text encoder or VAE
            yield folder, sum(map(_size, shards))
        return
    sharded = [path for path in entries if path.name.endswith(".safetensors.index.json")]
    for index in sharded:
        stem = index.name.removesuffix(".safetensors.index.json")
        yield index, sum(_size(path) for path in entries if _is_shard(path, stem))
    for path in entries:
        if path.is_dir() and depth > 0 and not path.name.startswith("."):
            yield from _in_order(path, depth - 1, looked_at)
        elif (
            path.suffix == ".safetensors"
            and path.is_file()
            and not any(_is_shard(path, i.name.removesuffix(".safetensors.index.json")) for i in sharded)
        ):
            yield path, _size(path)


def _is_shard(path: Path, stem: str) -> bool:
    return path.suffix == ".safetensors" and path.name.startswith(f"{stem}-")


def _size(path: Path) -> int:
    """Bytes of a file; 0 of a link that leads nowhere, which opening explains."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[:10_000]
    except OSError:
        return ""

"""Whether a file is what it says: sound, of the inputs that it names, and the same to the byte when it is made
again.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from alkahest.algebra.weights import Weights
from alkahest.engine.events import Event
from alkahest.engine.jobs import jobs_of
from alkahest.engine.options import Options
from alkahest.engine.readable import Workspace
from alkahest.engine.record import METADATA_KEY, Recipe, hashed_recipe, headers_of, plan_of
from alkahest.engine.terms import Source
from alkahest.engine.workers import Run, blocks
from alkahest.errors import RecipeError, printable
from alkahest.files.hashes import blake3_of
from alkahest.files.reader import Reader
from alkahest.model.dtypes import is_finite
from alkahest.recipes.inputs import build, found_input, require_match, require_text, require_wanted
from alkahest.sources.checkpoint import Checkpoint
from alkahest.sources.checkpoint import open as open_checkpoint
from alkahest.sources.lora import open_input


@dataclass
class Verdict:
    """What `verify` found out about a file; ``ok`` is false if anything speaks against it."""

    path: Path
    blake3: dict[str, str]
    recipe: str | None = None
    made: str | None = None  # what no recipe repeats
    nonfinite: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    differing: list[str] | None = None

    @property
    def ok(self) -> bool:
        return not self.nonfinite and not self.differing and "changed" not in self.inputs.values()

    def __repr__(self) -> str:
        lines = [f"{self.path}: {'sound' if self.ok else 'NOT SOUND'}"]
        lines += [f"  BLAKE3 {digest}  {name}" for name, digest in self.blake3.items()]
        lines += [f"  {count} non-finite values in {key}" for key, count in self.nonfinite.items()]
        if self.made:
            lines.append(f"  trained, which no recipe repeats: {self.made}")
        else:
            lines.append(f"  recipe: {self.recipe or 'none recorded'}")
        lines += [f"  input {name}: {state}" for name, state in self.inputs.items()]
        if self.differing is not None:
            lines.append(
                f"  recomputed: {', '.join(self.differing) + ' differ' if self.differing else 'every byte the same'}"
            )
        return printable("\n".join(lines))


def stream_verdict(
    path: str | os.PathLike[str], given: Mapping[str, Any] | None = None, recompute: bool = False
) -> Iterator[Event]:
    """Check a checkpoint from end to end: structure, finite numbers, inputs, and with ``recompute`` every byte.

    A generator of events, the last with the `Verdict`. Recomputing compares with the file and
    writes nothing. Raises FileFormatError if the file cannot be opened at all.
    """
    checkpoint = open_checkpoint(path)
    digests = dict(zip((f.path.name for f in checkpoint.files), blake3_of(checkpoint.files, anew=True), strict=True))
    verdict = Verdict(checkpoint.path, digests)
    workspace, done = Workspace(torch.device("cpu")), 0
    for key, piece in checkpoint.slices.items():
        if bad := _nonfinite(checkpoint, key, workspace):
            verdict.nonfinite[key] = bad
        done += piece.nbytes
        yield Event(done, checkpoint.nbytes, key)
    if METADATA_KEY in checkpoint.metadata:
        recipe = Recipe.from_json(checkpoint.metadata[METADATA_KEY], checkpoint.path)
        verdict.recipe, verdict.made = recipe.text or None, recipe.made or None
        if recompute:
            require_text(recipe, "verify", path)
        require_wanted(given or {}, recipe)
        for name in recipe.inputs:
            verdict.inputs[name] = _state(recipe, name, (given or {}).get(name), checkpoint.path.parent)
        if recompute:
            expression = build(recipe, given or {}, checkpoint.path.parent)
            verdict.differing = yield from _compare(checkpoint, recipe, expression)
    elif recompute:
        raise RecipeError("verify", "nothing to recompute: no recipe is recorded", file=path)
    yield Event(done, done, "done", verdict)


def _compare(checkpoint: Checkpoint, recipe: Recipe, expression: Weights) -> Generator[Event, None, list[str]]:
    options = Options.of(recipe.output)
    plan = plan_of(expression, options)
    run = Run(options)
    headers = headers_of(plan, hashed_recipe(expression, options))
    files = sorted(checkpoint.files, key=lambda reader: reader.path.name)
    differing: set[str] = set()
    if len(files) != len(headers):
        return ["the number of files"]
    done, total = 0, plan.nbytes
    for file, header, items in zip(files, headers, plan.files, strict=True):
        # Spaces at the end of a header say nothing; an earlier version wrote fewer.
        start = 8 + int.from_bytes(file.read(0, 8), "little")
        comparer = _Comparer(file, {item.name: item.nbytes for item in items}, start)
        if file.read(8, start - 8).rstrip(b" ") != header[8:].rstrip(b" "):
            comparer.differing.add("the header")
        for job in run.perform(list(jobs_of(run, comparer, start, items))):
            done += job.nbytes
            yield Event(done, total, job.key)
        differing |= comparer.differing
    return sorted(differing)


class _Comparer:
    """Takes the place of a Writer, and compares with a file instead of writing to one."""

    def __init__(self, file: Reader, sizes: Mapping[str, int], data_start: int) -> None:
        self.file = file
        self.differing: set[str] = set()
        self._places = []
        offset = data_start
        for name, size in sizes.items():
            self._places.append((offset, offset + size, name))
            offset += size

    def write(self, data: memoryview | bytes, offset: int) -> None:
        count = len(data)
        if offset + count > self.file.size or self.file.read(offset, count) != bytes(data):
            names = [name for start, stop, name in self._places if start <= offset < stop]
            self.differing.add(names[0] if names else "the header")


def _nonfinite(checkpoint: Checkpoint, key: str, workspace: Workspace) -> int:
    """How many values of a tensor are NaN or infinite."""
    found = 0
    for start, stop in blocks(Source(checkpoint, key), checkpoint.slices[key].elements):
        with workspace.block(stop - start) as values:
            checkpoint.read(key, start, stop, values, workspace)
            found += 0 if is_finite(values) else int((~torch.isfinite(values)).sum())
    return found


def _state(recipe: Recipe, name: str, given: Any, beside: Path) -> str:
    if isinstance(given, (int, float)):
        raise RecipeError(
            "recipe", f"{name!r} is a file, and a number is given for it", found=str(given), fix=f"--{name} PATH"
        )
    if given:  # somebody says that this is the input: if it is not, that is their error, not the file's
        return f"{require_match(open_input(given, name=name), recipe, name, anew=True).path}, unchanged"
    try:
        found = found_input(recipe, name, beside, anew=True)
    except RecipeError as error:
        return "changed" if error.expected is not None else "not found here"
    return f"{found.path}, unchanged"

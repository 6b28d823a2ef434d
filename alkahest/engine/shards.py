"""A folder of shards, and its writing by tasks of any executor: on other processes, or other machines."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path

from alkahest.engine.events import Event
from alkahest.engine.jobs import jobs_of
from alkahest.engine.options import Options
from alkahest.engine.plan import Plan
from alkahest.engine.record import Recipe, headers_of, plan_of, readers_of, recipe_of, stream_hashes
from alkahest.engine.terms import Computable
from alkahest.engine.workers import Run, spread
from alkahest.errors import OutputError
from alkahest.files.whole import Writer, as_output_error, whole_folder

_UNFINISHED = ".unfinished"


def write_json(folder: Path, expression: Computable, plan: Plan, names: list[str]) -> None:
    if plan.layout == "diffusers":
        config = next((c for leaf in expression.leaves() if (c := leaf.config) is not None), None)
        if config is None:
            config = expression.leading.architecture.diffusers_config()
            plan.notes.extend(f"config.json: {guess}" for guess in expression.leading.architecture.guesses())
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if len(names) > 1:
        weight_map = {item.name: name for items, name in zip(plan.files, names, strict=True) for item in items}
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}
        (folder / f"{_stem(plan)}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def file_names(plan: Plan) -> list[str]:
    """Of the files in a folder."""
    stem, count = _stem(plan), len(plan.files)
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _stem(plan: Plan) -> str:
    return "diffusion_pytorch_model" if plan.layout == "diffusers" else "model"


def write_shards(expression: Computable, target: Path, run: Run, plan: Plan, executor: Executor) -> Iterator[Event]:
    """Write the folder, each file by a task of its own; the last event tells its size.

    A file appears under its name when it is whole, so that a task which is done twice, because its worker was lost,
    does no harm.
    """
    readers = readers_of(expression)
    hashes = yield from stream_hashes(readers, plan.nbytes)
    recipe = recipe_of(expression, run.options, hashes)
    names, total, done = file_names(plan), sum(map(len, headers_of(plan, recipe))) + plan.nbytes, 0
    with whole_folder(target, total) as folder:
        calls = {name: (expression, run.options, recipe, folder, name, target) for name in names}
        for name, (nbytes, nonfinite, overflowed, nothing_changed) in spread(executor, write_shard, calls):
            done += nbytes
            run.nothing_changed &= nothing_changed
            run.nonfinite.update(nonfinite)
            run.overflowed.update(overflowed)
            yield Event(done, total, name)
        for reader in readers:
            reader.check_unchanged()
        with as_output_error(target):
            for path in folder.glob(f"*{_UNFINISHED}"):  # of a worker that was lost
                path.unlink(missing_ok=True)
            write_json(folder, expression, plan, names)
    yield Event(total, total, "done")


def write_shard(
    expression: Computable, options: Options, recipe: Recipe, folder: Path, name: str, target: Path
) -> tuple[int, Counter[str], Counter[str], bool]:
    """Write one file of a folder, whole or not at all, from any process: its size, what `Saved` counts by tensor, and
    whether nothing changed.
    """
    plan = plan_of(expression, options)
    number = file_names(plan).index(name)
    header, items, run = headers_of(plan, recipe)[number], plan.files[number], Run(options)
    size = len(header) + sum(item.nbytes for item in items)
    unfinished = folder / f"{uuid.uuid4().hex}{_UNFINISHED}"
    with contextlib.ExitStack() as stack:
        with as_output_error(target):
            stack.callback(unfinished.unlink, missing_ok=True)
            writer = Writer(unfinished, size, target / name)
            stack.callback(writer.close)
        writer.write(header, 0)
        for _ in run.perform(list(jobs_of(run, writer, len(header), items))):
            if not folder.exists():
                raise OutputError("save", "the folder is gone: the merge was stopped", file=target / name)
        for reader in readers_of(expression):
            reader.check_unchanged()
        with as_output_error(target):
            writer.sync()
            writer.close()
            os.replace(unfinished, folder / name)
    return size, run.nonfinite, run.overflowed, run.nothing_changed

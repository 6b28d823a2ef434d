"""Expression -> file or shards: one pass, block by block, in bounded memory.

Reading, computing and writing overlap. The output appears under its name only when every byte of
it is on disk.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from alkahest.engine.events import Event
from alkahest.engine.jobs import jobs_of
from alkahest.engine.options import Options, names_file
from alkahest.engine.plan import Piece, Plan, count_restored
from alkahest.engine.record import headers_of, plan_of, readers_of, recipe_of
from alkahest.engine.shards import file_names, write_json, write_shards
from alkahest.engine.terms import Computable
from alkahest.engine.workers import Run
from alkahest.errors import AlgebraError, OutputError, printable
from alkahest.files.hashes import blake3_of
from alkahest.files.paths import expanded
from alkahest.files.reader import same_file, size_text
from alkahest.files.whole import Writer, as_output_error, replaced, whole_file, whole_folder

_NO_HASH = "0" * 64


@dataclass(frozen=True, repr=False)
class Saved:
    """What was written, and what happened on the way: counts are of canonical tensors.

    ``restored`` counts unchanged tensors that had to change storage ("bf16 to fp32"): decoded and
    rounded once. ``nonfinite`` and ``overflowed`` count values per tensor, if they were allowed.
    """

    path: Path  # the file or folder
    files: list[Path]  # each file of it
    nbytes: int  # bytes written
    seconds: float  # from the first read to the last write
    computed: int  # tensors that the expression changes
    copied: int  # tensors that are an input's bytes
    recipe: str  # as it stands in the file
    restored: dict[str, int] = field(default_factory=dict)  # change of storage -> how many
    nonfinite: dict[str, int] = field(default_factory=dict)  # tensor -> NaN and infinities
    overflowed: dict[str, int] = field(default_factory=dict)  # tensor -> what did not fit the dtype
    notes: list[str] = field(default_factory=list)  # what one should know

    def __repr__(self) -> str:
        lines = [
            f"saved {self.path} ({size_text(self.nbytes)} in {self.seconds:.1f} s)",
            f"  {self.computed} tensors computed, {self.copied} copied byte for byte (q, k and v counted apart)",
        ]
        lines += [f"  {count} unchanged tensors re-stored, {change}" for change, count in self.restored.items()]
        lines += [f"  {count} non-finite values in {key}" for key, count in self.nonfinite.items()]
        lines += [f"  {count} values of {key} overflowed" for key, count in self.overflowed.items()]
        return printable("\n".join(lines + [f"  {note}" for note in self.notes]))


def stream(
    expression: Computable, path: str | os.PathLike[str], options: Options, executor: Executor | None = None
) -> Iterator[Event]:
    """Write an expression, as a generator of events; the last one carries the `Saved` result.

    Closing the generator, or any exception, stops the work and removes the partial file.
    """
    target = expanded(path, "save")
    check_target(expression, target, options)
    plan = plan_of(expression, options)
    if executor is None:
        return _stream(expression, target, options, plan)
    if not options.makes_folder(target):
        raise OutputError(
            "save",
            "an executor writes shards, and this is one file",
            file=target,
            fix="max_shard_size='2GB' and a folder's name",
        )
    return _spread(expression, target, options, plan, executor)


def check_target(expression: Computable, target: Path, options: Options) -> None:
    """Refuse an output that is an input (through links too) or has the wrong kind of name."""
    if "\0" in str(target):
        raise OutputError("save", "this cannot be a file's name", found=repr(str(target)))
    for leaf in expression.leaves():
        for path in {path: None for reader in leaf.files for path in (reader.path, reader.path.parent)}:
            if same_file(target, path):
                raise OutputError(
                    "save",
                    "the output is one of the inputs",
                    file=target,
                    found=f"the same file as {path}",
                    fix="save under another name",
                )
    is_file_name = names_file(target)
    if options.max_shard_size is not None and is_file_name:
        raise OutputError("save", "shards need a folder", file=target, fix="name a folder, without .safetensors")
    if not options.makes_folder(target) and not is_file_name:
        raise OutputError(
            "save",
            "a single file must end in .safetensors",
            file=target,
            found=target.name,
            fix="name it like merged.safetensors; the diffusers layout and a shard size make folders",
        )
    for leaf in expression.leaves() if options.comfy_compatible else []:
        quantised = [form for form in leaf.storage.values() if form not in ("fp32", "fp16", "bf16")]
        if quantised:
            raise AlgebraError(
                "save",
                "comfy_compatible is exact for unquantised files only",
                file=leaf.files[0].path if leaf.files else leaf.name,
                expected="fp32, fp16 or bf16",
                found=quantised[0],
                fix="leave comfy_compatible off",
            )


def _spread(expression: Computable, target: Path, options: Options, plan: Plan, executor: Executor) -> Iterator[Event]:
    """`_stream`, each file by a task of its own."""
    started, run, before = time.perf_counter(), Run(options), replaced(target)
    for event in write_shards(expression, target, run, plan, executor):
        yield event
    seconds = time.perf_counter() - started
    names = file_names(plan)
    yield replace(event, result=_result(expression, target, options, plan, names, run, event.total, seconds, before))


def _stream(expression: Computable, target: Path, options: Options, plan: Plan) -> Iterator[Event]:
    started = time.perf_counter()
    run, before = Run(options), replaced(target)
    readers = readers_of(expression)
    # Hashes have a fixed length, so the header's size is known before they are.
    headers = headers_of(plan, recipe_of(expression, options, dict.fromkeys(readers, _NO_HASH)))
    total = sum(map(len, headers)) + plan.nbytes
    done = 0
    with contextlib.ExitStack() as stack:
        writers, names = _open_output(stack, target, options, plan, headers)
        pool = stack.enter_context(ThreadPoolExecutor(1, "alkahest-hash"))
        stack.callback(run.cancelled.set)
        hashing = pool.submit(blake3_of, readers, run.cancelled)
        opened = zip(writers, headers, plan.files, strict=True)
        jobs = [job for writer, header, items in opened for job in jobs_of(run, writer, len(header), items)]
        for job in run.perform(jobs):
            done += job.nbytes
            yield Event(done, total, job.key)
        hashes = dict(zip(readers, hashing.result(), strict=True))
        for reader in readers:
            reader.check_unchanged()
        yield Event(done, total, "waiting for the disk")
        with as_output_error(target):
            for writer, header in zip(writers, headers_of(plan, recipe_of(expression, options, hashes)), strict=True):
                writer.write(header, 0)
                writer.sync()
            if options.makes_folder(target):
                write_json(writers[0].path.parent, expression, plan, names)
                for writer in writers:
                    writer.close()
    seconds = time.perf_counter() - started
    result = _result(expression, target, options, plan, names, run, total, seconds, before)
    yield Event(total, total, "", result)


def _open_output(
    stack: contextlib.ExitStack, target: Path, options: Options, plan: Plan, headers: list[bytes]
) -> tuple[list[Writer], list[str]]:
    sizes = [len(h) + sum(item.nbytes for item in items) for h, items in zip(headers, plan.files, strict=True)]
    if not options.makes_folder(target):
        return [stack.enter_context(whole_file(target, sizes[0]))], [target.name]
    folder = stack.enter_context(whole_folder(target, sum(sizes)))
    names = file_names(plan)
    with as_output_error(target):
        writers = [Writer(folder / name, size, target / name) for name, size in zip(names, sizes, strict=True)]
    for writer in writers:
        stack.callback(writer.close)
    return writers, names


def _unrepeatable(expression: Computable) -> list[str]:
    """Why the file has no recipe, in words."""
    names = [leaf.name for leaf in expression.leaves() if not leaf.is_reproducible]
    return [f"no recipe: what is called {', '.join(names)} is in no file; save it first"] if names else []


def _unchanged(expression: Computable, pieces: list[Piece], run: Run) -> list[str]:
    """That a merge made no difference, in words."""
    if not expression.merges or not run.nothing_changed:
        return []
    computed = sum(piece.before is not None for piece in pieces)
    why = (
        "all that it would change is protected, or the same file"
        if not computed
        else (
            f"{computed} tensors were computed, and each came out as it was; are two of the files the same, or is the "
            "multiplier too small for the output's form?"
        )
    )
    return [f"nothing changed: every tensor is {expression.leading.name}'s, as written in this form: {why}"]


def _result(
    expression: Computable,
    target: Path,
    options: Options,
    plan: Plan,
    names: list[str],
    run: Run,
    nbytes: int,
    seconds: float,
    before: list[str],
) -> Saved:
    weights = list(plan.weights())
    pieces = [piece for weight in weights for piece in weight.pieces]
    copied = sum(piece.copied is not None for piece in pieces)
    changes = dict(count_restored(weights))
    return Saved(
        path=target,
        files=[target / name for name in names] if options.makes_folder(target) else [target],
        nbytes=nbytes,
        seconds=seconds,
        computed=len(pieces) - copied - sum(changes.values()),
        copied=copied,
        recipe=expression.text(),
        restored=changes,
        nonfinite=dict(run.nonfinite),
        overflowed=dict(run.overflowed),
        notes=[
            *before,
            *_unchanged(expression, pieces, run),
            *plan.notes,
            *expression.protection_notes(),
            *_unrepeatable(expression),
        ],
    )

"""Expression -> file or shards: one pass, block by block, in bounded memory.

Reading, computing and writing overlap. The output appears under its name only when every byte of
it is on disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alkahest import __version__
from alkahest.expr import Leaf, Names, Weights, name_leaves
from alkahest.files import Reader, Writer, as_output_error, size_text, whole_file, whole_folder
from alkahest.hashes import blake3_of
from alkahest.header import build_header
from alkahest.options import Options, check_target
from alkahest.output import Plan, make_plan, restored
from alkahest.recipe import METADATA_KEY, Recipe
from alkahest.scalar import Rules
from alkahest.work import Event, Run, finished
from alkahest.write import jobs_of

_NO_HASH = "0" * 64


@dataclass(frozen=True, repr=False)
class Saved:
    """What was written, and what happened on the way: counts are of canonical tensors.

    ``restored`` counts unchanged tensors that had to change storage ("bf16 to fp32"): decoded and
    rounded once. ``nonfinite`` and ``overflowed`` count values per tensor, if they were allowed.
    """

    path: Path
    files: list[Path]
    nbytes: int
    seconds: float
    computed: int
    copied: int
    recipe: str
    restored: dict[str, int] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    overflowed: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        lines = [
            f"saved {self.path} ({size_text(self.nbytes)} in {self.seconds:.1f} s)",
            f"  {self.computed} tensors computed, {self.copied} copied byte for byte (q, k and v counted apart)",
        ]
        lines += [f"  {count} unchanged tensors re-stored, {change}" for change, count in self.restored.items()]
        lines += [f"  {count} non-finite values in {key}" for key, count in self.nonfinite.items()]
        lines += [f"  {count} values of {key} overflowed" for key, count in self.overflowed.items()]
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def save(expression: Weights, path: str | os.PathLike[str], **options: Any) -> Saved:
    """Compute an expression and write it as one safetensors file, shards, or a diffusers folder.

    >>> (bridge + 171.1 * (variant - base)).save("merged.safetensors", dtype="bf16")

    ``path`` ending in ``.safetensors`` is one file, anything else a new folder. Options:

    - ``dtype``: ``fp32 fp16 bf16 fp8_e4m3fn fp8_e5m2``, or scaled fp8 as ``comfy_quant`` or
      ``scaled_fp8``; fp8 is for the Linears of the three block stacks, the rest stays bf16.
      Default: as the leading checkpoint stores each tensor.
    - ``layout``: ``native`` (default), ``diffusers``, or ``all-in-one`` (default if the leading file is).
    - ``rounding``: ``nearest`` (to even) or ``stochastic`` with ``seed``.
    - ``device``: ``cpu``, ``cuda`` or ``mps`` for the arithmetic.
    - ``comfy_compatible``: ComfyUI's order of operations and pad tokens, bit for bit on unquantised files.
    - ``metadata``: more text for the file's header, such as a title; not under ``format`` or ``alkahest``.
    - ``max_shard_size``: bytes, or text such as ``"5GB"``; makes a folder of shards with an index.
    - ``allow_nonfinite``: write NaN, infinity and overflow instead of refusing; the result counts them.
    - ``threads``: workers; the bytes do not depend on it. Default: the processors at hand, at most 8.

    An existing file is replaced in one step at the end. Raises the AlkahestError kinds, before
    anything is written where that is possible; the target is never left half written.
    """
    saved: Saved = finished(stream(expression, path, **options))
    return saved


def stream(expression: Weights, path: str | os.PathLike[str], **options: Any) -> Iterator[Event]:
    """`save` as a generator of events; the last one carries the `Saved` result.

    Closing the generator, or any exception, stops the work and removes the partial file.
    """
    chosen = Options.checked(options)
    target = Path(path).expanduser()
    check_target(expression, target, chosen)
    return _stream(expression, target, chosen, plan_of(expression, chosen))


def _stream(expression: Weights, target: Path, options: Options, plan: Plan) -> Iterator[Event]:
    started = time.perf_counter()
    run = Run(options)
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
                _write_json(writers[0].path.parent, expression, plan, names)
                for writer in writers:
                    writer.close()
    result = _result(expression, target, options, plan, names, run, total, time.perf_counter() - started)
    yield Event(total, total, "", result)


def _open_output(
    stack: contextlib.ExitStack, target: Path, options: Options, plan: Plan, headers: list[bytes]
) -> tuple[list[Writer], list[str]]:
    sizes = [len(h) + sum(item.nbytes for item in items) for h, items in zip(headers, plan.files, strict=True)]
    if not options.makes_folder(target):
        return [stack.enter_context(whole_file(target, sizes[0]))], [target.name]
    folder = stack.enter_context(whole_folder(target, sum(sizes)))
    stem, count = _stem(plan), len(sizes)
    names = [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    names = names if count > 1 else [f"{stem}.safetensors"]
    with as_output_error(target):
        writers = [Writer(folder / name, size, target / name) for name, size in zip(names, sizes, strict=True)]
    for writer in writers:
        stack.callback(writer.close)
    return writers, names


def _write_json(folder: Path, expression: Weights, plan: Plan, names: list[str]) -> None:
    if plan.layout == "diffusers":
        config = next((c for leaf in expression.leaves() if (c := leaf.config) is not None), None)
        if config is None:
            config = expression.leading.architecture.diffusers_config()
            if expression.leading.architecture.head != 128:
                plan.notes.append("config.json: rotary axes are not in the weights; guessed from the head size")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if len(names) > 1:
        weight_map = {item.name: name for items, name in zip(plan.files, names, strict=True) for item in items}
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}
        (folder / f"{_stem(plan)}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _stem(plan: Plan) -> str:
    return "diffusion_pytorch_model" if plan.layout == "diffusers" else "model"


def plan_of(expression: Weights, options: Options) -> Plan:
    """The output's tensors under these options."""
    rules = Rules(comfy_compatible=options.comfy_compatible)
    plan = make_plan(expression, rules, options.dtype, options.layout, options.shard_bytes())
    return replace(plan, metadata={**(options.metadata or {}), **plan.metadata})


def readers_of(expression: Weights) -> list[Reader]:
    """Every file that an expression reads."""
    return [reader for leaf in expression.leaves() for reader in leaf.files]


def recipe_of(expression: Weights, options: Options, hashes: Mapping[Reader, str]) -> Recipe:
    """What the output's metadata says about itself; no text if it reads weights that no recipe can name."""
    names = name_leaves(expression)
    if not all(leaf.is_reproducible for leaf in names if isinstance(leaf, Leaf)):
        return Recipe("")
    return Recipe(expression.text(names), inputs_of(names, hashes), options.record(), __version__)


def hashed_recipe(expression: Weights, options: Options) -> Recipe:
    """`recipe_of`, with its inputs hashed now."""
    readers = readers_of(expression)
    return recipe_of(expression, options, dict(zip(readers, blake3_of(readers), strict=True)))


def inputs_of(names: Names, hashes: Mapping[Reader, str]) -> dict[str, list[dict[str, Any]]]:
    """What a recipe records of the files that it was made from."""
    return {
        name: [{"file": leaf.file_names[r], "bytes": r.size, "blake3": hashes[r]} for r in leaf.files]
        for leaf, name in names.items()
        if leaf.files
    }


def headers_of(plan: Plan, recipe: Recipe) -> list[bytes]:
    """The header of every output file."""
    own = {METADATA_KEY: recipe.to_json()} if recipe.text else {}
    metadata = {"format": "pt", **plan.metadata, **own}
    return [build_header(((item.name, item.tag, item.shape) for item in items), metadata) for items in plan.files]


def _result(
    expression: Weights, target: Path, options: Options, plan: Plan, names: list[str], run: Run, nbytes: int,
    seconds: float,
) -> Saved:  # fmt: skip
    weights = list(plan.weights())
    pieces = [piece for weight in weights for piece in weight.pieces]
    copied = sum(piece.copied is not None for piece in pieces)
    changes = dict(restored(weights))
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
        notes=[*plan.notes, *expression.dropped()],
    )

"""Expression -> file, shards or live module: one pass, block by block, in bounded memory.

Workers each take a block: read it from every input, compute in float32, round once, write it to
its place. The output appears under its name only when every byte of it is on disk.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from alkahest import layouts, term
from alkahest.checkpoint import Checkpoint
from alkahest.dtypes import BY_TAG, Format, encode, rounding_noise, scale_for
from alkahest.errors import AlgebraError, MismatchError, NonFiniteError, OutputError, UnknownNameError, nearest
from alkahest.expr import Weights, name_leaves
from alkahest.files import Reader, Writer, blake3_of, output_error, same_file, whole_file, whole_folder
from alkahest.header import build_header
from alkahest.output import Carried, Constant, Item, Piece, Plan, Weight, make_plan, restored
from alkahest.recipe import METADATA_KEY, Recipe
from alkahest.scalar import Rules
from alkahest.term import Term, Workspace, evaluate, needs_whole_tensor, sources

BLOCK = 1 << 20  # elements; 4 MB in float32, small enough for caches, large enough for disks
_COPY = 4 << 20  # bytes
_MAX_THREADS = 8
_NO_HASH = "0" * 64


@dataclass(frozen=True)
class Event:
    """Progress: bytes of output done and in all, the tensor at hand, and at the end the result."""

    done: int
    total: int
    key: str
    result: Saved | None = None


@dataclass
class Saved:
    """What was written, and what happened on the way."""

    path: Path
    files: list[Path]
    nbytes: int
    seconds: float = 0.0
    computed: int = 0
    copied: int = 0
    restored: dict[str, int] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    overflowed: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    recipe: str = ""

    def __repr__(self) -> str:
        lines = [
            f"saved {self.path} ({self.nbytes / 1e9:.3g} GB in {self.seconds:.1f} s)",
            f"  {self.computed} tensors computed, {self.copied} copied byte for byte",
        ]
        lines += [f"  {count} unchanged tensors re-stored, {change}" for change, count in self.restored.items()]
        lines += [f"  {count} non-finite values in {key}" for key, count in self.nonfinite.items()]
        lines += [f"  {count} values of {key} overflowed" for key, count in self.overflowed.items()]
        return "\n".join(lines + [f"  {note}" for note in self.notes])


@dataclass(frozen=True)
class Options:
    """How to write; `save` documents each."""

    dtype: Any = None
    layout: str | None = None
    rounding: str = "nearest"
    seed: int = 0
    device: str = "cpu"
    comfy_compatible: bool = False
    max_shard_size: int | str | None = None
    allow_nonfinite: bool = False
    threads: int | None = None

    def record(self) -> dict[str, Any]:
        """The options that change the bytes, where they are not the default."""
        kept = {name: getattr(self, name) for name in _RECORDED if getattr(self, name) != getattr(Options(), name)}
        return {name: value if isinstance(value, (int, str)) else str(value) for name, value in kept.items()}


_RECORDED = ("dtype", "layout", "rounding", "seed", "device", "comfy_compatible", "max_shard_size", "allow_nonfinite")


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
    - ``max_shard_size``: bytes, or text such as ``"5GB"``; makes a folder of shards with an index.
    - ``allow_nonfinite``: write NaN, infinity and overflow instead of refusing; the result counts them.
    - ``threads``: workers; the bytes do not depend on it. Default: the processors at hand, at most 8.

    Raises AlkahestError kinds, before anything is written where that is possible; the target is
    never left half written.
    """
    result = None
    for event in stream(expression, path, **options):
        result = event.result or result
    assert result is not None
    return result


def stream(expression: Weights, path: str | os.PathLike[str], **options: Any) -> Iterator[Event]:
    """`save` as a generator of events; the last one carries the `Saved` result.

    Closing the generator, or any exception, stops the work and removes the partial file.
    """
    chosen = _checked_options(options)
    target = Path(path).expanduser()
    limit = _bytes_of(chosen.max_shard_size)
    _check_target(expression, target, chosen, limit)
    rules = Rules(comfy_compatible=chosen.comfy_compatible)
    plan = make_plan(expression, rules, chosen.dtype, chosen.layout, limit)
    return _stream(expression, target, chosen, plan)


def _stream(expression: Weights, target: Path, chosen: Options, plan: Plan) -> Iterator[Event]:
    started = time.perf_counter()
    readers = _readers(expression)
    recipe = _recipe(expression, chosen, {reader: _NO_HASH for reader in readers})
    headers = [_header(items, recipe) for items in plan.files]
    total = sum(map(len, headers)) + plan.nbytes
    run = _Run(chosen)
    hashes: dict[Reader, str] = {}
    hasher = threading.Thread(target=lambda: hashes.update(zip(readers, blake3_of(readers, run.cancelled), strict=True)))
    with contextlib.ExitStack() as stack:
        writers, names = _open_output(stack, target, chosen, plan, headers)
        hasher.start()
        stack.callback(hasher.join)
        stack.callback(run.cancelled.set)
        done = 0
        jobs = [
            job
            for writer, header, items in zip(writers, headers, plan.files, strict=True)
            for job in _jobs(run, writer, len(header), items)
        ]
        jobs.sort(key=lambda job: job.place)
        for job in run.perform(jobs):
            done += job.nbytes
            yield Event(done, total, job.key)
        yield Event(done, total, "hashing inputs and syncing")
        hasher.join()
        if len(hashes) != len(readers):
            blake3_of(readers)  # raises what the thread met
        for reader in readers:
            reader.check_unchanged()
        recipe = _recipe(expression, chosen, hashes)
        for writer, header, items in zip(writers, headers, plan.files, strict=True):
            final = _header(items, recipe)
            assert len(final) == len(header)
            with _disk_errors(target):
                writer.write(final, 0)
                writer.sync()
                if len(writers) > 1 or _is_folder(target, chosen):
                    writer.close()
        _write_companion_files(stack, target, expression, chosen, plan, writers, names)
    result = _result(expression, target, names, plan, run, total, time.perf_counter() - started)
    yield Event(total, total, "", result)


def load_into(expression: Weights, module: torch.nn.Module, **options: Any) -> int:
    """Compute an expression into the parameters of a live module, in place; returns how many it set.

    >>> (bridge + 8 * delta).load_into(pipeline.transformer)

    The module's parameter names may be native or diffusers. Values are rounded once to each
    parameter's dtype, on its device. Options: ``rounding``, ``seed``, ``comfy_compatible``,
    ``allow_nonfinite``, ``threads``. Raises MismatchError, before anything is changed, if names or
    shapes differ.
    """
    count = 0
    for _ in stream_into(expression, module, **options):
        count += 1
    return count


def stream_into(expression: Weights, module: torch.nn.Module, **options: Any) -> Iterator[Event]:
    """`load_into` as a generator of events, one per parameter slice."""
    chosen = _checked_options(options)
    rules = Rules(comfy_compatible=chosen.comfy_compatible)
    targets = _module_slices(expression, module)
    run = _Run(chosen)
    total = sum(values.numel() * values.element_size() for values in targets.values())
    jobs = []
    for number, (key, values) in enumerate(targets.items()):
        found = expression.at(key, rules)
        assert found is not None
        jobs.append(_Job(key, values.numel() * values.element_size(), _fill(run, key, found, values), (0, number)))
    done = 0
    for job in run.perform(jobs):
        done += job.nbytes
        yield Event(done, total, job.key)


@dataclass(frozen=True)
class _Job:
    key: str
    nbytes: int
    work: Callable[[Workspace], None]
    place: tuple[int, int]  # where the leading input lies: jobs run in that order, so disks read forward


class _Run:
    """Workers, and what they found out."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.device = _device(options.device)
        self.cancelled = threading.Event()
        self.whole_tensor = threading.Lock()
        self.nonfinite: Counter[str] = Counter()
        self.overflowed: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._local = threading.local()

    def perform(self, jobs: list[_Job]) -> Iterator[_Job]:
        """Run the jobs on worker threads; yield each as it is done. On any exception the rest is dropped."""
        before = torch.get_num_threads()
        pool = ThreadPoolExecutor(self.options.threads or _processors(), "alkahest", self._start_worker)
        try:
            futures: dict[Future[None], _Job] = {pool.submit(self._work, job): job for job in jobs}
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        finally:
            self.cancelled.set() if any(not f.done() for f in futures) else None
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(before)

    def _start_worker(self) -> None:
        # One thread per worker: torch's own threads would fight with ours for the processors.
        torch.set_num_threads(1)
        self._local.workspace = Workspace(self.device)

    def _work(self, job: _Job) -> None:
        if not self.cancelled.is_set():
            job.work(self._local.workspace)

    def encoded(self, values: torch.Tensor, key: str, start: int, form: Format, found: Term) -> torch.Tensor:
        """Check and round a block; refuse NaN, infinity and overflow unless they are allowed."""
        low, high = torch.aminmax(values)
        magnitude = float(torch.maximum(-low, high))
        half_step = 2.0 ** (math.floor(math.log2(form.largest)) - form.mantissa - 1)
        if not math.isfinite(magnitude) or not math.isfinite(float(low)):
            self._tally(self.nonfinite, key, int((~torch.isfinite(values)).sum()), lambda: _why_nonfinite(found, key))
        elif magnitude >= form.largest + half_step:
            over = int((values.abs() >= form.largest + half_step).sum())
            self._tally(self.overflowed, key, over, lambda: _overflow(key, form, magnitude))
        if values.device.type == "mps":
            values = values.cpu()
        noise = None
        if self.options.rounding == "stochastic":
            noise = rounding_noise(self.options.seed, key, start, values.numel(), values.device)
        return encode(values, form, noise)

    def _tally(self, tally: Counter[str], key: str, count: int, error: Callable[[], Exception]) -> None:
        if not self.options.allow_nonfinite:
            raise error()
        with self._lock:
            tally[key] += count


def _jobs(run: _Run, writer: Writer, data_start: int, items: list[Item]) -> Iterator[_Job]:
    offset = data_start
    offsets = {}
    for item in items:
        offsets[item.name] = offset
        offset += item.nbytes
    for item in items:
        start = offsets[item.name]
        if isinstance(item, Carried):
            yield from _carry(item, writer, start)
        elif isinstance(item, Constant):
            if item.data:
                writer.write(item.data, start)
        elif item.scale_name is not None:
            yield _Job(item.name, item.nbytes, _scaled(run, writer, item, start, offsets[item.scale_name]), _place(item.pieces[0]))
        else:
            for piece in item.pieces:
                yield from _piece_jobs(run, writer, item.form, piece, start)
                start += piece.elements * item.form.itemsize


def _piece_jobs(run: _Run, writer: Writer, form: Format, piece: Piece, offset: int) -> Iterator[_Job]:
    block = max(piece.elements, 1) if needs_whole_tensor(piece.term) else BLOCK
    size = form.itemsize
    source, position = _place(piece)
    for start in range(0, piece.elements, block):
        stop = min(start + block, piece.elements)
        work = _block(run, writer, form, piece, start, stop, offset + start * size)
        yield _Job(piece.key, (stop - start) * size, work, (source, position + start * size))


def _block(
    run: _Run, writer: Writer, form: Format, piece: Piece, start: int, stop: int, offset: int
) -> Callable[[Workspace], None]:
    def work(workspace: Workspace) -> None:
        with contextlib.ExitStack() as stack:
            if needs_whole_tensor(piece.term):
                stack.enter_context(run.whole_tensor)  # one at a time: memory, not speed, is scarce there
            values = stack.enter_context(workspace.block(stop - start))
            evaluate(piece.term, start, stop, values, workspace)
            if piece.copied is None:
                writer.write(_bytes(run.encoded(values, piece.key, start, form, piece.term)), offset)
                return
            run.encoded(values, piece.key, start, form, piece.term) if not _finite(values) else None
            raw = workspace.raw((stop - start) * form.itemsize)  # still holds what evaluate read
            writer.write(memoryview(raw.numpy()), offset)

    return work


def _scaled(run: _Run, writer: Writer, item: Weight, offset: int, scale_offset: int) -> Callable[[Workspace], None]:
    def blocks() -> Iterator[tuple[Piece, int, int]]:
        for piece in item.pieces:
            step = max(piece.elements, 1) if needs_whole_tensor(piece.term) else BLOCK
            for start in range(0, piece.elements, step):
                yield piece, start, min(start + step, piece.elements)

    def work(workspace: Workspace) -> None:
        scale = item.scale
        if scale is None:  # the largest magnitude decides the scale, so every block is computed twice
            largest = 0.0
            for piece, start, stop in blocks():
                with workspace.block(stop - start) as values:
                    evaluate(piece.term, start, stop, values, workspace)
                    if not _finite(values):
                        raise _why_nonfinite(piece.term, piece.key)
                    largest = max(largest, float(values.abs().max()))
            scale = scale_for(largest, item.form)
        position = offset
        for piece, start, stop in blocks():
            with workspace.block(stop - start) as values:
                evaluate(piece.term, start, stop, values, workspace)
                if piece.copied is not None:
                    data = memoryview(workspace.raw(stop - start).numpy())
                else:
                    values.div_(scale).clamp_(-item.form.largest, item.form.largest)
                    data = _bytes(run.encoded(values, piece.key, start, item.form, piece.term))
                writer.write(data, position)
            position += stop - start
        writer.write(_bytes(torch.tensor([scale], dtype=torch.float32)), scale_offset)

    return work


def _carry(item: Carried, writer: Writer, offset: int) -> Iterator[_Job]:
    for start in range(0, item.nbytes, _COPY):
        count = min(_COPY, item.nbytes - start)

        def work(workspace: Workspace, start: int = start, count: int = count) -> None:
            raw = memoryview(workspace.raw(count).numpy())
            item.reader.read_into(raw, item.entry.offset + start)
            writer.write(raw, offset + start)

        yield _Job(item.name, count, work, (0, item.entry.offset + start))


def _fill(run: _Run, key: str, found: Term, target: torch.Tensor) -> Callable[[Workspace], None]:
    form = next(form for form in BY_TAG.values() if form.torch == target.dtype)

    def work(workspace: Workspace) -> None:
        count = target.numel()
        step = max(count, 1) if needs_whole_tensor(found) else BLOCK
        flat = target.view(-1)
        for start in range(0, count, step):
            stop = min(start + step, count)
            with workspace.block(stop - start) as values:
                evaluate(found, start, stop, values, workspace)
                flat[start:stop].copy_(run.encoded(values, key, start, form, found))

    return work


def _module_slices(expression: Weights, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    slices: dict[str, torch.Tensor] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        keys = layouts.canonical(name)
        values = value.detach()
        if values.is_meta or not values.is_contiguous() or values.dtype not in {f.torch for f in BY_TAG.values()}:
            raise MismatchError(
                "load_into", "this parameter cannot be written in place", key=name,
                expected="a contiguous float tensor in memory", found=f"{values.dtype}, {values.device}",
            )  # fmt: skip
        slices |= dict(zip(keys, values.chunk(len(keys)) if len(keys) > 1 else [values], strict=True))
    for key, shape in expression.shapes.items():
        if key not in slices or tuple(slices[key].shape) != shape:
            found = tuple(slices[key].shape) if key in slices else "no such parameter"
            raise MismatchError("load_into", "the module does not fit", key=key, expected=shape, found=found)
    if extra := [key for key in slices if key not in expression.shapes]:
        raise MismatchError("load_into", "the module has a parameter that the weights lack", key=extra[0])
    return {key: slices[key] for key in expression.shapes}


def _checked_options(options: Mapping[str, Any]) -> Options:
    known = Options.__dataclass_fields__
    for name in options:
        if name not in known:
            raise UnknownNameError("save", "unknown option", found=repr(name), fix=nearest(name, known))
    chosen = Options(**options)
    if chosen.rounding not in ("nearest", "stochastic"):
        fix = nearest(str(chosen.rounding), ["nearest", "stochastic"])
        raise UnknownNameError("save", "unknown rounding", found=repr(chosen.rounding), fix=fix)
    if chosen.threads is not None and chosen.threads < 1:
        raise OutputError("save", "at least one thread is needed", found=chosen.threads)
    _device(chosen.device)
    return chosen


def _check_target(expression: Weights, target: Path, chosen: Options, limit: int | None) -> None:
    inputs = [leaf for leaf in expression.leaves() if isinstance(leaf, Checkpoint)]
    for leaf in inputs:
        for path in (leaf.path, *(reader.path for reader in leaf.files)):
            if same_file(target, path):
                raise OutputError("save", "the output is one of the inputs", file=target, found=f"the same file as {path}", fix="save under another name")
    if limit is not None and target.suffix == ".safetensors":
        raise OutputError("save", "shards need a folder", file=target, fix="name a folder, without .safetensors")
    if not _is_folder(target, chosen) and target.suffix != ".safetensors":
        raise OutputError("save", "a single file must end in .safetensors", file=target, found=target.name, fix=f"name it {target.name}.safetensors, or use layout='diffusers' or max_shard_size= for a folder")
    if chosen.comfy_compatible:
        for leaf in inputs:
            if form := next((f for f in leaf.storage.values() if f not in ("fp32", "fp16", "bf16")), None):
                raise AlgebraError("save", "comfy_compatible is exact for unquantised files only", file=leaf.path, expected="fp32, fp16 or bf16", found=form, fix="leave comfy_compatible off")


def _is_folder(target: Path, chosen: Options) -> bool:
    return chosen.max_shard_size is not None or (chosen.layout == "diffusers" and target.suffix != ".safetensors")


def _open_output(
    stack: contextlib.ExitStack, target: Path, chosen: Options, plan: Plan, headers: list[bytes]
) -> tuple[list[Writer], list[str]]:
    sizes = [len(h) + sum(item.nbytes for item in items) for h, items in zip(headers, plan.files, strict=True)]
    if not _is_folder(target, chosen):
        return [stack.enter_context(whole_file(target, sizes[0]))], [target.name]
    folder = stack.enter_context(whole_folder(target, sum(sizes)))
    stem = "diffusion_pytorch_model" if plan.layout == "diffusers" else "model"
    count = len(sizes)
    names = [f"{stem}-{i:05}-of-{count:05}.safetensors" if count > 1 else f"{stem}.safetensors" for i in range(1, count + 1)]
    with _disk_errors(target):
        writers = [Writer(folder / name, size) for name, size in zip(names, sizes, strict=True)]
    for writer in writers:
        stack.callback(writer.close)
    return writers, names


def _write_companion_files(
    stack: contextlib.ExitStack, target: Path, expression: Weights, chosen: Options, plan: Plan,
    writers: list[Writer], names: list[str],
) -> None:  # fmt: skip
    if not _is_folder(target, chosen):
        return
    folder = writers[0].path.parent
    with _disk_errors(target):
        if plan.layout == "diffusers":
            config, guessed = _config(expression)
            plan.notes.extend([guessed] if guessed else [])
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if len(names) > 1:
            weight_map = {item.name: name for items, name in zip(plan.files, names, strict=True) for item in items}
            index = {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}
            stem = names[0].split("-0")[0]
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _config(expression: Weights) -> tuple[dict[str, Any], str | None]:
    for leaf in expression.leaves():
        if isinstance(leaf, Checkpoint) and leaf.config is not None:
            return leaf.config, None
    architecture = expression.leading.architecture
    note = None if architecture.head == 128 else "config.json: rotary axes are not in the weights and were guessed from the head size"
    return architecture.diffusers_config(), note


def _recipe(expression: Weights, chosen: Options, hashes: Mapping[Reader, str]) -> Recipe:
    from alkahest import __version__

    names = name_leaves(expression)
    inputs = {
        name: [{"file": r.path.name, "bytes": r.size, "blake3": hashes[r]} for r in leaf.files]
        for leaf, name in names.items()
        if isinstance(leaf, Checkpoint)
    }
    return Recipe(expression.text(names), inputs, chosen.record(), __version__)


def _header(items: list[Item], recipe: Recipe) -> bytes:
    metadata = {"format": "pt", METADATA_KEY: recipe.to_json()}
    return build_header(((item.name, item.tag, item.shape) for item in items), metadata)


def _readers(expression: Weights) -> list[Reader]:
    return [reader for leaf in expression.leaves() if isinstance(leaf, Checkpoint) for reader in leaf.files]


def _result(
    expression: Weights, target: Path, names: list[str], plan: Plan, run: _Run, nbytes: int, seconds: float
) -> Saved:
    weights = list(plan.weights())
    pieces = [piece for weight in weights for piece in weight.pieces]
    copied = sum(piece.copied is not None for piece in pieces)
    changes = dict(restored(weights))
    files = [target if len(names) == 1 and names[0] == target.name else target / name for name in names]
    return Saved(
        target, files, nbytes, seconds, len(pieces) - copied - sum(changes.values()), copied, changes,
        dict(run.nonfinite), dict(run.overflowed), plan.notes, expression.text(),
    )  # fmt: skip


def _why_nonfinite(found: Term, key: str) -> NonFiniteError:
    for source in sources(found):
        if isinstance(source.leaf, Checkpoint):
            bad = int((~torch.isfinite(source.leaf[source.key].float())).sum())
            if bad:
                stored = source.leaf.slices[source.key].stored
                return NonFiniteError(
                    "save", "an input holds NaN or infinity", file=stored.reader.path, key=key, expected="finite numbers",
                    found=f"{bad:,} of them in this tensor", fix="get the file again, or allow_nonfinite=True to keep them",
                )  # fmt: skip
    return NonFiniteError("save", "the result overflows float32", key=key, fix="use a smaller multiplier")


def _overflow(key: str, form: Format, magnitude: float) -> NonFiniteError:
    return NonFiniteError(
        "save", f"a value is too large for {form.name}", key=key, expected=f"at most {form.largest:g}",
        found=f"{magnitude:g}", fix="use bf16, fp32 or a scaled fp8 form, or allow_nonfinite=True",
    )  # fmt: skip


def _finite(values: torch.Tensor) -> bool:
    low, high = torch.aminmax(values)
    return math.isfinite(float(low)) and math.isfinite(float(high))


def _place(piece: Piece) -> tuple[int, int]:
    first = next(sources(piece.term), None)
    if first is None or not isinstance(first.leaf, Checkpoint):
        return (0, 0)
    held = first.leaf.slices[first.key]
    return (first.leaf.files.index(held.stored.reader), held.offset)


def _bytes(values: torch.Tensor) -> memoryview:
    return memoryview(values.cpu().contiguous().view(torch.uint8).numpy())


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise OutputError("save", "the device is not there", found=f"{name!r}: {error}".splitlines()[0], fix="use device='cpu'") from None
    return device


def _processors() -> int:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(count, _MAX_THREADS))


def _bytes_of(size: int | str | None) -> int | None:
    if size is None or isinstance(size, int):
        return size
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = size[:-2].strip(), size[-2:].upper()
    if unit not in units or not number.replace(".", "", 1).isdigit():
        raise OutputError("save", "the shard size cannot be read", found=repr(size), fix="such as '5GB' or 5_000_000_000")
    return int(float(number) * units[unit])


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise output_error(error, target) from None

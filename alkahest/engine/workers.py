"""Workers: blocks computed side by side, checked for NaN and overflow, rounded once."""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from alkahest.engine.evaluate import evaluate, why_nonfinite
from alkahest.engine.events import Event
from alkahest.engine.loops import Kernels, combine, kernels
from alkahest.engine.options import Options
from alkahest.engine.readable import Workspace
from alkahest.engine.terms import Term, needs_whole_tensor, sources
from alkahest.errors import NonFiniteError
from alkahest.model.dtypes import FORMAT_OF, Format, encode, rounding_noise

BLOCK = 1 << 19  # elements: 2 MB in float32, small enough for caches, large enough for disks
_COMPILED = 2 << 30  # bytes, above which compiled loops pay for being loaded (0.4 s)
_COMPILED_OFTEN = 128 << 20  # the same where the work is repeated
_LISTEN = 0.05  # seconds between events
Key = TypeVar("Key")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """A piece of work for one worker. Jobs run in the order of ``place``, so that disks read forward."""

    key: str
    nbytes: int
    work: Callable[[Workspace], None]
    place: tuple[int, int] = (0, 0)


def spread(
    executor: Executor, function: Callable[..., Result], calls: Mapping[Key, tuple[Any, ...]]
) -> Iterator[tuple[Key, Result]]:
    """Results of calls on any executor, as they come; after an exception those not begun are dropped, and the others
    awaited.
    """
    futures = {executor.submit(function, *arguments): key for key, arguments in calls.items()}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        wait([future for future in futures if not future.cancel()])


class Run:
    """The workers of one save, and what they found out; ``often`` says that the like of it is done again and again."""

    def __init__(self, options: Options, often: bool = False) -> None:
        self.options = options
        self.cancelled = threading.Event()
        self.whole_tensor = threading.Lock()  # one at a time: memory, not speed, is scarce there
        self.nonfinite: Counter[str] = Counter()
        self.nothing_changed = True  # as far as `note_change` was told
        self.overflowed: Counter[str] = Counter()
        self._device = options.torch_device()
        self._often, self._is_large = often, False
        self._lock = threading.Lock()
        self._local = threading.local()

    def perform(self, jobs: list[Job]) -> Iterator[Job]:
        """Run the jobs; yield each as it is done. An exception, or closing the generator, drops the rest."""
        before = torch.get_num_threads()
        self._is_large = sum(job.nbytes for job in jobs) >= (_COMPILED_OFTEN if self._often else _COMPILED)
        waiting = iter(sorted(jobs, key=lambda job: job.place))
        done: deque[Job] = deque()
        count = self.options.worker_count()
        caller = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        pool = ThreadPoolExecutor(count, "alkahest", self._start_worker, (caller,))
        try:
            # Long loops, not a future for each job: waking this thread costs the workers more than a small job's
            # arithmetic.
            running = {pool.submit(self._work, waiting, done) for _ in range(count)}
            while running:
                ended, running = wait(running, _LISTEN, FIRST_COMPLETED)
                for loop in ended:
                    loop.result()
                while done:
                    yield done.popleft()
        except BaseException:
            self.cancelled.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(before)

    def progress(self, jobs: list[Job], result: Callable[[], Any] | None = None) -> Iterator[Event]:
        """`perform`, as events that add up the bytes of the jobs; at the end what ``result`` makes of the work."""
        done, total = 0, sum(job.nbytes for job in jobs)
        for job in self.perform(jobs):
            done += job.nbytes
            yield Event(done, total, job.key)
        if result is not None:
            yield Event(total, total, "done", result())

    def compute(self, term: Term, key: str, start: int, stop: int, workspace: Workspace, out: torch.Tensor) -> None:
        """Write elements ``start`` to ``stop`` of a term to ``out``, checked and rounded once to its dtype."""
        form = FORMAT_OF[out.dtype]
        if form.name == "bf16" and out.device.type == "cpu" and (loops := self._kernels()):
            largest = combine(term, start, stop, workspace, loops, out)
            if largest is not None and largest < form.largest + half_step(form):  # false for NaN
                return
        turn = self.whole_tensor if needs_whole_tensor(term) else contextlib.nullcontext()
        with turn, workspace.block(stop - start) as values:
            evaluate(term, start, stop, values, workspace)
            self.check(values, key, form, term)
            self.round(values, key, start, out)

    def note_change(
        self, before: Term, key: str, start: int, stop: int, workspace: Workspace, out: torch.Tensor
    ) -> None:
        """Learn whether computing made any difference: whether ``out`` is other than ``before``, rounded alike."""
        with workspace.block(stop - start) as values:
            evaluate(before, start, stop, values, workspace)
            rounded = torch.empty_like(out)
            self.round(values, key, start, rounded)
        self.tell_apart(rounded, out)

    def tell_apart(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """`note_change` for numbers that are there."""
        if not torch.equal(before.contiguous().view(torch.uint8), after.contiguous().view(torch.uint8)):
            self.nothing_changed = False

    def _count_read(self, key: str, count: int) -> None:
        with self._lock:
            self.nonfinite[f"{key}, as read"] += count

    def _kernels(self) -> Kernels | None:
        if not self._is_large or self.options.rounding != "nearest" or self._device.type != "cpu":
            return None
        with self._lock:  # loaded by one worker
            return kernels()

    def check(self, values: torch.Tensor, key: str, form: Format, term: Term) -> None:
        """Raise NonFiniteError for NaN, infinity, and what ``form`` cannot hold; or count them if allowed."""
        if values.numel() == 0:
            return
        # aminmax passes NaN on, and is many times faster than isfinite().all().
        low, high = (float(value) for value in torch.aminmax(values))
        limit = form.largest + half_step(form)
        if not (math.isfinite(low) and math.isfinite(high)):
            self._tally(self.nonfinite, key, ~torch.isfinite(values), lambda: why_nonfinite(term, key))
        elif max(-low, high) >= limit:
            self._tally(self.overflowed, key, values.abs() >= limit, lambda: _overflow(key, form, max(-low, high)))

    def round(self, values: torch.Tensor, key: str, start: int, out: torch.Tensor) -> None:
        """Round a checked float32 block once to the dtype of ``out``, and into it."""
        if values.device.type == "mps":  # has no float64 and no fp8
            values = values.cpu()
        if self.options.rounding == "stochastic":
            noise = rounding_noise(self.options.seed, key, start, values.numel(), values.device)
            values = encode(values, FORMAT_OF[out.dtype], noise)
        out.copy_(values)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """One worker at a time, with every processor, for work on whole tensors: memory is scarce there."""
        with self.whole_tensor:
            torch.set_num_threads(self.options.worker_count())
            try:
                yield
            finally:
                torch.set_num_threads(1)
                _give_back_memory()

    def _start_worker(self, caller: torch.cuda.Stream | None) -> None:
        # One thread per worker: torch's own threads would fight with ours for the processors.
        torch.set_num_threads(1)
        self._local.workspace = Workspace(self._device)
        if self.options.allow_nonfinite:
            self._local.workspace.watch = self._count_read
        if caller is not None:  # a stream for each worker: one's transfers run beside another's arithmetic
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            stream.wait_stream(caller)
            torch.cuda.set_stream(stream)

    def _work(self, waiting: Iterator[Job], done: deque[Job]) -> None:
        with torch.inference_mode():
            while not self.cancelled.is_set():
                with self._lock:
                    job = next(waiting, None)
                if job is None:
                    return
                try:
                    job.work(self._local.workspace)
                    if self._device.type == "cuda":
                        torch.cuda.current_stream(self._device).synchronize()
                except BaseException:
                    self.cancelled.set()
                    raise
                done.append(job)

    def _tally(self, tally: Counter[str], key: str, bad: torch.Tensor, error: Callable[[], Exception]) -> None:
        if not self.options.allow_nonfinite:
            raise error()
        with self._lock:
            tally[key] += int(bad.sum())


def _give_back_memory() -> None:
    """Let glibc return what was freed: with many threads its pools keep a gigabyte in small gaps. Elsewhere nothing."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def blocks(term: Term, elements: int, most: int = 1) -> Iterator[tuple[int, int]]:
    """Element ranges to compute one after the other, ``most`` times `BLOCK`: all at once if a method needs the whole
    tensor.
    """
    step = max(elements, 1) if needs_whole_tensor(term) else most * BLOCK
    for start in range(0, elements, step):
        yield start, min(start + step, elements)


def place_of(term: Term | None, start: int = 0, otherwise: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    """Where element ``start`` of a term's first tensor lies: number of the file and position in it, the `Job.place`
    that reads forward.

    All blocks of a packed tensor have one place, because it is decoded whole. ``otherwise`` is for what is in no file.
    """
    first = next(sources(term), None)
    held = None if first is None else first.leaf.stored(first.key)
    if first is None or held is None:
        return otherwise
    file = first.leaf.files.index(held.stored.reader)
    if held.stored.packed is not None:
        return (file, held.stored.entry.offset)
    return (file, held.offset + start * held.stored.form.itemsize)


def half_step(form: Format) -> float:
    """Half the distance between the two largest numbers: from there on rounding overflows."""
    return float(2.0 ** (math.floor(math.log2(form.largest)) - form.mantissa - 1))


def _overflow(key: str, form: Format, magnitude: float) -> NonFiniteError:
    return NonFiniteError(
        "save",
        f"a value is too large for {form.name}",
        key=key,
        expected=f"at most {form.largest:g}",
        found=f"{magnitude:g}",
        fix="use bf16, fp32 or a scaled fp8 form, or allow_nonfinite=True",
    )

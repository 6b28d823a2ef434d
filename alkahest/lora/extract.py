"""Extract a LoRA from any delta: what a variant learned, or a supplement, in a small file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alkahest.algebra.deltas import Delta
from alkahest.algebra.leaves import DeltaLeaf
from alkahest.engine.events import Event, result_of
from alkahest.engine.options import Options
from alkahest.engine.readable import Workspace
from alkahest.engine.record import Recipe, inputs_of, stream_hashes
from alkahest.engine.scalars import Rules
from alkahest.engine.terms import name_leaves
from alkahest.engine.workers import Job, Run, place_of, spread
from alkahest.errors import AlgebraError, UnsupportedError, refuse_unknown_options, unknown
from alkahest.files.cache import KINDS
from alkahest.files.reader import Reader
from alkahest.lora.decompose import METHODS
from alkahest.lora.parts import Parts
from alkahest.lora.rank import MIN_DIM, RankRule
from alkahest.lora.result import Extracted
from alkahest.lora.tensor import Choice, Done, Extraction
from alkahest.lora.write import Pair
from alkahest.measure.remembered import content_key, title_of
from alkahest.model.dtypes import FORMATS, storage_name
from alkahest.model.keys import Pattern
from alkahest.sources.lora import Lora
from alkahest.version import __version__

if TYPE_CHECKING:
    import pandas

_DTYPES = ("bf16", "fp16", "fp32")
_SHOWN = 8  # tensors, of a table that fills
_TASK = 1 << 26  # bytes in float32 that one task of an executor takes on, at least


@refuse_unknown_options
def extract_lora(
    delta: Delta,
    *,
    rank: int | None = None,
    energy: float | None = None,
    sum: float | None = None,
    ratio: float | None = None,
    noise_edge: bool = False,
    rank_max: int | None = 64,
    include: str | None = None,
    exclude: str | None = None,
    full: str | None = None,
    rounding: bool = False,
    min_dim: int | None = None,
    alpha: float | None = None,
    dtype: str | torch.dtype | None = None,
    method: str = "auto",
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    executor: Executor | None = None,
) -> Extracted:
    """Make a LoRA of a delta: thin factors for every matrix that it changes.

    LoRAs are deltas: ``extract_lora(lora, rank=16)`` resizes one and ``extract_lora(a + 0.5 * b, energy=1)`` merges
    two, from their factors alone; what they hold whole is kept. Work is kept in the cache until it is saved, so that a
    run that was killed goes on.

    Parameters
    ----------
    delta : Delta
        What becomes a LoRA: a difference of two models, or a LoRA.
    rank, energy, sum, ratio : number, optional
        How much is kept, by one rule (`alkahest.lora.rank.RULES`); energy=0.995 if none is given.
    noise_edge : bool, default False
        Stop at singular values that rounding of the variant's file makes by itself.
    rank_max : int or None, default 64
        Caps ``energy``, ``sum`` and ``ratio``, as the article's tool; None for no cap.
    include, exclude : str, optional
        Patterns of tensors that are taken and left.
    full : str, optional
        A pattern of tensors that are kept whole, before any other choice; norms, biases and pad tokens too, which load
        in ComfyUI only.
    rounding : bool, default False
        Also take tensors that differ by no more than rounding of the variant's file.
    min_dim : int, optional
        Leave out matrices with a side below this, 32 unless it is given.
    alpha : float, optional
        By default none is stored: scales are multiplied into the factors.
    dtype : str or torch.dtype, optional
        bf16, fp16 or fp32.
    method : str, default "auto"
        ``exact``, ``randomised`` or ``auto``.
    seed : int, default 0
        Of the randomised method.
    device : str, default "cpu"
        What works on it.
    threads : int, optional
        How many, by default all cores.
    executor : concurrent.futures.Executor, optional
        Tensors are shared out over it, each with ``threads`` of its own; dask's ``client.get_executor()`` is one.

    Returns
    -------
    Extracted
        ``save(path)`` writes it; its report has a row for each matrix.

    Raises
    ------
    AlgebraError
        For a zero delta or a rule out of range.
    UnknownNameError
        For a pattern that selects nothing.
    NonFiniteError
        For NaN and infinity.

    Examples
    --------
    >>> extracted = ak.extract_lora(variant - base, energy=0.9, rank_max=16, exclude="refiner")
    >>> lora = extracted.save("variant-lora.safetensors")
    """
    found: Extracted = result_of(
        stream_extract_lora(
            delta,
            rank=rank,
            energy=energy,
            sum=sum,
            ratio=ratio,
            noise_edge=noise_edge,
            rank_max=rank_max,
            include=include,
            exclude=exclude,
            full=full,
            rounding=rounding,
            min_dim=min_dim,
            alpha=alpha,
            dtype=dtype,
            method=method,
            seed=seed,
            device=device,
            threads=threads,
            executor=executor,
        ),
        "extract_lora",
    )
    return found


@refuse_unknown_options
def stream_extract_lora(
    delta: Delta,
    *,
    rank: int | None = None,
    energy: float | None = None,
    sum: float | None = None,
    ratio: float | None = None,
    noise_edge: bool = False,
    rank_max: int | None = 64,
    include: str | None = None,
    exclude: str | None = None,
    full: str | None = None,
    rounding: bool = False,
    min_dim: int | None = None,
    alpha: float | None = None,
    dtype: str | torch.dtype | None = None,
    method: str = "auto",
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    executor: Executor | None = None,
) -> Iterator[Event]:
    """`extract_lora` as a generator of events."""
    if not isinstance(delta, Delta):
        raise AlgebraError("extract_lora", "a delta is needed", found=type(delta).__name__, fix="variant - base")
    rule = RankRule.of(
        {"rank": rank, "energy": energy, "sum": sum, "ratio": ratio}, rank_max, noise_edge, "extract_lora"
    )
    for name, pattern in (("include", include), ("exclude", exclude), ("full", full)):
        if pattern is not None:
            Pattern(pattern, delta.family).require_match(delta.shapes, name)
    for name, value in (("min_dim", min_dim), ("alpha", alpha)):
        if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise AlgebraError("extract_lora", f"{name} must be a number above zero", found=repr(value))
    if method not in METHODS:
        raise unknown("extract_lora", "unknown method", method, METHODS)
    if seed and method == "exact":
        fix = "method='auto' or 'randomised', or leave the seed out"
        raise AlgebraError("extract_lora", "the exact method has no seed", found=f"seed={seed}", fix=fix)
    from_loras = all(isinstance(leaf, DeltaLeaf) for leaf in delta.leaves())
    kept = Choice(
        include,
        exclude,
        full,
        (1 if from_loras else MIN_DIM) if min_dim is None else int(min_dim),
        from_loras,
        delta.family,
    )
    asked = Extraction(delta, rule, kept, alpha, _dtype(dtype, delta), method, seed, rounding)
    return _Work(asked, Options(device=device, threads=threads).require("extract_lora")).events(executor)


@dataclass
class _Work:
    """An extraction as it goes on: rows of the report, and what is stored, by tensor."""

    asked: Extraction
    options: Options
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    pairs: dict[str, Pair] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    parts: Parts = field(default_factory=lambda: Parts(None))

    def events(self, executor: Executor | None) -> Iterator[Event]:
        asked, delta = self.asked, self.asked.delta
        sizes = {key: 4 * math.prod(shape) for key, shape in delta.shapes.items() if delta.at(key, Rules()) is not None}
        total = sum(sizes.values())
        readers = [reader for leaf in delta.leaves() for reader in leaf.files]
        hashes = yield from stream_hashes(readers, total)
        name = content_key(
            "extract_lora",
            [delta],
            [
                KINDS["extractions"].format(),
                asked.rule,
                asked.alpha,
                asked.dtype,
                asked.method,
                asked.seed,
                asked.rounding,
            ],
        )
        self.parts = Parts(name)
        todo = {key: size for key, size in sizes.items() if not self._was_done(key)}
        done = total - sum(todo.values())
        for key in self._here(todo) if executor is None else self._spread(todo, executor):
            done += todo[key]
            yield Event(done, total, key, so_far=self._rows_so_far)
        for reader in readers:
            reader.check_unchanged()
        yield Event(total, total, "done", self._result(hashes, readers))

    def _rows_so_far(self) -> pandas.DataFrame:
        import pandas as pd

        shown = ("tensor", "kept", "rank", "energy")
        return pd.DataFrame([{name: row.get(name) for name in shown} for row in list(self.rows.values())[-_SHOWN:]])

    def _was_done(self, key: str) -> bool:
        """Take a tensor that an earlier run has finished, if it has."""
        if self.asked.choice.of(key, self.asked.delta.shapes[key]) != "LoRA" or not (known := self.parts.load(key)):
            return False
        self.rows[key], self.pairs[key] = known
        return True

    def _here(self, sizes: Mapping[str, int]) -> Iterator[str]:
        """Do the tensors in this process; the name of each when it is done."""
        jobs = _jobs(self.asked, run := Run(self.options), sizes, self._take)
        yield from (job.key for job in run.perform(jobs))

    def _spread(self, sizes: Mapping[str, int], executor: Executor) -> Iterator[str]:
        """`_here`, in tasks of an executor."""
        tasks: list[list[str]] = []
        room = 0
        for key, size in sizes.items():
            if room <= 0:
                tasks.append([])
                room = _TASK
            tasks[-1].append(key)
            room -= size
        calls = {number: (self.asked, self.options, keys) for number, keys in enumerate(tasks)}
        for _, found in spread(executor, extract_tensors, calls):
            for key, done in found.items():
                self._take(key, done)
                yield key

    def _take(self, key: str, done: Done) -> None:
        if not done.row:
            return
        self.rows[key] = done.row
        if done.whole is not None:
            self.whole[key] = done.whole
        if done.pair is not None:
            self.parts.store(key, done.row, done.pair)
            # From now on the numbers are the file's, which memory need not hold.
            _, self.pairs[key] = self.parts.load(key) or ({}, done.pair)

    def _result(self, hashes: Mapping[Reader, str], readers: list[Reader]) -> Extracted:
        import pandas as pd

        asked = self.asked
        if not self.rows:
            raise AlgebraError(
                "extract_lora",
                "the delta is zero: there is nothing to extract",
                found=asked.delta.text(),
                fix="choose a variant that differs from its base",
            )
        if not (self.pairs or self.whole):
            reasons = ", ".join(sorted({row["kept"] for row in self.rows.values()}))
            raise AlgebraError(
                "extract_lora",
                "nothing is left to extract",
                found=f"{len(self.rows)} changed tensors, all left out: {reasons}",
                fix="change include, exclude, min_dim, rounding or noise_edge",
            )
        report = pd.DataFrame([self.rows[key] for key in asked.delta.shapes if key in self.rows])
        report.attrs["of"] = title_of(asked.delta)
        text = f"{asked.rule.text}{asked.choice.text}" + (f", alpha={asked.alpha:g}" if asked.alpha else "")
        text += ", rounding=True" if asked.rounding else ""
        names = name_leaves(asked.delta)
        recipe = Recipe(
            f"extract_lora({asked.delta.text(names)}, {text})",
            inputs_of(names, hashes),
            {"dtype": asked.dtype, "method": asked.method, "seed": asked.seed, "energy": _energy(report, of="LoRA")},
            __version__,
        )
        return Extracted(
            self.pairs,
            self.whole,
            report,
            recipe,
            asked.delta.family,
            tuple(reader.path for reader in readers),
            self.parts,
        )


def extract_tensors(asked: Extraction, options: Options, keys: Sequence[str]) -> dict[str, Done]:
    """Some tensors of an extraction, in any process."""
    found: dict[str, Done] = {}
    run = Run(options)
    for _ in run.perform(_jobs(asked, run, dict.fromkeys(keys, 0), found.__setitem__)):
        pass
    return found


def _jobs(asked: Extraction, run: Run, sizes: Mapping[str, int], take: Callable[[str, Done], None]) -> list[Job]:
    def work_on(key: str) -> Callable[[Workspace], None]:
        return lambda workspace: take(key, asked.of(key, run, workspace))

    return [Job(key, size, work_on(key), place_of(asked.delta.at(key, Rules()))) for key, size in sizes.items()]


def _energy(report: pandas.DataFrame, of: str) -> float:
    rows = report[report.kept == of]
    squares = rows.delta_norm**2
    return float((squares * rows.energy).sum() / squares.sum()) if len(rows) else 0.0


def _dtype(dtype: Any, delta: Delta) -> str:
    """What is asked for, else what the first LoRA has, else bf16."""
    if dtype is not None and str(dtype).removeprefix("torch.") not in (*_DTYPES, "bfloat16", "float16", "float32"):
        raise UnsupportedError(
            "extract_lora", "a LoRA is stored in one of three dtypes", expected=", ".join(_DTYPES), found=str(dtype)
        )
    if dtype is None:
        first = delta.leaves()[0]
        tags = {FORMATS[name].tag: name for name in _DTYPES}
        stored = first.factor_dtype if isinstance(first, Lora) else ""
        return tags.get(stored, "bf16")
    return storage_name(dtype)

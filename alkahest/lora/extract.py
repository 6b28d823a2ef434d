"""Extract a LoRA from any delta: what a variant learned, or a supplement, in a small file."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alkahest import __version__
from alkahest.delta_table import names_of
from alkahest.dtypes import FORMATS, storage_name
from alkahest.errors import AlgebraError, NonFiniteError, UnknownNameError, UnsupportedError, nearest
from alkahest.expr import Delta, DeltaLeaf, name_leaves
from alkahest.files import Reader
from alkahest.hashes import blake3_of
from alkahest.keys import Pattern
from alkahest.lora.decompose import METHODS, Decomposition, decomposed, of_loras
from alkahest.lora.noise import Noise, noise_of
from alkahest.lora.parts import Parts
from alkahest.lora.rank import MIN_DIM, RankRule
from alkahest.lora.read import Lora
from alkahest.lora.result import Extracted
from alkahest.lora.write import Pair
from alkahest.options import Options
from alkahest.recipe import Recipe
from alkahest.remembered import content_key, title_of
from alkahest.scalar import Rules
from alkahest.spectrum import matrix_of
from alkahest.stream import inputs_of
from alkahest.tally import count_changed, sum_of_squares
from alkahest.term import Term, Workspace, evaluate
from alkahest.work import Event, Job, Run, blocks, finished, place_of, why_nonfinite

if TYPE_CHECKING:
    import pandas

_DTYPES = ("bf16", "fp16", "fp32")


def extract_lora(delta: Delta, **options: Any) -> Extracted:
    """Make a LoRA of a delta: thin factors for every matrix that it changes.

    >>> lora = ak.extract_lora(base - bridge, energy=0.995, exclude="refiner")
    >>> lora.save("supplement.safetensors")

    How much is kept, by one rule (`alkahest.lora.rank.RULES`): ``rank``, ``energy`` (default 0.995), ``sum`` or
    ``ratio``; ``rank_max`` (64, as the article's tool; None for none) caps the last three. ``noise_edge=True`` stops at
    singular values that rounding of the variant's file makes by itself. Which tensors: ``include`` and ``exclude``
    patterns, ``min_dim`` (32) for both sides; those of a ``full`` pattern are kept whole, before any
    other choice, norms, biases and pad tokens too, which load in ComfyUI only. How: ``dtype`` bf16, fp16 or fp32; ``alpha`` (default: folded in);
    ``method`` exact, randomised (with ``seed``) or auto; ``device``, ``threads``.

    LoRAs are deltas: ``extract_lora(lora, rank=16)`` resizes one and ``extract_lora(a + 0.5 * b, energy=1)`` merges
    two, from their factors alone; what they hold whole is kept. Work is kept in the cache until it is saved, so
    that a run that was killed goes on. Raises AlgebraError for a zero delta or a rule out of range,
    UnknownNameError for a pattern that selects nothing, NonFiniteError for NaN and infinity.
    """
    found: Extracted = finished(stream_extract_lora(delta, **options))
    return found


def stream_extract_lora(
    delta: Delta, *, rank: int | None = None, energy: float | None = None, sum: float | None = None, ratio: float | None = None,
    noise_edge: bool = False, rank_max: int | None = 64, include: str | None = None, exclude: str | None = None,
    full: str | None = None, min_dim: int | None = None, alpha: float | None = None, dtype: Any = None, method: str = "auto",
    seed: int = 0, **options: Any,
) -> Iterator[Event]:  # fmt: skip
    """`extract_lora` as a generator of events."""
    if not isinstance(delta, Delta):
        raise AlgebraError("extract_lora", "a delta is needed", found=type(delta).__name__, fix="variant - base")
    rule = RankRule.checked({"rank": rank, "energy": energy, "sum": sum, "ratio": ratio}, rank_max, noise_edge, "extract_lora")  # fmt: skip
    for name, pattern in (("include", include), ("exclude", exclude), ("full", full)):
        if pattern is not None:
            Pattern(pattern).require_match(delta.shapes, name)
    for name, value in (("min_dim", min_dim), ("alpha", alpha)):
        if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise AlgebraError("extract_lora", f"{name} must be a number above zero", found=repr(value))
    if method not in METHODS:
        raise UnknownNameError("extract_lora", "unknown method", found=repr(method), fix=nearest(str(method), METHODS))
    from_loras = all(isinstance(leaf, DeltaLeaf) for leaf in delta.leaves())
    kept = Choice(
        include, exclude, full, (1 if from_loras else MIN_DIM) if min_dim is None else int(min_dim), from_loras
    )
    work = _Work(delta, rule, kept, alpha, _dtype(dtype, delta), method, seed, Run(Options.checked(options)))
    return work.events()


@dataclass(frozen=True)
class Choice:
    """Which tensors become a LoRA, which are kept whole, and why the others are left out."""

    include: str | None
    exclude: str | None
    full: str | None
    min_dim: int
    from_loras: bool

    def of(self, key: str, shape: tuple[int, ...]) -> str:
        if self.full and Pattern(self.full).matches(key):
            return "full"
        if (self.exclude and Pattern(self.exclude).matches(key)) or (
            self.include and not Pattern(self.include).matches(key)
        ):
            return "excluded"
        if len(shape) != 2 or min(shape) < 2 or not key.endswith(".weight"):
            return "full" if self.from_loras else "no matrix"
        return "too small" if min(shape) < self.min_dim else "LoRA"

    @property
    def text(self) -> str:
        """As keyword arguments."""
        given: dict[str, Any] = {"include": self.include, "exclude": self.exclude, "full": self.full}
        given |= {"min_dim": self.min_dim} if self.min_dim not in (1, MIN_DIM) else {}
        return "".join(f", {name}={value!r}" for name, value in given.items() if value)


@dataclass
class _Work:
    delta: Delta
    rule: RankRule
    choice: Choice
    alpha: float | None
    dtype: str
    method: str
    seed: int
    run: Run
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    pairs: dict[str, Pair] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    parts: Parts = field(default_factory=lambda: Parts(None))

    def events(self) -> Iterator[Event]:
        rules = Rules()
        terms = {key: found for key in self.delta.shapes if (found := self.delta.at(key, rules)) is not None}
        jobs = [Job(key, 4 * math.prod(self.delta.shapes[key]), self._job(key, found), place_of(found)) for key, found in terms.items()]  # fmt: skip
        readers = [reader for leaf in self.delta.leaves() for reader in leaf.files]
        total = math.fsum(job.nbytes for job in jobs)
        hashes: dict[Reader, str] = {}
        yield from _hashed(readers, int(total), hashes)
        name = content_key("extract_lora", [self.delta], [self.rule, self.alpha, self.dtype, self.method, self.seed])
        self.parts = Parts(name)
        yield from self.run.progress(jobs)
        for reader in readers:
            reader.check_unchanged()
        yield Event(int(total), int(total), "done", self._result(hashes, readers))

    def _job(self, key: str, term: Term) -> Any:
        def work(workspace: Workspace) -> None:
            kept = self.choice.of(key, self.delta.shapes[key])
            if kept == "LoRA" and (known := self.parts.load(key)):
                self.rows[key], self.pairs[key] = known
                return
            if kept == "LoRA":
                with self.run.alone():
                    row = self._thin(key, term, workspace)
            elif kept == "full":
                row = self._kept_whole(key, term, workspace)
            else:
                row = self._left_out(key, term, kept, workspace)
            if row:
                self.rows[key] = {**names_of(key), "shape": self.delta.shapes[key], **row}
                if row["kept"] == "LoRA":
                    self.parts.store(key, self.rows[key], self.pairs[key])
                    # From now on the numbers are the file's, which memory need not hold.
                    _, self.pairs[key] = self.parts.load(key) or ({}, self.pairs[key])

        return work

    def _left_out(self, key: str, term: Term, why: str, workspace: Workspace) -> dict[str, Any]:
        squares = 0.0
        for start, stop in blocks(term, math.prod(self.delta.shapes[key])):
            with workspace.block(stop - start) as values:
                evaluate(term, start, stop, values, workspace)
                squares += self._squares(values, key, term)
        return _row(why, 0, 0.0, squares, Noise(), math.nan, False, 0) if squares else {}

    def _kept_whole(self, key: str, term: Term, workspace: Workspace) -> dict[str, Any]:
        values = matrix_of(term, self.delta.shapes[key], workspace).cpu()
        squares = self._squares(values, key, term)
        if squares == 0:
            return {}
        stored = self.whole[key] = values.to(FORMATS[self.dtype].torch)
        energy = 1 - sum_of_squares((values - stored.float()).flatten()) / squares
        return _row("full", 0, energy, squares, Noise(), math.nan, False, stored.nbytes)

    def _thin(self, key: str, term: Term, workspace: Workspace) -> dict[str, Any]:
        """A matrix as its leading part."""
        shape = (self.delta.shapes[key][0], self.delta.shapes[key][1])
        noise, found = Noise(), of_loras(term, key, shape)
        if found is None:
            matrix = matrix_of(term, shape, workspace)
            squares = self._squares(matrix, key, term)
            if squares > 0:
                noise = noise_of(term, shape, squares, count_changed(matrix) / matrix.numel(), workspace)
                self._require_noise(noise, key)
                found = decomposed(matrix, squares, self.rule, noise.edge, self.method, self.seed, key)
        if found is None or found.squares == 0:
            return {}
        self._require_noise(noise, key)
        edge_rank = float((found.s > noise.edge).sum()) if math.isfinite(noise.edge) else math.nan
        pair, energy, capped = self._pair(found, noise.edge, min(shape), key)
        if pair is None:
            return _row("noise", 0, 0.0, found.squares, noise, edge_rank, False, 0)
        self.pairs[key] = pair
        return _row("LoRA", pair.rank, energy, found.squares, noise, edge_rank, capped, pair.up.nbytes + pair.down.nbytes)  # fmt: skip

    def _pair(self, found: Decomposition, edge: float, side: int, key: str) -> tuple[Pair | None, float, bool]:
        asked = self.rule.choose(found.s, found.squares, found.complete, edge)
        most = min(self.rule.cap(side), len(found.s))
        rank = most if asked is None else min(asked, most)
        if rank == 0:
            return None, 0.0, False
        capped = asked is None or asked > rank
        # Rounding the factors takes a little energy again: one direction more makes up for it.
        wanted = self.rule.value if self.rule.name == "energy" and not (capped or self.rule.noise_edge) else 0.0
        for tried in range(rank, min(rank + 2, most) + 1):
            scale = 1.0 if self.alpha is None else self.alpha / tried
            up, down = (half.cpu() for half in found.split(tried, scale, FORMATS[self.dtype].torch))
            if not (torch.isfinite(up).all() and torch.isfinite(down).all()):
                raise NonFiniteError("extract_lora", f"the factors are too large for {self.dtype}", key=key, fix="dtype='bf16'")  # fmt: skip
            energy = 1 - found.lost(up, down, scale) / found.squares
            if energy >= wanted or wanted == 1.0:
                break
        return Pair(up, down, scale), energy, capped

    def _squares(self, values: Tensor, key: str, term: Term) -> float:
        squares = sum_of_squares(values.flatten())
        if not math.isfinite(squares):
            raise why_nonfinite(term, key, "extract_lora")
        return squares

    def _require_noise(self, noise: Noise, key: str) -> None:
        if self.rule.noise_edge and not math.isfinite(noise.edge):
            raise AlgebraError(
                "extract_lora", "the rounding noise of this delta is not known", key=key, expected="number * (checkpoint - checkpoint)",
                found=self.delta.text(), fix="leave noise_edge out, and choose energy= or rank=",
            )  # fmt: skip

    def _result(self, hashes: Mapping[Reader, str], readers: list[Reader]) -> Extracted:
        import pandas as pd

        if not self.rows:
            raise AlgebraError("extract_lora", "the delta is zero: there is nothing to extract", found=self.delta.text(), fix="choose a variant that differs from its base")  # fmt: skip
        if not (self.pairs or self.whole):
            reasons = ", ".join(sorted({row["kept"] for row in self.rows.values()}))
            raise AlgebraError("extract_lora", "nothing is left to extract", found=f"{len(self.rows)} changed tensors, all left out: {reasons}", fix="change include, exclude, min_dim or noise_edge")  # fmt: skip
        report = pd.DataFrame([self.rows[key] for key in self.delta.shapes if key in self.rows])
        report.attrs["of"] = title_of(self.delta)
        text = f"{self.rule.text}{self.choice.text}" + (f", alpha={self.alpha:g}" if self.alpha else "")
        names = name_leaves(self.delta)
        recipe = Recipe(
            f"extract_lora({self.delta.text(names)}, {text})",
            inputs_of(names, hashes),
            {"dtype": self.dtype, "method": self.method, "seed": self.seed, "energy": _energy(report, of="LoRA")}, __version__,
        )  # fmt: skip
        return Extracted(self.pairs, self.whole, report, recipe, tuple(reader.path for reader in readers), self.parts)


def _energy(report: pandas.DataFrame, of: str) -> float:
    rows = report[report.kept == of]
    squares = rows.delta_norm**2
    return float((squares * rows.energy).sum() / squares.sum()) if len(rows) else 0.0


def _row(kept: str, rank: int, energy: float, squares: float, noise: Noise, edge_rank: float, capped: bool, nbytes: int) -> dict[str, Any]:  # fmt: skip
    return {
        "kept": kept, "rank": rank, "energy": energy, "delta_norm": math.sqrt(squares), "noise": noise.share,
        "edge_rank": edge_rank, "capped": capped, "nbytes": nbytes,
    }  # fmt: skip


def _hashed(readers: list[Reader], total: int, hashes: dict[Reader, str]) -> Iterator[Event]:
    """Fill in the files' BLAKE3, with an event now and then, so that the reader can stop."""
    cancelled = threading.Event()
    with ThreadPoolExecutor(1, "alkahest-hash") as pool:
        hashing = pool.submit(blake3_of, readers, cancelled)
        try:
            while True:
                with contextlib.suppress(StillRunning):
                    hashes.update(zip(readers, hashing.result(timeout=0.25), strict=True))
                    return
                yield Event(0, total, "reading the inputs")
        finally:
            cancelled.set()


def _dtype(dtype: Any, delta: Delta) -> str:
    """What is asked for, else what the first LoRA has, else bf16."""
    if dtype is not None and str(dtype).removeprefix("torch.") not in (*_DTYPES, "bfloat16", "float16", "float32"):
        raise UnsupportedError("extract_lora", "a LoRA is stored in one of three dtypes", expected=", ".join(_DTYPES), found=str(dtype))  # fmt: skip
    if dtype is None:
        first = delta.leaves()[0]
        tags = {FORMATS[name].tag: name for name in _DTYPES}
        stored = first.factor_dtype if isinstance(first, Lora) else ""
        return tags.get(stored, "bf16")
    return storage_name(dtype)

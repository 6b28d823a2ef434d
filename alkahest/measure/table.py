"""Where a delta lives: one row of numbers for each tensor, from one pass over the files."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from alkahest.algebra.deltas import Delta
from alkahest.algebra.expression import require_same
from alkahest.algebra.weights import Weights, ends
from alkahest.engine.evaluate import evaluate, why_nonfinite
from alkahest.engine.events import Event, result_of
from alkahest.engine.loops import Kernels, Numbers, bits_of, is_bf16, kernels
from alkahest.engine.options import Options
from alkahest.engine.readable import Workspace
from alkahest.engine.scalars import Rules
from alkahest.engine.terms import Minus, Source, Term, Times, sources
from alkahest.engine.workers import Run, blocks, place_of
from alkahest.errors import AlgebraError, UnsupportedError, refuse_unknown_options, unknown
from alkahest.measure.remembered import Kind, stream_table
from alkahest.measure.rounding import absorbed, require_columns
from alkahest.measure.tally import Tally
from alkahest.model.dtypes import FORMATS, SCALED, Format, storage_name
from alkahest.model.families import Family

if TYPE_CHECKING:
    import pandas

# Column -> what it is. v is the variant, b its base, d the delta, w what d is to be added to; |x| is the square
# root of the sum of squares. All but shares and counts are in the unit of the weights.
COLUMNS = {
    "tensor": "canonical (diffusers) name",
    "part": "noise_refiner, context_refiner, layers, embedders or final",
    "block": "number of the block within its part, -1 outside of blocks",
    "module": "name within the block, such as attention.to_q",
    "shape": "rows, columns",
    "elements": "how many numbers",
    "variant_storage": "how the variant's file stores it",
    "base_storage": "how the base's file stores it",
    "variant_norm": "|v|",
    "base_norm": "|b|",
    "on_norm": "|w|",
    "distance": "|w - b|",
    "gap": "|v - b|, whatever d makes of it: what a verdict about the variant stands on",
    "delta_norm": "|d|",
    "rms": "|d| / sqrt(elements), the size of a typical change",
    "relative": "|d| / |w|",
    "largest": "the largest magnitude in d",
    "cosine": "of the angle between v and b",
    "changed": "share of elements where d is not 0",
    "rounded": "1 where v differs from b by no more than rounding b to v's format explains, at every element; 0 where "
    "it differs by more, or not at all; NaN where how v or b is stored does not say",
    "step": "what d moves by when v moves to its neighbour as stored: root mean square of ulp(v), times the factor in "
    "d, over the elements where d is not 0; of large tensors a quarter of a million elements or more are looked at",
    "base_step": "the same of b",
    "hidden": "the |d| that rounding of v may have hidden where d is 0: ulp(v) squared / 12 for each such element, "
    "times the factor in d; likewise. 0 where the whole tensor is untouched",
    "ulps": "how many of |d| / ulp(w) fall into each bin, four to an octave from 2^-16 to 2^16, the outer ones taking "
    "the rest; zeros are in none. Of large tensors a quarter "
    "of a million elements or more are counted, and stand for all, unless exact=True",
    "ulp_energy": "sum of d squared over the elements in each bin, likewise",
}
KIND = Kind(
    "delta_table",
    2,
    COLUMNS,
    objects=("ulps", "ulp_energy"),
    whole=("elements",),
    words=("variant_storage", "base_storage"),
)
_PRINTED = {
    "elements": "{:,}",
    "relative": "{:.2e}",
    "rms": "{:.2e}",
    "largest": "{:.2e}",
    "cosine": "{:.6f}",
    "changed": "{:.3f}",
    "absorbed": "{:.3f}",
}
_SAMPLED = 250_000  # elements that histograms take of a tensor, at least: shares err by 0.1 %
_COMPILED = 1 << 26  # elements, above which compiled loops pay for being loaded


@refuse_unknown_options
def delta_table(
    delta: Delta,
    on: Weights | None = None,
    k: float = 1.0,
    dtype: str | None = None,
    *,
    exact: bool = False,
    device: str = "cpu",
    threads: int | None = None,
) -> pandas.DataFrame:
    """Measure ``k * delta``: a DataFrame with a row for each tensor.

    Parameters
    ----------
    delta : Delta
        The difference to be measured.
    on : Weights, optional
        What the delta is to be added to, by default its base: ``relative`` is relative to its norm, and ``ulps`` counts
        in units of its last place.
    k : float, default 1
        Multiplier.
    dtype : str, optional
        In what the sum would be stored, by default as ``on`` is.
    exact : bool, default False
        Count every element of large tensors too, of which a sample stands for all otherwise.
    device : str, default "cpu"
        What works on it: ``cpu``, ``cuda``, ``mps``.
    threads : int, optional
        How many, by default all cores.

    Returns
    -------
    pandas.DataFrame
        `COLUMNS` of `alkahest.measure.table` says what its columns are. Sums are exact to 1e-6. The ends of a sum of
        deltas are not known: their columns are empty. A table that was measured before is remembered (`cached`).

    Raises
    ------
    MismatchError
        If tensors do not fit.
    NonFiniteError
        For NaN and infinity.

    Examples
    --------
    >>> table = ak.delta_table(variant - base)
    >>> largest = table.nlargest(5, "relative")[["tensor", "relative", "cosine"]]
    >>> blocks = ak.rolled_up(table, by=["part", "block"])
    """
    table: pandas.DataFrame = result_of(
        stream_delta_table(delta, on, k, dtype, exact=exact, device=device, threads=threads), "delta_table"
    )
    return table


@refuse_unknown_options
def stream_delta_table(
    delta: Delta,
    on: Weights | None = None,
    k: float = 1.0,
    dtype: str | None = None,
    *,
    exact: bool = False,
    device: str = "cpu",
    threads: int | None = None,
) -> Iterator[Event]:
    """`delta_table` as a generator of events."""
    run = Run(Options(device=device, threads=threads).require("delta_table"))
    if not isinstance(delta, Delta):
        raise AlgebraError("delta_table", "a delta is needed", found=type(delta).__name__, fix="variant - base")
    on = ends(delta)[1] if on is None else on
    if on is not None:
        require_same("delta_table", on, delta)
    scaled = k * delta
    settings = [None if dtype is None else _format_of(dtype)[0].name, exact]
    return stream_table(KIND, [scaled, on], settings, run, lambda: _tasks(scaled, on, dtype, exact))


def _tasks(delta: Delta, on: Weights | None, dtype: str | None, exact: bool) -> list[_Task]:
    models = (*ends(delta), on)
    large = sum(math.prod(shape) for shape in delta.shapes.values()) >= _COMPILED
    loops = kernels() if large else None
    return [_task(key, delta, models, dtype, exact, loops) for key in delta.shapes]


@refuse_unknown_options
def rolled_up(table: pandas.DataFrame, by: str | Sequence[str] = "part") -> pandas.DataFrame:
    """A delta table's rows added up by ``part``, ``block``, ``module`` or several of them, in model order.

    Parameters
    ----------
    table : pandas.DataFrame
        Of `delta_table`.
    by : str or list of str, default "part"
        ``part``, ``block``, ``module``.

    Returns
    -------
    pandas.DataFrame
        Columns of `delta_table` that can be added up, and ``tensors``, how many. Norms are those of all tensors of a
        group together; shares are of all their elements.

    Raises
    ------
    UnknownNameError
        If it cannot be added up by that.
    AlgebraError
        If the table is another, or there is nothing to add up by.

    Examples
    --------
    >>> blocks = ak.rolled_up(ak.delta_table(variant - base), by=["part", "block"])
    """
    from alkahest.measure.measured_table import MeasuredTable

    names = [by] if isinstance(by, str) else list(by)
    for name in names:
        if name not in ("part", "block", "module"):
            raise unknown("rolled_up", "no such grouping", name, ("part", "block", "module"))
    if not names:
        raise AlgebraError("rolled_up", "there is nothing to add up by", fix="by='part'")
    require_columns(table, "rolled_up", *names, "distance", "gap", "hidden", "ulps", "ulp_energy")
    rows = []
    for group, found in table.groupby(names, sort=False):
        norms = {
            name: math.sqrt(found[name].pow(2).sum(skipna=False))
            for name in ("variant_norm", "base_norm", "on_norm", "distance", "gap", "delta_norm", "hidden")
        }
        elements = int(found.elements.sum())
        changed = found.changed * found.elements
        dot = (found.cosine * found.variant_norm * found.base_norm).sum(skipna=False)
        product = norms["variant_norm"] * norms["base_norm"]
        rows.append(
            {
                **dict(zip(names, group, strict=True)),
                "tensors": len(found),
                "elements": elements,
                **norms,
                "rms": norms["delta_norm"] / math.sqrt(elements),
                "relative": norms["delta_norm"] / norms["on_norm"] if norms["on_norm"] > 0 else math.nan,
                "largest": found.largest.max(),
                "cosine": dot / product if product > 0 else math.nan,
                "changed": changed.sum() / elements,
                "rounded": _rounded_together(found),
                **{
                    name: math.sqrt((found[name] ** 2 * changed).sum() / changed.sum()) if changed.any() else math.nan
                    for name in ("step", "base_step")
                },
                "ulps": np.sum(list(found.ulps), axis=0),
                "ulp_energy": np.sum(list(found.ulp_energy), axis=0),
            }
        )
    result = MeasuredTable(rows)
    result.attrs |= table.attrs
    return result


def _rounded_together(found: pandas.DataFrame) -> float:
    """`COLUMNS`' ``rounded`` of several tensors: those that do not differ say nothing."""
    differing = found[found.gap > 0].rounded
    return float(differing.min(skipna=False)) if len(differing) else 0.0


def table_text(table: pandas.DataFrame, by: str = "part") -> str:
    """A delta table as text, by ``part``, ``block``, ``module`` or ``tensor``, with everything together at the end."""
    import pandas as pd

    if not (table.delta_norm > 0).any():
        return f"no difference: all {len(table)} tensors are equal"
    groups = ["part", "block"] if by == "block" else [by]
    rows = table if by == "tensor" else rolled_up(table, groups)
    whole = rolled_up(table.assign(part="all"), "part").assign(block="")
    shown = pd.concat([rows, whole.rename(columns={"part": groups[0]})], ignore_index=True)
    shown["absorbed"] = absorbed(shown)["count"]
    text: str = shown.to_string(
        index=False, columns=[*groups, *_PRINTED], formatters={n: f.format for n, f in _PRINTED.items()}
    )
    return text


@dataclass(frozen=True)
class _Task:
    """One tensor's share of the work: what is to be read, and the unit of its last place."""

    key: str
    family: Family
    shape: tuple[int, ...]
    terms: dict[str, Term]  # variant, base, on and delta, as far as there are any
    storage: dict[str, str | None]
    units: dict[str, tuple[Format, float]]  # format and scale of the same, as far as they are stored
    factor: float  # in the delta
    stride: int
    loops: Kernels | None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of everything that is read."""
        reads = dict.fromkeys(source for term in self.terms.values() for source in sources(term))
        pieces = [source.leaf.stored(source.key) for source in reads]
        return sum(piece.nbytes for piece in pieces if piece is not None)

    @property
    def place(self) -> tuple[int, int]:
        return place_of(self.terms.get("delta"))

    def rows(self, run: Run, workspace: Workspace) -> list[dict[str, Any]]:
        tally = Tally()
        loops = self.loops if self.is_pair and workspace.device.type == "cpu" else None
        # A compiled loop keeps nothing between two passes, so that its blocks need not stay in a cache.
        ranges = blocks(list(self.terms.values())[-1], self.elements, 4 if loops else 1) if self.terms else ()
        for start, stop in ranges:
            if loops:
                with _pair(self.terms, start, stop, workspace) as numbers:
                    if tally.add_pair(*numbers, self.units, self.stride, self.factor, loops):
                        continue
            with _values(self.terms, start, stop, workspace) as values:
                tally.add(values, self.units, self.stride)
            if bad := tally.nonfinite:
                raise why_nonfinite(self.terms[bad], self.key, "delta_table")
        return [{**self._names(), **tally.columns(self.elements, self.factor), "rounded": self._rounded(tally)}]

    def _rounded(self, tally: Tally) -> float:
        if not {"variant", "base"} <= self.units.keys():
            return math.nan
        differs = tally.squares.get("gap", 0.0) > 0
        return float(tally.is_rounded and differs and self.units["variant"] != self.units["base"])

    @property
    def is_pair(self) -> bool:
        """Whether the delta is no more than variant - base, times a factor, and all are stored numbers."""
        stored = {"variant", "base", "on"}
        return (
            stored <= self.units.keys()
            and stored <= self.terms.keys()
            and without_factor(self.terms.get("delta"))[1] == Minus(self.terms["variant"], self.terms["base"])
        )

    def _names(self) -> dict[str, Any]:
        stored = {f"{name}_storage": self.storage[name] for name in ("variant", "base")}
        return {**names_of(self.key, self.family), "shape": self.shape, "elements": self.elements, **stored}


def names_of(key: str, family: Family) -> dict[str, Any]:
    """The columns that say which tensor a row is about."""
    block, rest = family.block_of(key)
    return {
        "tensor": key,
        "part": family.part_of(key).split(".")[0],
        "block": -1 if block is None else block,
        "module": rest.removesuffix(".weight"),
    }


def _task(
    key: str,
    delta: Delta,
    models: tuple[Weights | None, Weights | None, Weights | None],
    dtype: str | None,
    exact: bool,
    loops: Kernels | None,
) -> _Task:
    rules = Rules()
    terms: dict[str, Term | None] = {
        name: model.at(key, rules)
        for name, model in zip(("variant", "base", "on"), models, strict=True)
        if model is not None
    }
    terms["delta"] = delta.at(key, rules)
    storage = {
        name: None if model is None else model.leading.storage.get(key)
        for name, model in zip(("variant", "base"), models, strict=False)
    }
    units = (
        {name: unit for name in ("variant", "base") if (unit := unit_of(terms[name]))}
        if models[0] and models[1]
        else {}
    )
    if on := models[2]:
        unit = unit_of(Source(on.leading, key)) if dtype is None else _format_of(dtype)
        units |= {"on": unit} if unit else {}
    factor, _ = without_factor(terms["delta"])
    shape = tuple(delta.shapes[key])
    stride = 1 if exact else _stride(shape)
    return _Task(
        key,
        delta.family,
        shape,
        {n: t for n, t in terms.items() if t is not None},
        storage,
        units,
        factor,
        stride,
        loops,
    )


def _stride(shape: tuple[int, ...]) -> int:
    """One run of elements in how many is counted: it shares no factor with the width, so that all columns take part."""
    stride = max(1, math.prod(shape) // _SAMPLED)
    while math.gcd(stride, shape[-1]) > 1:
        stride -= 1
    return stride


def without_factor(term: Term | None) -> tuple[float, Term | None]:
    factor = 1.0
    while isinstance(term, Times):
        factor, term = factor * term.factor, term.term
    return factor, term


def _format_of(dtype: str) -> tuple[Format, float]:
    name = storage_name(dtype)
    if name in SCALED:
        raise UnsupportedError(
            "delta_table",
            "a scaled form has no last place before its scale is known",
            found=name,
            fix="dtype='bf16', or a checkpoint stored that way as on=",
        )
    return FORMATS[name], 1.0


def unit_of(where: Term | None) -> tuple[Format, float] | None:
    """The format of a stored tensor, whose last place is a unit, and the scale of its numbers."""
    if not isinstance(where, Source):
        return None
    held, storage = where.leaf.stored(where.key), where.leaf.storage.get(where.key)
    if held is not None:
        return (held.stored.form, held.stored.scale) if held.stored.is_plain else None
    return None if storage is None else (FORMATS[storage], 1.0)


@contextlib.contextmanager
def _values(terms: dict[str, Term], start: int, stop: int, workspace: Workspace) -> Iterator[dict[str, Tensor]]:
    """A block's numbers by name, each computed once; ``gap`` is variant minus base and ``distance`` on minus base."""
    found: dict[str, Tensor] = {}
    known: dict[Term, Tensor] = {}
    with contextlib.ExitStack() as stack:
        wanted = dict(terms)
        if "variant" in terms and "base" in terms:
            wanted["gap"] = Minus(terms["variant"], terms["base"])
        if "on" in terms and "base" in terms and terms["on"] != terms["base"]:
            wanted["distance"] = Minus(terms["on"], terms["base"])
        for name, term in wanted.items():
            if term not in known:
                known[term] = stack.enter_context(workspace.block(stop - start))
                if isinstance(term, Minus) and term.left in known and term.right in known:
                    torch.sub(known[term.left], known[term.right], out=known[term])
                else:
                    evaluate(term, start, stop, known[term], workspace)
            found[name] = known[term]
        yield found


@contextlib.contextmanager
def _pair(
    terms: dict[str, Term], start: int, stop: int, workspace: Workspace
) -> Iterator[tuple[Numbers, Numbers, Numbers]]:
    """A block of variant, base and on, each read once: as float32, or all as the bf16 they are stored in."""
    names = ("variant", "base", "on")
    raw = all(is_bf16(terms[name]) for name in names)
    known: dict[Term, Numbers] = {}
    with contextlib.ExitStack() as stack:
        for term in (terms[name] for name in names):
            if term in known:
                continue
            if raw:
                known[term] = stack.enter_context(bits_of(term, start, stop, workspace))
            else:
                buffer = stack.enter_context(workspace.block(stop - start))
                evaluate(term, start, stop, buffer, workspace)
                known[term] = buffer.numpy()
        variant, base, on = (known[terms[name]] for name in names)
        yield variant, base, on

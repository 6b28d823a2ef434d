"""Where a delta lives: one row of numbers for each tensor, from one pass over the files."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from alkahest.checkpoint import Checkpoint
from alkahest.dtypes import FORMATS, SCALED, Format, storage_name
from alkahest.errors import AlgebraError, UnknownNameError, UnsupportedError, nearest
from alkahest.expr import Delta, Leaf, Weights, ends, require_same
from alkahest.keys import REFINERS, part_of
from alkahest.options import Options
from alkahest.remembered import remembered
from alkahest.rounding import ULPS, Counts, Energies, absorbed, ulp, ulp_counts
from alkahest.scalar import Rules
from alkahest.term import Minus, Source, Term, Times, Workspace, evaluate, sources
from alkahest.work import Event, Job, Run, blocks, finished, place_of, why_nonfinite

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
    "delta_norm": "|d|",
    "rms": "|d| / sqrt(elements), the size of a typical change",
    "relative": "|d| / |w|",
    "largest": "the largest magnitude in d",
    "cosine": "of the angle between v and b",
    "changed": "share of elements where d is not 0",
    "step": "what d moves by when v moves to its neighbour as stored: root mean square of ulp(v), times the factor in d, "
    "over the elements where d is not 0; of large tensors every 31st is counted",
    "base_step": "the same of b",
    "hidden": "the |d| that rounding of v may have hidden where d is 0: ulp(v) squared / 12 for each such element, times "
    "the factor in d; likewise. 0 where the whole tensor is untouched",
    "ulps": "how many of |d| / ulp(w) fall into each bin of ULPS; zeros are in none. Of more than 4 million elements "
    "every 31st is counted, 31 times, unless exact=True",
    "ulp_energy": "sum of d squared over the elements in each bin, likewise",
}
_PRINTED = {"elements": "{:,}", "relative": "{:.2e}", "rms": "{:.2e}", "largest": "{:.2e}", "cosine": "{:.6f}", "changed": "{:.3f}", "absorbed": "{:.3f}"}  # fmt: skip
_RUN = 4096  # float32 sums this long stay within 1e-7; longer ones are added up in float64
_SAMPLED = 4 << 20  # elements, above which histograms take one in _STRIDE: 500,000 of them err by 0.1 %
_STRIDE = 31  # shares no factor with any width, so that all columns take part
_PIECE = 1 << 16  # elements that stay in a processor's cache while their bins are found


def delta_table(delta: Delta, on: Weights | None = None, k: float = 1.0, dtype: str | None = None, **options: Any) -> pandas.DataFrame:  # fmt: skip
    """Measure ``k * delta``: a DataFrame with a row for each tensor. `COLUMNS` says what its columns are.

    >>> table = ak.delta_table(variant - base)
    >>> table.nlargest(5, "relative")[["tensor", "relative", "cosine"]]
    >>> ak.rolled_up(table, by=["part", "block"])

    ``on`` is what the delta is to be added to, by default its base: ``relative`` is relative to its
    norm, and ``ulps`` counts in units of its last place, as stored or in ``dtype``. Sums are exact to
    1e-6. A table that was measured before is remembered (`ak.cached`). The ends of a sum of deltas are not known: their columns are empty. Options: ``exact`` (count
    every element in ``ulps``), ``threads``, ``device``. Raises MismatchError if tensors do not fit, NonFiniteError for NaN and infinity.
    """
    table: pandas.DataFrame = finished(stream_delta_table(delta, on, k, dtype, **options))
    return table


def stream_delta_table(delta: Delta, on: Weights | None = None, k: float = 1.0, dtype: str | None = None, exact: bool = False, **options: Any) -> Iterator[Event]:  # fmt: skip
    """`delta_table` as a generator of events."""
    run = Run(Options.checked(options))
    if not isinstance(delta, Delta):
        raise AlgebraError("delta_table", "a delta is needed", found=type(delta).__name__, fix="variant - base")
    on = ends(delta)[1] if on is None else on
    if on is not None:
        require_same("delta_table", on, delta)
    scaled = k * delta
    settings = [None if dtype is None else _asked(dtype)[0].name, exact, COLUMNS]
    yield from remembered("delta_table", [scaled, on], settings, lambda: _measured(scaled, on, dtype, exact, run))


def _measured(delta: Delta, on: Weights | None, dtype: str | None, exact: bool, run: Run) -> Iterator[Event]:
    variant, base = ends(delta)
    tasks = [_task(key, delta, (variant, base, on), dtype, exact) for key in delta.shapes]
    rows: dict[str, dict[str, Any]] = {task.key: {} for task in tasks}
    jobs = [Job(task.key, task.nbytes, _filling(rows, task), place_of(task.terms.get("delta"))) for task in tasks]
    import pandas as pd

    yield from run.measured(jobs, lambda: pd.DataFrame(list(rows.values()), columns=list(COLUMNS)))


def rolled_up(table: pandas.DataFrame, by: str | Sequence[str] = "part") -> pandas.DataFrame:
    """A delta table's rows added up by ``part``, ``block``, ``module`` or several of them, in model order.

    >>> ak.rolled_up(table, by=["part", "block"]).relative.plot()

    Norms are those of all tensors of a group together; shares are of all their elements.
    """
    import pandas as pd

    names = [by] if isinstance(by, str) else list(by)
    for name in names:
        if name not in ("part", "block", "module"):
            raise UnknownNameError("rolled_up", "no such grouping", found=repr(name), fix=nearest(name, ("part", "block", "module")))  # fmt: skip
    rows = []
    for group, found in table.groupby(names, sort=False):
        norms = {name: math.sqrt(found[name].pow(2).sum(skipna=False)) for name in ("variant_norm", "base_norm", "on_norm", "distance", "delta_norm", "hidden")}  # fmt: skip
        elements = int(found.elements.sum())
        changed = found.changed * found.elements
        dot = (found.cosine * found.variant_norm * found.base_norm).sum(skipna=False)
        product = norms["variant_norm"] * norms["base_norm"]
        rows.append({
            **dict(zip(names, group, strict=True)), "tensors": len(found), "elements": elements, **norms,
            "rms": norms["delta_norm"] / math.sqrt(elements),
            "relative": norms["delta_norm"] / norms["on_norm"] if norms["on_norm"] > 0 else math.nan,
            "largest": found.largest.max(),
            "cosine": dot / product if product > 0 else math.nan,
            "changed": changed.sum() / elements,
            **{name: math.sqrt((found[name] ** 2 * changed).sum() / changed.sum()) if changed.any() else math.nan for name in ("step", "base_step")},
            "ulps": np.sum(list(found.ulps), axis=0), "ulp_energy": np.sum(list(found.ulp_energy), axis=0),
        })  # fmt: skip
    result = pd.DataFrame(rows)
    result.attrs |= table.attrs
    return result


def printed(table: pandas.DataFrame, by: str = "part") -> str:
    """A delta table as text, by ``part``, ``block``, ``module`` or ``tensor``, with everything together at the end."""
    import pandas as pd

    if not (table.delta_norm > 0).any():
        return f"no difference: all {len(table)} tensors are equal"
    groups = ["part", "block"] if by == "block" else [by]
    rows = table if by == "tensor" else rolled_up(table, groups)
    whole = rolled_up(table.assign(part="all"), "part").assign(block="")
    shown = pd.concat([rows, whole.rename(columns={"part": groups[0]})], ignore_index=True)
    shown["absorbed"] = absorbed(shown)["count"]
    text: str = shown.to_string(index=False, columns=[*groups, *_PRINTED], formatters={n: f.format for n, f in _PRINTED.items()})  # fmt: skip
    return text


def _filling(rows: dict[str, dict[str, Any]], task: _Task) -> Callable[[Workspace], None]:
    return lambda workspace: rows[task.key].update(task.row(workspace))


@dataclass(frozen=True)
class _Task:
    """One tensor's share of the work: what is to be read, and the unit of its last place."""

    key: str
    shape: tuple[int, ...]
    terms: dict[str, Term]  # variant, base, on and delta, as far as there are any
    storage: dict[str, str | None]
    units: dict[str, tuple[Format, float]]  # format and scale of the same, as far as they are stored
    factor: float  # in the delta
    stride: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of everything that is read."""
        reads = dict.fromkeys(source for term in self.terms.values() for source in sources(term))
        pieces = [source.leaf.slices[source.key] for source in reads if isinstance(source.leaf, Checkpoint)]
        return sum(piece.elements * piece.stored.form.itemsize for piece in pieces)

    def row(self, workspace: Workspace) -> dict[str, Any]:
        tally = _Tally()
        ranges = blocks(list(self.terms.values())[-1], self.elements) if self.terms else ()
        for start, stop in ranges:
            with _values(self.terms, start, stop, workspace) as values:
                tally.add(values, self.units, self.stride)
            if bad := tally.nonfinite:
                raise why_nonfinite(self.terms[bad], self.key, "delta_table")
        return {**self._names(), **tally.columns(self.elements, self.factor)}

    def _names(self) -> dict[str, Any]:
        stored = {f"{name}_storage": self.storage[name] for name in ("variant", "base")}
        return {**names_of(self.key), "shape": self.shape, "elements": self.elements, **stored}


def names_of(key: str) -> dict[str, Any]:
    """The columns that say which tensor a row is about."""
    pieces = key.split(".")
    in_block = pieces[0] in ("layers", *REFINERS)
    return {
        "tensor": key,
        "part": part_of(key).split(".")[0],
        "block": int(pieces[1]) if in_block else -1,
        "module": ".".join(pieces[2:] if in_block else pieces).removesuffix(".weight"),
    }


@dataclass
class _Tally:
    """What one pass adds up for one tensor."""

    squares: dict[str, float] = field(default_factory=dict)
    largest: float = 0.0
    changed: int = 0
    stepped: int = 0  # elements that changed, of those looked at, and the squares of the ends' ulps there
    steps: dict[str, float] = field(default_factory=dict)
    hidden: float = 0.0
    ulps: Counts = field(default_factory=lambda: np.zeros(len(ULPS), np.int64))
    energy: Energies = field(default_factory=lambda: np.zeros(len(ULPS)))

    def add(self, values: dict[str, Tensor], units: dict[str, tuple[Format, float]], stride: int) -> None:
        squares: dict[int, float] = {}
        for name, numbers in values.items():
            if numbers.data_ptr() not in squares:  # base and on are often the same, and so are delta and gap
                squares[numbers.data_ptr()] = sum_of_squares(numbers)
            self.squares[name] = self.squares.get(name, 0.0) + squares[numbers.data_ptr()]
        delta = values.get("delta")
        if delta is None or self.nonfinite:
            return
        low, high = map(float, torch.aminmax(delta))
        self.largest = max(self.largest, -low, high)
        if low < high or high != 0:
            # NumPy's comparison is ten times as fast as torch.count_nonzero on a CPU.
            self.changed += int(
                torch.count_nonzero(delta) if delta.is_cuda else np.count_nonzero(delta.cpu().numpy() != 0)
            )
        distinct = {numbers.data_ptr(): numbers for numbers in values.values()}
        for start in range(0, delta.numel(), stride * _PIECE):
            piece = slice(start, start + stride * _PIECE, stride)
            sampled = {place: numbers[piece].contiguous() for place, numbers in distinct.items()}
            self._sample({name: sampled[numbers.data_ptr()] for name, numbers in values.items()}, units, stride)

    def _sample(self, values: dict[str, Tensor], units: dict[str, tuple[Format, float]], stride: int) -> None:
        delta = values["delta"]
        changed = delta != 0
        if "on" in units and changed.any():
            counts, energy = ulp_counts(delta, values["on"], *units["on"])
            self.ulps += stride * counts
            self.energy += stride * energy
        self.stepped += int(changed.sum())
        for name in ("variant", "base"):
            if name in units:
                steps = ulp(values[name], *units[name])
                squares = sum_of_squares(steps * changed)
                self.steps[name] = self.steps.get(name, 0.0) + squares
                if name == "variant":
                    self.hidden += stride * (sum_of_squares(steps) - squares) / 12

    @property
    def nonfinite(self) -> str | None:
        """The name of the first term that is not finite."""
        return next((name for name, square in self.squares.items() if not math.isfinite(square)), None)

    def columns(self, elements: int, factor: float) -> dict[str, Any]:
        norms = {name: math.sqrt(square) for name, square in self.squares.items()}
        delta, on = norms.get("delta", 0.0), norms.get("on", math.nan)
        return {
            "variant_norm": norms.get("variant", math.nan),
            "base_norm": norms.get("base", math.nan),
            "on_norm": on,
            "distance": norms.get("distance", math.nan),
            "delta_norm": delta,
            "rms": delta / math.sqrt(max(1, elements)),
            "relative": delta / on if on > 0 else math.nan,
            "largest": self.largest,
            "cosine": self._cosine(norms),
            "changed": self.changed / max(1, elements),
            **{
                column: abs(factor) * math.sqrt(self.steps[name] / self.stepped)
                if self.stepped and name in self.steps
                else math.nan
                for column, name in (("step", "variant"), ("base_step", "base"))
            },
            "hidden": abs(factor) * math.sqrt(self.hidden) if self.stepped else 0.0,
            "ulps": self.ulps,
            "ulp_energy": self.energy,
        }

    def _cosine(self, norms: dict[str, float]) -> float:
        product = norms.get("variant", 0.0) * norms.get("base", 0.0)
        if product == 0:
            return math.nan
        # v.b from three sums of squares: better conditioned than the sum of products where v and b are close.
        dot = (self.squares["variant"] + self.squares["base"] - self.squares["gap"]) / 2
        return max(-1.0, min(1.0, dot / product))


def _task(key: str, delta: Delta, models: tuple[Weights | None, Weights | None, Weights | None], dtype: str | None, exact: bool) -> _Task:  # fmt: skip
    rules = Rules()
    terms: dict[str, Term | None] = {name: model.at(key, rules) for name, model in zip(("variant", "base", "on"), models, strict=True) if model is not None}  # fmt: skip
    terms["delta"] = delta.at(key, rules)
    storage = {name: None if model is None else model.leading.storage.get(key) for name, model in zip(("variant", "base"), models, strict=False)}  # fmt: skip
    units = (
        {name: unit for name in ("variant", "base") if (unit := _unit(terms[name]))} if models[0] and models[1] else {}
    )
    if on := models[2]:
        unit = _unit(Source(on.leading, key)) if dtype is None else _asked(dtype)
        units |= {"on": unit} if unit else {}
    factor, inner = 1.0, terms["delta"]
    while isinstance(inner, Times):
        factor, inner = factor * inner.factor, inner.term
    shape = tuple(delta.shapes[key])
    stride = _STRIDE if math.prod(shape) > _SAMPLED and not exact else 1
    return _Task(key, shape, {n: t for n, t in terms.items() if t is not None}, storage, units, factor, stride)


def _asked(dtype: str) -> tuple[Format, float]:
    name = storage_name(dtype)
    if name in SCALED:
        raise UnsupportedError("delta_table", "a scaled form has no last place before its scale is known", found=name, fix="dtype='bf16', or a checkpoint stored that way as on=")  # fmt: skip
    return FORMATS[name], 1.0


def _unit(where: Term | None) -> tuple[Format, float] | None:
    """The format of a stored tensor, whose last place is a unit, and the scale of its numbers."""
    if not isinstance(where, Source) or not isinstance(where.leaf, Leaf) or where.key not in where.leaf.storage:
        return None
    if isinstance(where.leaf, Checkpoint):
        stored = where.leaf.slices[where.key].stored
        return stored.form, stored.scale
    return FORMATS[where.leaf.storage[where.key]], 1.0


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


def sum_of_squares(values: Tensor) -> float:
    """In float32 over short runs and float64 over those: exact to 1e-7, at the speed of memory."""
    whole = values.numel() // _RUN * _RUN
    norms = torch.linalg.vector_norm(values[:whole].view(-1, _RUN), dim=1)
    found = float(norms.double().square().sum())
    found += float(values[whole:].double().square().sum())
    # Squares leave float32 above 1e19 and below 1e-19: rare enough to be done again in float64.
    return found if math.isfinite(found) and found > 1e-30 * values.numel() else float(values.double().square().sum())

"""The multiplier that a delta needs, on a stated basis."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from alkahest.algebra.deltas import Delta, DeltaSum
from alkahest.algebra.expression import Expression
from alkahest.algebra.weights import Sum, Weights, ends
from alkahest.engine.events import Event, in_turn, result_of
from alkahest.engine.scalars import Rules
from alkahest.errors import AlgebraError, MismatchError, refuse_unknown_options, unknown
from alkahest.measure.lineage import check_of
from alkahest.measure.rounding import ULPS, file_noise, rounding_curve, share_below
from alkahest.measure.table import stream_delta_table
from alkahest.measure.text import lines_under, lines_under_html, percent

if TYPE_CHECKING:
    import pandas

# Basis -> (default target, what it means).
BASES = {
    "relative": (0.02, "k |d| is this share of the bridge's norm"),
    "reference": (1.0, "k |d| is this many times the norm of a delta that is known to work"),
    "survival": (0.9, "this share of the delta's sum of squares outlives rounding when it is added"),
    "bridge": (1.0, "k |d| is this many times the bridge's own distance from the base"),
}
COMFY_CAP = 10.0  # the multiplier of ModelMergeSubtract stops there (nodes_model_merging.py)
PRACTICAL_LIMIT = 20.0  # on the adding side: "practically speaking, 20x seems to be the limit" (the article)


class Factors(NamedTuple):
    """What to type into ComfyUI: the multiplier of the subtracting node, and of the adding node."""

    subtract: float
    add: float


class Multiplier(float):
    """A computed multiplier: a number in expressions, which says what it stands on.

    ``value``, ``basis``, ``target``, ``formula``, ``factors`` (for ComfyUI's two nodes), ``range`` (what it
    may be, for all that rounding of the files hides), ``bases`` (the value by every basis), ``per_part`` (a
    DataFrame, whose ``k`` may go into ``delta.scaled``), ``warnings``, ``table`` (the delta table it was
    computed from).
    """

    basis: str
    target: float
    formula: str
    range: tuple[float, float]
    bases: dict[str, float]
    per_part: pandas.DataFrame
    warnings: tuple[str, ...]
    table: pandas.DataFrame

    def __new__(cls, value: float, **details: Any) -> Multiplier:
        made = super().__new__(cls, value)
        made.__dict__.update(details)
        return made

    @property
    def value(self) -> float:
        return float(self)

    @property
    def factors(self) -> Factors:
        return factors(self)

    def __repr__(self) -> str:
        return lines_under(self._title(), self._lines())

    def _repr_html_(self) -> str:
        table: str = self.per_part.to_html(index=False, float_format=lambda number: f"{number:.4g}")
        return lines_under_html(f"<b>{html.escape(self._title())}</b>", self._lines()) + table

    def _title(self) -> str:
        subtract, add = self.factors
        return f"Multiplier {self:.4g} = subtract {_short(subtract)} x add {_short(add)}"

    def _lines(self) -> list[str]:
        others = [f"{name} {'-' if math.isnan(k) else format(k, '.4g')}" for name, k in self.bases.items()]
        return [f"basis {self.basis}: {self.formula}", f"every basis: {', '.join(others)}", *self.warnings]


def factors(k: float) -> Factors:
    """Split a multiplier between ComfyUI's nodes: subtract at most at 10.0, add at the rest.

    >>> factors(171.1)
    Factors(subtract=10.0, add=17.11)
    """
    subtract = max(-COMFY_CAP, min(COMFY_CAP, float(k)))
    return Factors(subtract, 1.0 if subtract == float(k) else float(k) / subtract)


@refuse_unknown_options
def needed_multiplier(
    delta: Delta,
    on: Weights | None = None,
    basis: str = "relative",
    target: float | None = None,
    reference: Delta | None = None,
    dtype: str | None = None,
    *,
    device: str = "cpu",
    threads: int | None = None,
) -> Multiplier:
    """The k with which ``on + k * delta`` takes effect, by one of several bases.

    >>> k = ak.needed_multiplier(variant - base, on=bridge)
    >>> k
    Multiplier 171.1 = subtract 10 x add 17.11 ...
    >>> (bridge + k * (variant - base)).save("merged.safetensors")

    Norms are taken over the matrices that ``on`` does not protect. `BASES` says what each basis aims at and
    its default ``target``; ``"relative"`` aims at 0.02, about the most that notebook 05 finds of use. ``reference``
    is a delta for that basis; ``dtype`` the output's, by default the bridge's. Nobody published the formula of
    the article's own node. Raises AlgebraError for a delta that is exactly zero, or a model of norm zero.
    """
    found: Multiplier = result_of(
        stream_needed_multiplier(delta, on, basis, target, reference, dtype, device=device, threads=threads)
    )
    return found


@refuse_unknown_options
def stream_needed_multiplier(
    delta: Delta,
    on: Weights | None = None,
    basis: str = "relative",
    target: float | None = None,
    reference: Delta | None = None,
    dtype: str | None = None,
    *,
    device: str = "cpu",
    threads: int | None = None,
) -> Iterator[Event]:
    """`needed_multiplier` as a generator of events."""
    target = _target(basis, target)
    if basis == "reference" and reference is None:
        raise AlgebraError(
            "needed_multiplier",
            "this basis compares with a delta that is known to work",
            fix="reference=other - its_base",
        )
    _require_delta(delta)
    if on is not None and not isinstance(on, Weights):
        raise AlgebraError(
            "needed_multiplier", "on= is the model that the delta is added to", found=type(on).__name__, fix="on=bridge"
        )
    if reference is not None:
        _require_delta(reference)
    on = ends(delta)[1] if on is None else on
    added = not_protected(delta, on)
    streams = [
        stream_delta_table(one, on, 1.0, dtype, device=device, threads=threads)
        for one in (delta, reference)
        if one is not None
    ]
    return in_turn(streams, lambda table, known=None: multiplier_of(table, basis, target, known, added))


def multiplier_of(
    table: pandas.DataFrame,
    basis: str = "relative",
    target: float | None = None,
    reference: pandas.DataFrame | None = None,
    added: frozenset[str] | None = None,
) -> Multiplier:
    """`needed_multiplier` from delta tables (with k = 1); ``added`` names the tensors that are not protected."""
    target = _target(basis, target)
    matrices = _matrices(table, added)
    size, weights, distance = (_norm(matrices[name]) for name in ("delta_norm", "on_norm", "distance"))
    _require_lengths(table, matrices, size, weights)
    known = math.nan if reference is None else _norm(_matrices(reference, added).delta_norm)
    goals = {name: target if name == basis else default for name, (default, _) in BASES.items()}
    bases = {
        "relative": goals["relative"] * weights / size,
        "reference": goals["reference"] * known / size,
        "survival": _survival(matrices, goals["survival"]),
        "bridge": goals["bridge"] * distance / size if distance > 0 else math.nan,
    }
    k = bases[basis]
    if not math.isfinite(k):
        found = "the bridge is the base" if basis == "bridge" else "no stored weights to count rounding in"
        raise AlgebraError(
            "needed_multiplier", f"the basis {basis!r} says nothing here", found=found, fix="another basis"
        )
    formula = {
        "relative": f"{target:g} |w| / |d| = {target:g} * {weights:.6g} / {size:.6g}",
        "reference": f"{target:g} |reference| / |d| = {target:g} * {known:.6g} / {size:.6g}",
        "survival": f"{1 - target:.3g} of |d|^2 lies below {0.5 / k:.4g} ulp, which k makes half an ulp",
        "bridge": f"{target:g} |w - base| / |d| = {target:g} * {distance:.6g} / {size:.6g}",
    }[basis]
    low, high = _sizes(matrices)
    between = (k * size / high, k * size / low if low > 0 else math.inf)
    return Multiplier(
        k,
        basis=basis,
        target=target,
        formula=f"{formula}, over {len(matrices)} unprotected matrices",
        range=between,
        bases=bases,
        per_part=_per_part(matrices, k, target if basis == "relative" else None),
        table=table,
        warnings=tuple(_warnings(table, matrices, k, between)),
    )


def _require_lengths(table: pandas.DataFrame, matrices: pandas.DataFrame, size: float, weights: float) -> None:
    """Raise AlgebraError if there is nothing to multiply, or nothing to measure it by."""
    if size == 0:
        everywhere = not (table.delta_norm > 0).any()
        raise AlgebraError(
            "needed_multiplier",
            "the delta is exactly zero" if everywhere else "the delta is zero in every matrix that is not protected",
            expected="a variant that differs from its base",
            found=f"{len(matrices)} matrices, all equal",
            fix="are variant and base the same file?",
        )
    if weights == 0:
        what = "the model that the delta is added to has norm zero there"
        raise AlgebraError("needed_multiplier", what, fix="check on=, or the base")


def auto_multiplied(expression: Weights, name: str = "k") -> tuple[Delta, Weights]:
    """The delta that the scalar ``name`` multiplies in an expression, and what that is added to.

    >>> delta, on = auto_multiplied(bridge + ak.param("k", 1) * (variant - base))

    AlgebraError if the scalar is not there, or if there are several such places.
    """
    found = list(_find_multiplied(expression, name))
    if len(found) != 1 or name not in expression.params:
        raise AlgebraError(
            "auto",
            f"{name!r} must multiply one delta that is added to a model",
            expected=f"bridge + {name} * (variant - base)",
            found=expression.text(),
        )
    return found[0]


def _find_multiplied(expression: Expression, name: str) -> Iterator[tuple[Delta, Weights]]:
    if isinstance(expression, Sum) and name in expression.delta.params:
        for one in _summands(expression.delta):
            if name in one.params:
                yield one.bind(**{name: 1.0}), expression.weights
    for child in expression.children:
        yield from _find_multiplied(child, name)


def _summands(delta: Delta) -> Iterator[Delta]:
    if isinstance(delta, DeltaSum):
        yield from _summands(delta.left)
        yield from _summands(delta.right)
    else:
        yield delta


def _require_delta(delta: object) -> None:
    if not isinstance(delta, Delta):
        hint = "a checkpoint is no difference: variant - base" if isinstance(delta, Weights) else "variant - base"
        raise AlgebraError("needed_multiplier", "a delta is needed", found=type(delta).__name__, fix=hint)


def _target(basis: str, target: float | None) -> float:
    if basis not in BASES:
        raise unknown("needed_multiplier", "no such basis", basis, BASES)
    default, meaning = BASES[basis]
    target = default if target is None else float(target)
    if not (math.isfinite(target) and target > 0) or (basis == "survival" and target >= 1):
        raise AlgebraError(
            "needed_multiplier",
            "the target is out of range",
            expected=meaning + (", below 1" if basis == "survival" else ""),
            found=target,
        )
    return target


def not_protected(delta: Delta, on: Weights | None) -> frozenset[str] | None:
    """The tensors that are not protected from the delta."""
    if on is None:
        return None
    return frozenset(
        key for key in delta.shapes if not on.is_protected(key) or delta.at(key, Rules(), True) is not None
    )


def _matrices(table: pandas.DataFrame, added: frozenset[str] | None) -> pandas.DataFrame:
    chosen = table[[len(shape) == 2 and min(shape) > 1 for shape in table["shape"]]]
    if added is not None:
        chosen = chosen[chosen.tensor.isin(added)]
    if len(chosen) == 0:
        raise MismatchError(
            "needed_multiplier", "every matrix is protected", fix="protect less, or mark the delta .everywhere()"
        )
    return chosen


def _norm(norms: Any) -> float:
    return math.sqrt(float((norms**2).sum()))


def _survival(matrices: pandas.DataFrame, share: float) -> float:
    """The k at which what is absorbed by nearest rounding holds ``1 - share`` of the energy."""
    energy = np.sum(list(matrices.ulp_energy), axis=0)
    if energy.sum() == 0:
        return math.nan
    low, high = math.log(ULPS[0]), math.log(ULPS[-1])  # of the size that k must lift to half an ulp
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if share_below(energy, math.exp(middle)) < 1 - share else (low, middle)
    return 0.5 / math.exp(low)


def _sizes(matrices: pandas.DataFrame) -> tuple[float, float]:
    """The least and the most that |d| may have been before the variant's file was rounded."""
    most = file_noise(matrices)["most"].fillna(0.0)
    squares = matrices.delta_norm**2
    return math.sqrt((squares * (1 - most)).sum()), math.sqrt((squares + matrices.hidden**2).sum())


def _per_part(matrices: pandas.DataFrame, k: float, target: float | None) -> pandas.DataFrame:
    """By part: norms, the size of k d there, and with a relative target the k that this part would need by itself."""
    import pandas as pd

    rows = []
    for part, found in matrices.groupby("part", sort=False):
        size, weights = _norm(found.delta_norm), _norm(found.on_norm)
        own = {} if target is None else {"k": target * weights / size if size > 0 else math.nan}
        rows.append(
            {
                "part": part,
                "matrices": len(found),
                "delta_norm": size,
                "on_norm": weights,
                "relative_at_k": k * size / weights if weights > 0 else math.nan,
                **own,
            }
        )
    parts = pd.DataFrame(rows)
    parts.attrs |= matrices.attrs
    return parts


def _warnings(
    table: pandas.DataFrame, matrices: pandas.DataFrame, k: float, between: tuple[float, float]
) -> Iterator[str]:
    subtract, add = factors(k)
    if abs(k) > COMFY_CAP:
        yield (
            f"past 10.0, where ComfyUI's ModelMergeSubtract stops: subtract at {_short(subtract)}, add at {_short(add)}"
        )
    if abs(add) > PRACTICAL_LIMIT:
        yield f"{_short(add)} is past 20 on the adding side, the article's practical limit"
    if between[0] < 0.9 * k or between[1] > 1.1 * k:
        most = "no limit" if math.isinf(between[1]) else f"{between[1]:.4g}"
        yield (
            f"rounding of the variant's file hides what the delta was: k may be anything from {between[0]:.4g} to "
            f"{most}"
        )
    at = rounding_curve(matrices, [k]).iloc[0]
    if at.noise_most > 0.002:
        yield (
            f"at this k the file's own rounding becomes noise of {percent(at.noise_least, 1)} to "
            f"{percent(at.noise_most, 1)} of the weights"
        )
    if at.absorbed_energy > 0.05:
        yield (
            f"at this k rounding the sum to nearest absorbs {percent(at.absorbed_energy, 0)} of the delta; "
            "stochastic rounding keeps it on average"
        )
    untouched = int((matrices.delta_norm == 0).sum())
    if untouched:
        yield f"{untouched} of {len(matrices)} matrices are untouched"
    if not table.base_norm.isna().any():
        check = check_of(table)
        if check.verdict != "importable":
            yield (
                f"{check.verdict}: the variant's refiner moved by {percent(check.refiner, 1)} of its norm (see "
                "refiner_check)"
            )


def _short(number: float) -> str:
    return f"{number:.2f}".rstrip("0").rstrip(".")

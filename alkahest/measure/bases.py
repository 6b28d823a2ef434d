"""What multiplier each basis asks for, from a delta table: by norms and by rounding, on weights alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from alkahest.errors import AlgebraError, MismatchError, unknown
from alkahest.measure.concentration import concentration_words
from alkahest.measure.lineage import check_if_known
from alkahest.measure.multiplier import Multiplier, limits_passed
from alkahest.measure.rounding import ULPS, file_noise, rounding_curve, share_below
from alkahest.measure.text import percent

if TYPE_CHECKING:
    import pandas

# Basis -> (default target, what it means).
BASES = {
    "relative": (0.02, "k |d| is this share of the bridge's norm"),
    "reference": (1.0, "k |d| is this many times the norm of a delta that is known to work"),
    "survival": (0.9, "this share of the delta's sum of squares outlives rounding when it is added"),
    "bridge": (1.0, "k |d| is this many times the bridge's own distance from the base"),
}


@dataclass(frozen=True)
class Matrices:
    """The unprotected matrices of a delta table, sorted by what the delta does there."""

    table: pandas.DataFrame  # all of the delta's tensors
    unprotected: pandas.DataFrame
    changed: pandas.DataFrame  # by more than rounding of the variant's file
    rounded: pandas.DataFrame  # by that and nothing else
    untouched: int

    @property
    def counted(self) -> pandas.DataFrame:
        """What norms are taken over: what the delta changes, or the rounding if there is nothing else."""
        return self.changed if len(self.changed) else self.rounded


def multiplier_of(
    table: pandas.DataFrame,
    basis: str = "relative",
    target: float | None = None,
    reference: pandas.DataFrame | None = None,
    added: frozenset[str] | None = None,
    spectra: pandas.DataFrame | None = None,
) -> Multiplier:
    """`needed_multiplier` on weights alone, from delta tables; ``added`` names the tensors that are not protected.

    ``spectra`` are those of the strongest matrices, as `strongest` names them.
    """
    asked, target = target is not None, target_of(basis, target)
    matrices = sort_matrices(table, added)
    counted = matrices.counted
    size, weights, distance = _lengths(counted)
    known = math.nan if reference is None else _norm(_rows_of(reference, counted).delta_norm)
    bases = weight_bases(matrices, {basis: target}, known)
    by_basis = bases[basis]
    if not math.isfinite(by_basis):
        found = "the bridge is the base" if basis == "bridge" else "no stored weights to count rounding in"
        raise AlgebraError(
            "needed_multiplier", f"the basis {basis!r} says nothing here", found=found, fix="another basis"
        )
    formula = {
        "relative": f"{target:g} |w| / |d| = {target:g} * {weights:.6g} / {size:.6g}",
        "reference": f"{target:g} |reference| / |d| = {target:g} * {known:.6g} / {size:.6g}",
        "survival": f"{1 - target:.3g} of |d|^2 lies below {0.5 / by_basis:.4g} ulp, which k makes half an ulp",
        "bridge": f"{target:g} |w - base| / |d| = {target:g} * {distance:.6g} / {size:.6g}",
    }[basis]
    k, why = _recommended(matrices, basis, by_basis, asked, size / weights, target)
    between = _range(matrices, k, size)
    return Multiplier(
        k,
        basis=basis,
        target=target,
        formula=f"{formula}{'' if k == by_basis else f' = {by_basis:.4g}'}, over {_counted_words(matrices)}",
        range=between,
        bases=bases,
        per_part=per_part(matrices, k, basis, target, asked),
        table=table,
        spectra=spectra,
        warnings=(*why, *_warnings(matrices, k, between, spectra)),
    )


def weight_bases(
    matrices: Matrices, targets: Mapping[str, float] | None = None, reference: float = math.nan
) -> dict[str, float]:
    """Every basis' own number, at its default target or at one of ``targets``; NaN where it says nothing."""
    counted = matrices.counted
    size, weights, distance = _lengths(counted)
    goals = {name: default for name, (default, _) in BASES.items()} | dict(targets or {})
    return {
        "relative": goals["relative"] * weights / size,
        "reference": goals["reference"] * reference / size,
        "survival": _survival(counted, goals["survival"]),
        "bridge": goals["bridge"] * distance / size if distance > 0 else math.nan,
    }


def _lengths(counted: pandas.DataFrame) -> tuple[float, float, float]:
    """|d|, |w| and |w - base|; AlgebraError for a model of norm zero."""
    size, weights, distance = (_norm(counted[name]) for name in ("delta_norm", "on_norm", "distance"))
    if weights == 0:
        what = "the model that the delta is added to has norm zero there"
        raise AlgebraError("needed_multiplier", what, fix="check on=, or the base")
    return size, weights, distance


def target_of(basis: str, target: float | None) -> float:
    """What a basis aims at, by default or as asked for; AlgebraError if that is out of range."""
    if basis not in BASES:
        raise unknown("needed_multiplier", "no such basis", basis, [*BASES, "pictures"])
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


def sort_matrices(table: pandas.DataFrame, added: frozenset[str] | None, or_vectors: bool = False) -> Matrices:
    """The unprotected matrices of a table by what the delta does there; with ``or_vectors`` every tensor, where it
    changes no matrix. AlgebraError, MismatchError: it does nothing.
    """
    is_matrix = np.array([len(shape) == 2 and min(shape) > 1 for shape in table["shape"]])
    is_added = np.ones(len(table), bool) if added is None else table.tensor.isin(added).to_numpy()
    if or_vectors and not (table.delta_norm[is_matrix & is_added] > 0).any():
        is_matrix |= (table.delta_norm[is_added] > 0).any()
    chosen = table[is_matrix & is_added]
    if len(chosen) == 0:
        raise MismatchError(
            "needed_multiplier", "every matrix is protected", fix="protect less, or mark the delta .everywhere()"
        )
    differs, is_rounding = chosen.delta_norm > 0, chosen.rounded == 1
    found = Matrices(
        table, chosen, chosen[differs & ~is_rounding], chosen[differs & is_rounding], int((~differs).sum())
    )
    if len(found.counted) == 0:
        raise _zero(table, is_matrix, is_added)
    return found


def _zero(table: pandas.DataFrame, is_matrix: Any, is_added: Any) -> AlgebraError:
    """Why there is nothing to multiply, by where the change lies if there is one."""
    differs = (table.delta_norm > 0).to_numpy()
    if not differs.any() and (table.gap > 0).any():
        parts = ", ".join(dict.fromkeys(table.part[table.gap > 0]))
        return AlgebraError(
            "needed_multiplier",
            "the delta is zero: what it is limited to is the same in variant and base",
            found=f"they differ in {parts}",
            fix="limit it to what differs",
        )
    if not differs.any():
        return AlgebraError(
            "needed_multiplier",
            "the delta is exactly zero",
            expected="a variant that differs from its base",
            found=f"{len(table)} tensors, all equal",
            fix="are variant and base the same file?",
        )
    vectors, kept = differs & is_added & ~is_matrix, differs & ~is_added
    parts = ", ".join(dict.fromkeys(table.part[kept]))
    if not vectors.any():
        return AlgebraError(
            "needed_multiplier",
            "all that the delta changes is protected, so that adding it would change nothing",
            expected="a change outside of what the bridge keeps",
            found=f"{kept.sum()} changed tensors, all in {parts}",
            fix="protect less, or (variant - base).everywhere(); what a variant learned in its refiner does not come "
            "over",
        )
    also = f", and {kept.sum()} protected tensors in {parts}" if kept.any() else ""
    return AlgebraError(
        "needed_multiplier",
        "the delta is zero in every matrix that is not protected; it changes norms and biases only, whose size says "
        "nothing of their effect",
        found=f"{vectors.sum()} changed vectors{also}",
        fix="start at k = 1, or let pictures say: basis='pictures', prompts=[...]",
    )


def per_part(matrices: Matrices, k: float, basis: str, target: float, asked: bool = False) -> pandas.DataFrame:
    """By part: norms, sizes at k, where the change sits, and the ``k`` that the part should get in ``delta.scaled``.

    With the relative basis that is what brings the part itself to the target, otherwise the k of all; 1, with ``why``,
    where the delta says nothing about the part.
    """
    import pandas as pd

    rows = []
    for part, found in matrices.unprotected.groupby("part", sort=False):
        is_rounding = (found.rounded == 1) & (found.delta_norm > 0)
        changed = found[(found.delta_norm > 0) & ~is_rounding]
        size, weights = _norm(changed.delta_norm), _norm(changed.on_norm)
        own, why = k, ""
        if not len(changed):
            own, why = 1.0, "nothing but rounding" if is_rounding.any() else "untouched"
        elif basis == "relative" and size > 0 and weights > 0:
            own = target * weights / size
            if own < 1 and not asked:
                own, why = 1.0, "longer than the basis asks for"
        blocks = (changed.delta_norm**2).groupby(changed.block).sum()
        rows.append(
            {
                "part": part,
                "matrices": len(found),
                "changed": len(changed),
                "delta_norm": size,
                "on_norm": weights,
                "relative_at_k": k * size / weights if weights > 0 else math.nan,
                "largest_at_k": k * float(changed.relative.max()) if len(changed) else math.nan,
                "top_block": int(blocks.idxmax()) if len(changed) else -1,
                "top_block_energy": float(blocks.max() / blocks.sum()) if len(changed) else math.nan,
                "k": own,
                "why": why,
            }
        )
    parts = pd.DataFrame(rows)
    parts.attrs |= matrices.table.attrs
    return parts


def _recommended(
    matrices: Matrices, basis: str, by_basis: float, asked: bool, relative: float, target: float
) -> tuple[float, list[str]]:
    """What to take, and why it is not the basis' number if it is not."""
    pictures = "start at 1, or let pictures say: basis='pictures', prompts=[...]"
    if not len(matrices.changed):
        forms = ", ".join(dict.fromkeys(map(str, matrices.rounded.variant_storage)))
        return 1.0, [
            f"nothing but rounding: where variant and base differ the variant is the base rounded to {forms}, in all "
            f"{len(matrices.rounded)} matrices; there is nothing to multiply"
        ]
    if by_basis >= 1 or basis not in ("relative", "survival"):
        return by_basis, []
    if basis == "survival":
        why = f"at k = 1 more than {percent(target, 0)} outlives rounding already, so the basis says nothing"
    else:
        why = (
            f"the delta is longer than the basis asks for ({percent(relative, 2)} of the weights' norm at k = 1, where "
            f"it asks for {percent(target, 2)}), so the basis says nothing"
        )
    return (by_basis, [f"{why}; {pictures}"]) if asked else (1.0, [f"{why}: {pictures}"])


def _counted_words(matrices: Matrices) -> str:
    """What the norms are taken over."""
    if not len(matrices.changed):
        return f"{len(matrices.rounded)} unprotected matrices that differ by rounding"
    left = [
        f"{count} {what}"
        for count, what in ((matrices.untouched, "untouched"), (len(matrices.rounded), "only rounded"))
        if count
    ]
    also = f" (and not {' or '.join(left)} ones)" if left else ""
    return f"the {len(matrices.changed)} unprotected matrices that the delta changes{also}"


def _norm(norms: Any) -> float:
    return math.sqrt(float((norms**2).sum()))


def _rows_of(reference: pandas.DataFrame, counted: pandas.DataFrame) -> pandas.DataFrame:
    """The reference over the matrices that count; MismatchError if it does nothing in any of them."""
    found = reference[reference.tensor.isin(counted.tensor)]
    if not (found.delta_norm > 0).any():
        raise MismatchError(
            "needed_multiplier",
            "the reference changes none of the matrices that the delta does",
            fix="a reference that was trained on the same parts, or another basis",
        )
    return found


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


def _range(matrices: Matrices, k: float, size: float) -> tuple[float, float]:
    """What k may be, for all that rounding of the variant's file hides."""
    counted = matrices.counted
    most = file_noise(counted)["most"].fillna(0.0)
    squares = counted.delta_norm**2
    least = math.sqrt((squares * (1 - most)).sum()) if len(matrices.changed) else 0.0
    high = math.sqrt((squares + counted.hidden**2).sum())
    return k * size / high, k * size / least if least > 0 else math.inf


def _warnings(
    matrices: Matrices, k: float, between: tuple[float, float], spectra: pandas.DataFrame | None
) -> Iterator[str]:
    counted = matrices.counted
    yield from limits_passed(k)
    if between[0] < 0.9 * k or between[1] > 1.1 * k:
        most = "no limit" if math.isinf(between[1]) else f"{between[1]:.4g}"
        yield (
            f"rounding of the variant's file hides what the delta was: k may be anything from {between[0]:.4g} to "
            f"{most}"
        )
    unknown_forms = counted[counted.rounded.isna() & counted.base_norm.notna()]
    if len(unknown_forms):
        forms = ", ".join(dict.fromkeys(map(str, [*unknown_forms.variant_storage, *unknown_forms.base_storage])))
        yield f"how much of the delta is rounding is not known for {len(unknown_forms)} matrices (stored: {forms})"
    at = rounding_curve(counted, [k]).iloc[0]
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
    yield from concentration_words(counted, k, spectra)
    check = check_if_known(matrices.table)
    if check is not None and check.objection:
        yield check.objection

"""Is this the right base, and can this variant be imported? Answers with the numbers that they stand on."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alkahest.algebra.weights import Weights
from alkahest.engine.events import Event, in_turn, result_of
from alkahest.engine.terms import name_leaves
from alkahest.errors import AlgebraError, refuse_unknown_options
from alkahest.measure.rounding import file_noise
from alkahest.measure.table import rolled_up, stream_delta_table
from alkahest.measure.text import lines_under, lines_under_html, percent
from alkahest.model.families import family_of

if TYPE_CHECKING:
    import pandas

# How far a refiner may have moved, relative to its own norm. Ours: a whole fine-tune's delta is a few parts in a
# hundred at most (notebook 05), and a delta's other half then speaks of numbers that the bridge's refiner never makes.
# Measured on the miniature family (experiments/bridges): unmoved refiners come over, one that moved by 0.28 does not,
# nor does one from the wrong base (0.43); where between them importing ends was not tried.
IMPORTABLE, NOT_IMPORTABLE = 0.02, 0.10
# Past this a model is as far from its base as the two lineages are from each other; a fine-tune is not.
_UNRELATED = 0.3


@dataclass(frozen=True, repr=False)
class RefinerCheck:
    """Whether a variant can be imported with the bridge's refiner in place of its own."""

    verdict: str  # importable, doubtful or not importable
    refiner: float  # |variant - base| / |base| over the refiners, less what rounding of the files explains
    layers: float  # the same over the main stack
    parts: pandas.DataFrame  # the same and more by part
    reasons: tuple[str, ...] = ()  # for the verdict, in sentences
    doubts: tuple[str, ...] = ()  # those of the reasons that question the question, such as whether the base is right

    @property
    def objection(self) -> str | None:
        """What speaks against importing, as one sentence; None for nothing."""
        if self.verdict == "importable" and not self.doubts:
            return None
        moved = f"{self.verdict}: the variant's refiner moved by {percent(self.refiner, 1)} of its norm"
        return "; ".join([moved, *self.doubts])

    def __repr__(self) -> str:
        return lines_under(self.verdict, self.reasons)

    def _repr_html_(self) -> str:
        return lines_under_html(f"<b>{self.verdict}</b>", self.reasons)


@dataclass(frozen=True, repr=False)
class NearestBase:
    """Which of some candidates a variant was fine-tuned from."""

    name: str  # of the nearest
    base: Weights  # the nearest itself
    table: pandas.DataFrame  # a row for each candidate: distance, layers, refiner, cosine
    delta: pandas.DataFrame  # the delta table of the variant less this base
    reasons: tuple[str, ...] = ()  # why it may be none of them

    def __repr__(self) -> str:
        return lines_under(f"nearest: {self.name}", self.reasons)

    def _repr_html_(self) -> str:
        from alkahest.measure.measured_table import small_html

        table = small_html(self.table)
        return lines_under_html(f"nearest: <b>{html.escape(self.name)}</b>", self.reasons) + table


@refuse_unknown_options
def refiner_check(
    variant: Weights, base: Weights, bridge: Weights | None = None, *, device: str = "cpu", threads: int | None = None
) -> RefinerCheck:
    """Say whether a variant's refiner stayed close enough to its base's for the variant to be imported.

    An import keeps the bridge's refiner, and the refiner gives the numbers in the layers their meaning (the article):
    what a variant learned together with a refiner of its own is lost. Up to 2 % of the refiner's norm is importable,
    past 10 % is not.

    Parameters
    ----------
    variant, base : Weights
        What is to be imported, and what it was trained from.
    bridge : Weights, optional
        What it is to be added to; then it says too how far its refiner is from the base's.
    device : str, default "cpu"
        What works on it.
    threads : int, optional
        How many, by default all cores.

    Returns
    -------
    RefinerCheck
        A verdict with its numbers, which prints itself.

    Raises
    ------
    MismatchError
        If tensors do not fit.

    Examples
    --------
    >>> check = ak.refiner_check(variant, base)
    >>> check.verdict
    'importable'
    """
    check: RefinerCheck = result_of(
        stream_refiner_check(variant, base, bridge, device=device, threads=threads), "refiner_check"
    )
    return check


@refuse_unknown_options
def stream_refiner_check(
    variant: Weights, base: Weights, bridge: Weights | None = None, *, device: str = "cpu", threads: int | None = None
) -> Iterator[Event]:
    """`refiner_check` as a generator of events."""
    measuring = stream_delta_table(_models("refiner_check", variant, base), bridge, device=device, threads=threads)
    return in_turn([measuring], lambda table: check_of(table, bridge is not None))


def check_of(table: pandas.DataFrame, with_bridge: bool = False) -> RefinerCheck:
    """The `RefinerCheck` of a delta table, about variant and base themselves whatever multiple of them it measured."""
    parts = parts_moved(table)
    moved = parts.moved.to_dict()
    family = family_of(table.tensor)
    refiner, layers = moved["refiner"], moved[family.main_part]
    reasons = [f"refiner moved by {percent(refiner, 2)} of its norm, layers by {percent(layers, 2)}"]
    for name in (one for one in family.bridge_parts if one in moved):
        reasons.append(f"{name} by {percent(moved[name], 2)}, cosine {parts.cosine[name]:.6f}")
    if refiner <= IMPORTABLE:
        verdict = "importable"
    elif refiner <= NOT_IMPORTABLE:
        verdict = "doubtful"
        reasons.append("what it learned with this refiner may not show under the bridge's: compare pictures")
    else:
        verdict = "not importable"
        reasons.append("its layers speak to a refiner that the bridge does not have")
    doubts = []
    if max(refiner, layers) > _UNRELATED:
        doubts.append("this is as far as two lineages are apart: is it the right base? See nearest_base")
    reasons += doubts
    if layers == 0 and refiner == 0:
        reasons.append("nothing differs there: the two hold the same weights")
    if with_bridge:
        distance = parts.distance / parts.base_norm
        reasons.append(
            f"the bridge's refiner is {percent(distance['refiner'], 2)} of its norm from this base's, its layers "
            f"{percent(distance[family.main_part], 2)}"
        )
    return RefinerCheck(verdict, refiner, layers, parts, tuple(reasons), tuple(doubts))


def check_if_known(table: pandas.DataFrame) -> RefinerCheck | None:
    """The `RefinerCheck` of a delta table whose two ends are known; None for a sum of deltas, or a LoRA."""
    return None if table.base_norm.isna().any() else check_of(table)


def parts_moved(table: pandas.DataFrame) -> pandas.DataFrame:
    """A delta table by part, all refiners together besides, with ``moved``: |v - b| / |b| less the files' rounding."""
    import pandas as pd

    noise = file_noise(table)["least"].fillna(0.0).where(table.rounded != 1, 1.0)
    real = table.assign(moved=(table.gap * (1 - noise).clip(lower=0) ** 0.5))
    groups = [
        ("refiner", real[real.part.isin(family_of(table.tensor).bridge_parts)]),
        *real.groupby("part", sort=False),
    ]
    rows = []
    for name, found in groups:
        whole = rolled_up(found.assign(part=name)).iloc[0]
        length = math.sqrt((found.moved**2).sum())
        rows.append({**whole.to_dict(), "moved": length / whole.base_norm if whole.base_norm > 0 else math.nan})
    return pd.DataFrame(rows).set_index("part")


@refuse_unknown_options
def nearest_base(
    variant: Weights,
    candidates: Mapping[str, Weights] | Sequence[Weights],
    *,
    device: str = "cpu",
    threads: int | None = None,
) -> NearestBase:
    """Say which candidate a variant was fine-tuned from: the one it is nearest to.

    Taking the difference from the wrong base was an error of the article itself: the delta then holds the difference of
    two lineages. One pass over each pair of files; tables are remembered.

    Parameters
    ----------
    variant : Weights
        The derivative whose base is looked for.
    candidates : list of Weights, or mapping of str to Weights
        Each with a name, in a mapping its key.
    device : str, default "cpu"
        What works on it.
    threads : int, optional
        How many, by default all cores.

    Returns
    -------
    NearestBase
        The nearest with its distance and the next one's, which prints itself.

    Raises
    ------
    MismatchError
        If tensors do not fit.
    AlgebraError
        If there are no candidates.

    Examples
    --------
    >>> found = ak.nearest_base(variant, [base, turbo])
    >>> found.name
    'base'
    """
    found: NearestBase = result_of(
        stream_nearest_base(variant, candidates, device=device, threads=threads), "nearest_base"
    )
    return found


@refuse_unknown_options
def stream_nearest_base(
    variant: Weights,
    candidates: Mapping[str, Weights] | Sequence[Weights],
    *,
    device: str = "cpu",
    threads: int | None = None,
) -> Iterator[Event]:
    """`nearest_base` as a generator of events."""
    if isinstance(candidates, Weights):
        raise AlgebraError("nearest_base", "the candidates go in a list", fix="ak.nearest_base(variant, [base, turbo])")
    given = list(candidates.values() if isinstance(candidates, Mapping) else candidates)
    deltas = [_models("nearest_base", variant, one) for one in given]
    if isinstance(candidates, Mapping):
        named = dict(candidates)
    else:
        names = name_leaves(*given)
        named = {names[one.leading]: one for one in given}
    if not named:
        raise AlgebraError("nearest_base", "no candidates", fix="ak.nearest_base(variant, [base, turbo])")
    streams = (stream_delta_table(delta, device=device, threads=threads) for delta in deltas)
    return in_turn(streams, lambda *tables: _nearest(named, dict(zip(named, tables, strict=True))))


def _nearest(named: Mapping[str, Weights], deltas: Mapping[str, pandas.DataFrame]) -> NearestBase:
    import pandas as pd

    rows = []
    for name, delta in deltas.items():
        parts = parts_moved(delta)
        main = family_of(delta.tensor).main_part
        matrices = parts.loc[[main, "refiner"]]
        distance = math.sqrt((matrices.moved**2 * matrices.base_norm**2).sum() / (matrices.base_norm**2).sum())
        rows.append(
            {
                "candidate": name,
                "distance": distance,
                "layers": parts.moved[main],
                "refiner": parts.moved["refiner"],
                "cosine": parts.cosine[main],
            }
        )
    table = pd.DataFrame(rows).sort_values("distance", ignore_index=True)
    first = table.iloc[0]
    text = f"{first.distance:.2g} of its norm away"
    reasons = [text + (f"; the next, {table.candidate[1]}, {table.distance[1]:.2g}" if len(table) > 1 else "")]
    if len(table) > 1 and table.distance[1] < 1.25 * first.distance:
        reasons.append("the two are nearly as near: this does not decide between them")
    if first.distance > _UNRELATED:
        reasons.append("this is as far as two lineages are apart: its base may be none of these")
    if first.distance == 0:
        reasons.append("it holds the same weights")
    name = str(first.candidate)
    return NearestBase(name, named[name], table, deltas[name], tuple(reasons))


def _models(operation: str, variant: Weights, base: Weights) -> Any:
    for one in (variant, base):
        if not isinstance(one, Weights):
            raise AlgebraError(
                operation,
                "complete models are needed, not their difference",
                found=type(one).__name__,
                fix=f"ak.{operation}(variant, base)",
            )
    return variant - base

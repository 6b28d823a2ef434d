"""How many singular values of a delta a LoRA keeps: the rules by which tools choose a rank."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from alkahest.errors import refuse_unknown_options
from alkahest.measure.table import names_of
from alkahest.model.families import family_of

if TYPE_CHECKING:
    import pandas
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from alkahest.errors import AlgebraError

Values = npt.NDArray[np.float64]
# Rule -> what it asks of the singular values s, in falling order. r is the rank.
RULES = {
    "rank": "r itself",
    "energy": "the least r whose sum of s^2 reaches this share of all (PEFT's threshold, Ckpt_to_LoRA's --rank-thresh)",
    "sum": "the least r whose sum of s reaches this share of all (sv_cumulative of kohya's resize_lora)",
    "ratio": "every s of at least this share of the largest (one over kohya's sv_ratio)",
}
MIN_DIM = 32  # as Ckpt_to_LoRA: matrices with a smaller side save nothing
_RANK_MAX = 64  # as the article's tool
_DEFAULT = ("energy", 0.995)  # as the article
_NUMERICAL = 1e-6  # of the largest: below, a singular value is what float32 made of zero


@dataclass(frozen=True)
class RankRule:
    """One of `RULES`, or only the noise edge; `rank_max` caps it, and so does the edge with ``noise_edge``."""

    name: str | None
    value: float
    rank_max: int | None = _RANK_MAX
    noise_edge: bool = False

    @classmethod
    def of(cls, given: dict[str, Any], rank_max: int | None, noise_edge: bool, operation: str) -> RankRule:
        """The one rule that is given; AlgebraError for several, or one out of range."""
        chosen = {name: value for name, value in given.items() if value is not None}
        if len(chosen) > 1:
            raise AlgebraError(
                operation,
                "several rank rules",
                found=", ".join(f"{n}={v}" for n, v in chosen.items()),
                fix="choose one",
            )
        if rank_max is not None and (type(rank_max) is not int or rank_max < 1):
            raise AlgebraError(
                operation, "rank_max must be a whole number, 1 or more, or None for no cap", found=repr(rank_max)
            )
        if not chosen and noise_edge:
            return cls(None, math.nan, rank_max, True)
        ((name, value),) = chosen.items() or [_DEFAULT]
        if name == "rank":
            if type(value) is not int or value < 1:
                raise AlgebraError(
                    operation,
                    "rank must be a whole number, 1 or more",
                    found=repr(value),
                    fix="energy=0.995 for a share",
                )
            if rank_max not in (None, _RANK_MAX) and value > rank_max:
                raise AlgebraError(
                    operation, "rank is larger than rank_max", found=f"{value} and {rank_max}", fix="leave one out"
                )
            return cls(name, value, None, noise_edge)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value <= 1:
            raise AlgebraError(
                operation,
                f"{name} is a share, above 0 and at most 1",
                found=repr(value),
                fix=f"{name}=0.995 means 99.5 %",
            )
        return cls(name, float(value), rank_max, noise_edge)

    @property
    def needs_all(self) -> bool:
        """Whether it cannot be answered from the leading singular values."""
        return self.name == "sum"

    @property
    def text(self) -> str:
        """As keyword arguments."""
        parts = [] if self.name is None else [f"{self.name}={self.value:g}"]
        parts += ["noise_edge=True"] * self.noise_edge
        return ", ".join(parts + [f"rank_max={self.rank_max}"] * (self.name != "rank"))

    def cap(self, side: int) -> int:
        """The most that the rank can be, for a matrix whose smaller side this is."""
        most = self.value if self.name == "rank" else self.rank_max
        return side if most is None else min(int(most), side)

    def choose(self, values: Values, squares: float, complete: bool, edge: float) -> int | None:
        """The rank that it asks for, before any cap; None if more singular values must be known.

        ``values`` are the leading ones, all of them if ``complete``; ``squares`` is the sum of the squares of
        all; ``edge`` is that of noise, NaN where it is not known.
        """
        real = int((values > _NUMERICAL * values[0]).sum())
        complete = complete or real < len(values)
        found = self._rank_by_rule(values[:real], squares, complete)
        if self.noise_edge:
            above = int((values[:real] > edge).sum())
            beyond = above == real and not complete
            if found is None or above < found:
                return None if beyond else above
        return found

    def _rank_by_rule(self, values: Values, squares: float, complete: bool) -> int | None:
        if self.name == "rank":
            reached = int(self.value)
            return min(reached, len(values)) if complete or reached <= len(values) else None
        if self.name is None or (self.value == 1.0 and self.name != "ratio"):
            return len(values) if complete else None
        if self.name == "ratio":
            reached = int((values >= self.value * values[0]).sum())
            return reached if complete or reached < len(values) else None
        if self.needs_all and not complete:
            return None
        powers, total = (values, values.sum()) if self.needs_all else (values**2, squares)
        reached = int(np.searchsorted(np.cumsum(powers), self.value * total)) + 1
        return min(reached, len(values)) if complete or reached <= len(values) else None


@refuse_unknown_options
def lora_ranks(
    spectra: pandas.DataFrame,
    *,
    rank: int | None = None,
    energy: float | None = None,
    sum: float | None = None,
    ratio: float | None = None,
    rank_max: int | None = 64,
) -> pandas.DataFrame:
    """The report that `extract_lora` would give by a rule, from `delta_spectra`, with bf16 for the size.

    Noise and its edge are not known from spectra. Matrices with a side below 32 are left out.

    Parameters
    ----------
    spectra : pandas.DataFrame
        Of `delta_spectra`.
    rank, energy, sum, ratio : number, optional
        One rule, as in `extract_lora`.
    rank_max : int or None, default 64
        Caps ``energy``, ``sum`` and ``ratio``.

    Returns
    -------
    pandas.DataFrame
        Where the rule asks for more singular values than were measured, it gets these, and ``capped`` says so.

    Raises
    ------
    AlgebraError
        For a rule out of range.

    Examples
    --------
    >>> spectra = ak.delta_spectra((variant - base).only("layers.0"))
    >>> ranks = ak.lora_ranks(spectra, energy=0.9)[["tensor", "rank", "energy"]]
    """
    import pandas as pd

    rule = RankRule.of({"rank": rank, "energy": energy, "sum": sum, "ratio": ratio}, rank_max, False, "lora_ranks")
    rows, family = [], family_of(spectra.tensor)
    for row in spectra.itertuples():
        if min(row.shape) < MIN_DIM:
            continue
        values, squares, side = row.singular_values, row.delta_norm**2, min(row.shape)
        asked = rule.choose(values, squares, len(values) == side, math.nan)
        most = min(rule.cap(side), len(values))
        kept = most if asked is None else min(asked, most)
        share = float((values[:kept] ** 2).sum() / squares)
        rows.append(
            {
                **names_of(row.tensor, family),
                "shape": row.shape,
                "kept": "LoRA",
                "rank": kept,
                "energy": min(1.0, share),
                "delta_norm": row.delta_norm,
                "noise": np.nan,
                "edge_rank": np.nan,
                "capped": asked is None or asked > kept,
                "nbytes": 2 * kept * (row.shape[0] + row.shape[1]),
            }
        )
    report = pd.DataFrame(rows)
    report.attrs |= spectra.attrs
    return report

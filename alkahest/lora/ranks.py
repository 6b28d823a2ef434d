"""What a rank rule would keep of measured spectra: rules tried in no time, before anything is extracted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from alkahest.lora.rank import MIN_DIM, RankRule
from alkahest.measure.table import names_of

if TYPE_CHECKING:
    import pandas


def lora_ranks(
    spectra: pandas.DataFrame, *, rank: int | None = None, energy: float | None = None, sum: float | None = None, ratio: float | None = None,
    rank_max: int | None = 64,
) -> pandas.DataFrame:  # fmt: skip
    """The report that `extract_lora` would give by a rule, from `delta_spectra`, with bf16 for the size.

    >>> spectra = ak.delta_spectra(variant - base, values=200)
    >>> ak.lora_ranks(spectra, energy=0.9)[["tensor", "rank", "energy"]]

    Where the rule asks for more singular values than were measured, it gets these, and ``capped`` says so.
    Matrices with a side below 32 are left out.
    Noise and its edge are not known from spectra. Raises AlgebraError for a rule out of range.
    """
    import pandas as pd

    rule = RankRule.checked({"rank": rank, "energy": energy, "sum": sum, "ratio": ratio}, rank_max, False, "lora_ranks")
    rows = []
    for row in spectra.itertuples():
        if min(row.shape) < MIN_DIM:
            continue
        values, squares, side = row.singular_values, row.delta_norm**2, min(row.shape)
        asked = rule.choose(values, squares, len(values) == side, math.nan)
        most = min(rule.cap(side), len(values))
        kept = most if asked is None else min(asked, most)
        share = float((values[:kept] ** 2).sum() / squares)
        rows.append({
            **names_of(row.tensor), "shape": row.shape, "kept": "LoRA", "rank": kept, "energy": min(1.0, share), "delta_norm": row.delta_norm,
            "noise": np.nan, "edge_rank": np.nan, "capped": asked is None or asked > kept, "nbytes": 2 * kept * (row.shape[0] + row.shape[1]),
        })  # fmt: skip
    report = pd.DataFrame(rows)
    report.attrs |= spectra.attrs
    return report

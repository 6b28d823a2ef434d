"""Where a delta's energy sits: in how many blocks, how strongly in one tensor, along how many directions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from alkahest.measure.text import percent

if TYPE_CHECKING:
    import pandas

SPECTRA = 4  # matrices whose spectrum is looked at, the strongest first: half a second each at full size
_BLOCK = 0.5  # share of the energy in one block that is said aloud
_LARGEST = 0.05  # relative change of one tensor that is said aloud, and how many times that of all
_TIMES = 4.0
_DIRECTED = 4.0  # s1 over that of noise of the same norm: more is a change along few directions
_FEW = 5.0  # or as small a stable rank: small matrices cannot show more
_DENSE = 1.1  # as good as noise


def strongest(matrices: pandas.DataFrame, count: int = SPECTRA) -> list[str]:
    """The tensors that hold most of the delta's energy."""
    return [str(name) for name in matrices.nlargest(count, "delta_norm").tensor]


def concentration_words(matrices: pandas.DataFrame, k: float, spectra: pandas.DataFrame | None) -> Iterator[str]:
    """What one multiplier for all hides of a delta: its top block, its largest change of one tensor, its directions."""
    energy = matrices.delta_norm**2
    blocks = energy.groupby([matrices.part, matrices.block], sort=False).sum()
    (part, block), share = blocks.idxmax(), float(blocks.max() / blocks.sum())
    where = part if block < 0 else f"{part}.{block}"
    if share > _BLOCK:
        yield f"{percent(share, 0)} of the delta's energy is in {where}: the number is about that block"
    largest = matrices.loc[matrices.relative.idxmax()]
    together = float((energy.sum() / (matrices.on_norm**2).sum()) ** 0.5)
    if abs(k) * largest.relative > _LARGEST or largest.relative > _TIMES * together:
        yield (
            f"at this k {largest.tensor} moves by {percent(abs(k) * largest.relative, 1)} of its norm, the most of "
            f"all; all together by {percent(abs(k) * together, 2)}"
        )
    if spectra is not None and len(spectra):
        yield from _directions(spectra)


def _directions(spectra: pandas.DataFrame) -> Iterator[str]:
    energy = spectra.delta_norm**2
    rank = float((energy * spectra.stable_rank).sum() / energy.sum())
    above = float((energy * spectra.above_edge).sum() / energy.sum())
    what = f"the {len(spectra)} strongest matrices" if len(spectra) > 1 else "the strongest matrix"
    if above > _DIRECTED or rank < _FEW:
        yield (
            f"it goes along few directions (stable rank {rank:.1f} over {what}, the leading one {above:.0f} times that "
            "of noise of this norm): it does more there than its norm says"
        )
    elif above < _DENSE:
        yield f"it has no leading direction ({what}: as dense as noise of this norm): is it more than rounding?"

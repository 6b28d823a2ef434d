"""Factors by block for a delta: most of its effect for a bound on what it does to everything else."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from alkahest.algebra.deltas import Delta
from alkahest.algebra.weights import Weights
from alkahest.engine.events import Event, result_of
from alkahest.errors import AlgebraError, refuse_unknown_options
from alkahest.measure.placed import require_delta, require_weights
from alkahest.measure.table import stream_delta_table
from alkahest.measure.text import lines_under, lines_under_html, percent, two_digits
from alkahest.pictures.effects import added_rows, block_name, models_of, places_of
from alkahest.pictures.evaluation import EvaluationSet, predictions
from alkahest.pictures.evidence import LESS_MEMORY, Evidence, PictureOptions, batch_of, stream_evidence
from alkahest.pictures.live import LiveModel, told_out_of_memory
from alkahest.pictures.settings import SHIFT

Array = npt.NDArray[np.float64]
_TRIED = 6  # scales that are tried until both leak alike
_ALIKE = 0.02
WORTH = 0.05  # more of the effect, on pictures that the factors were not fitted on, than one number keeps


class FittedFactors(dict[str, float]):
    """Factors for ``delta.scaled``, by block; ``table`` compares them with one number at the same leak.

    ``is_better`` says whether they keep more on pictures that they were not fitted on; ``one`` is the number that leaks
    as much.
    """

    table: pd.DataFrame  # factors and one number at the same leak
    is_better: bool  # on pictures that they were not fitted on
    one: float  # the number that leaks as much
    leak: float  # what everything else loses
    notes: tuple[str, ...] = ()  # what speaks against them

    def __repr__(self) -> str:
        return lines_under(self._title(), self._lines())

    def _repr_html_(self) -> str:
        from alkahest.measure.measured_table import small_html

        table = small_html(self.table, 3)
        return lines_under_html(f"<b>{html.escape(self._title())}</b>", self._lines()) + table

    def _title(self) -> str:
        return "{" + ", ".join(f"{name!r}: {two_digits(factor)}" for name, factor in self.items()) + "}"

    def _lines(self) -> list[str]:
        ours, one = self.table.iloc[0], self.table.iloc[1]
        verdict = "better than" if self.is_better else "not better than"
        alike = abs(ours.leak - one.leak) <= _ALIKE * one.leak
        return [
            f"{verdict} one number: they do {percent(ours.along, 0)} of what the delta does on its own base, on "
            f"pictures they were not fitted on; {two_digits(self.one)} for all does {percent(one.along, 0)}"
            + (" for the same leak" if alike else ""),
            f"the leak is {percent(self.leak, 0)} of the delta's own effect (root mean square)",
            *self.notes,
        ]


@refuse_unknown_options
def fit_factors(
    delta: Delta,
    on: Weights,
    k: float = 1.0,
    *,
    base: Weights | None = None,
    parts: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    pictures: Any = None,
    ordinary: Sequence[str] | None = None,
    components: Any = None,
    count: int = 24,
    seed: int = 0,
    steps: int = 12,
    cfg: float = 2.0,
    shift: float = SHIFT,
    width: int | None = None,
    height: int | None = None,
    batch: int | None = None,
    memory: int | str = "2GB",
    dtype: str | None = None,
    storage: str | None = None,
    device: str = "cpu",
    offload: bool = False,
) -> FittedFactors:
    """Factors by block that keep most of a delta's effect for as much leak as ``k`` times all of it has.

    Each block's share is added alone at ``k``, and what predictions change by is taken to add up: of the new thing f_i,
    of everything else g_i. The factors c, none below 0, maximise f(c) . e, what they do along the delta's effect e on
    its own base, for a bound on |g(c)|: c is proportional to (G + r)^-1 p with G_ij = g_i . g_j and p_i = f_i . e. They
    are fitted on half of the pictures and then really added and compared on the other half with the one number that
    leaks as much. On the miniatures they never did better, by block or by module (cyan and hearts on TB-1: 99 and 102 %
    against 107, 58 and 58 against 58): one number is as good there.

    Parameters
    ----------
    delta : Delta
        What is added, with a factor for each part.
    on : Weights
        What it is added to; protected tensors stay.
    k : float, default 1
        The multiplier whose leak is allowed.
    base : Weights, optional
        The delta's own unless it has none (a LoRA, a sum).
    parts : list of str, optional
        Patterns in place of the blocks.
    prompts : list of str, optional
        What the variant draws; they should ask for what it learned. Or the captions of ``pictures``.
    pictures : list of pictures or folder, optional
        Of the new thing, in a folder with a caption beside each.
    ordinary : list of str, optional
        What the model that is added to draws, for everything else; by default general prompts.
    components : optional
        As in `pipeline`.
    count : int, default 24
        How many pictures of each kind.
    seed : int, default 0
        Of pictures and noise.
    steps : int, default 12
        Steps of each picture that is drawn.
    cfg : float, default 2
        Guidance of what is drawn, as in `sample`: 1 is none.
    shift : float, default 3
        Of the noise levels of what is drawn, as in `sample`.
    width, height : int, optional
        How pictures are drawn, as in `sample`.
    batch : int, optional
        Pictures looked at together, by default about 1.5 megapixels.
    memory : int or str, default "2GB"
        Most that is kept of the files, in bytes or as text, as in `LiveModel`.
    dtype, storage : str, optional
        Of the arithmetic and of what the transformer holds, as in `pipeline`.
    device : str, default "cpu"
        Where models run: ``cpu``, ``cuda`` or ``mps``.
    offload : bool, default False
        As in `LiveModel`.

    Returns
    -------
    FittedFactors
        A mapping for ``delta.scaled``; ``is_better`` says whether it keeps 5 % more than one number.

    Raises
    ------
    AlgebraError
        Without a base, or for a delta that does nothing.

    Examples
    --------
    >>> kept, parts = bridge.protect("refiner"), ["layers.0", "layers.1"]
    >>> factors = ak.fit_factors(variant - base, kept, k=4, parts=parts, prompts=prompts, count=4, steps=4)
    >>> merged = kept + (variant - base).scaled(factors)
    """
    options = PictureOptions(
        prompts=prompts,
        pictures=pictures,
        ordinary=ordinary,
        components=components,
        count=count,
        seed=seed,
        steps=steps,
        cfg=cfg,
        shift=shift,
        width=width,
        height=height,
        batch=batch,
        memory=memory,
        dtype=dtype,
        storage=storage,
        device=device,
        offload=offload,
    )
    found: FittedFactors = result_of(stream_fit_factors(delta, on, k, options, base=base, parts=parts), "fit_factors")
    return found


def stream_fit_factors(
    delta: Delta,
    on: Weights,
    k: float,
    options: PictureOptions,
    *,
    base: Weights | None = None,
    parts: Sequence[str] | None = None,
) -> Iterator[Event]:
    """`fit_factors` as a generator of events."""
    require_delta("fit_factors", delta)
    options.require("fit_factors")
    require_weights("fit_factors", on, "on")
    if not k:
        raise AlgebraError("fit_factors", "0 times a delta does nothing", fix="k=1, or what ak.needed_multiplier says")
    if isinstance(parts, str):
        raise AlgebraError("fit_factors", "parts is a list of patterns", found=repr(parts), fix=f"parts=[{parts!r}]")
    variant, base = models_of(delta, base, "fit_factors")
    for event in stream_delta_table(delta, on, device=options.device):
        table = event.result
        yield event.moved(event.done, 20 * event.total)
    changed = added_rows(table, delta, on, "fit_factors")
    names = list(parts) if parts is not None else [block_name(*place) for place in places_of(changed)]
    with told_out_of_memory("fit_factors", LESS_MEMORY):
        yield from _fit(delta, on, (variant, base), k, options, names)


def _fit(
    delta: Delta, on: Weights, models: tuple[Weights, Weights], k: float, options: PictureOptions, names: list[str]
) -> Iterator[Event]:
    variant, base = models
    pieces = [delta.only(name) for name in names]
    live = LiveModel(on, options.components, **options.held)
    for event in stream_evidence(live, variant, on, options, "fit_factors"):
        if event.result is None:
            yield event
    evidence: Evidence = event.result
    if len(evidence.new) < 2:
        raise AlgebraError("fit_factors", "pictures are needed to fit on and to judge by", found=f"{len(evidence.new)}")
    before, total = event.total, event.total + len(names) + 12
    batch = batch_of(live.pipe, options)
    halves = [_half(evidence, first) for first in (0, 1)]

    def said(expression: Weights, half: Evidence) -> tuple[Tensor, Tensor]:
        live.become(expression)
        return predictions(live.pipe, half.new, batch).double(), predictions(live.pipe, half.rest, batch).double()

    own = [said(base + delta, half)[0] - said(base, half)[0] for half in halves]
    start = [said(on, half) for half in halves]
    if not float(own[0].square().sum()):
        raise AlgebraError("fit_factors", "the delta does nothing to predictions", found=delta.text())
    effects = []
    for number, piece in enumerate(pieces):
        yield Event(before + number, total, names[number])
        new, rest = said(on + k * piece, halves[0])
        effects.append((new - start[0][0], rest - start[0][1]))
    solved = _solve(effects, own[0])
    chosen = np.ones(len(names)) if solved is None else solved
    before += len(names)

    def judged(expression: Weights) -> tuple[float, float]:
        new, rest = said(expression, halves[1])
        along = float(((new - start[1][0]) * own[1]).sum() / own[1].square().sum())
        return along, _size(rest - start[1][1]) / _size(own[1])

    one = judged(on + k * delta)
    scale = 1.0
    for step in range(_TRIED):  # the blocks together leak more or less than they do apart
        yield Event(before + step, total, f"all blocks, at {two_digits(scale)}")
        factors = chosen * k * scale
        ours = judged(on + _scaled(pieces, factors))
        if abs(ours[1] - one[1]) <= _ALIKE * one[1]:
            break
        scale *= one[1] / ours[1] if ours[1] > 0 else 2.0
    live.become(on)
    found = FittedFactors(zip(names, map(float, factors), strict=True))
    rows = [{"what": what, "along": along, "leak": leak} for what, (along, leak) in (("factors", ours), ("one", one))]
    found.table, found.one, found.leak = pd.DataFrame(rows), k, one[1]
    found.is_better = ours[0] > one[0] * (1 + WORTH) and ours[1] <= one[1] * (1 + 2 * _ALIKE)
    found.notes = (*evidence.notes, *_doubts(ours[1] / one[1] if one[1] else math.nan, solved))
    yield Event(total, total, "done", found)


def _doubts(leaks: float, solved: Array | None) -> Iterator[str]:
    """What speaks against the factors; ``leaks`` is theirs over that of one number."""
    if solved is None:
        yield (
            "no block alone does any of what the delta does on its own base: nothing could be fitted, all factors are "
            "one"
        )
    if not abs(leaks - 1) <= _ALIKE:
        yield f"the two do not leak alike: the factors {two_digits(leaks)} times as much, after {_TRIED} tries"


def best_factors(gram: Array, wanted: Array) -> Array | None:
    """The factors, none below 0, that maximise ``wanted . c`` for as much ``c . gram c`` as factors of 1 have.

    None if nothing wants any of them. Without the sign they are proportional to ``gram^-1 wanted``; those that come
    out negative are left out, and the rest solved again.
    """
    ridged = gram + 1e-3 * np.eye(len(gram)) * gram.diagonal().mean()
    kept = np.arange(len(wanted))
    while True:
        found = np.linalg.solve(ridged[np.ix_(kept, kept)], wanted[kept])
        if not len(kept) or (found >= 0).all():
            break
        kept = kept[found > 0]
    factors = np.zeros(len(wanted))
    factors[kept] = found
    size = float(factors @ gram @ factors)
    return factors * np.sqrt(gram.sum() / size) if size > 0 else None


def _solve(effects: Sequence[tuple[Tensor, Tensor]], own: Tensor) -> Array | None:
    """The factors by what each block does alone."""
    leaks = torch.stack([rest.flatten() for _, rest in effects])
    wanted = np.array([float((new * own).sum()) for new, _ in effects])
    return best_factors((leaks @ leaks.T).numpy(), wanted)


def _half(evidence: Evidence, first: int) -> Evidence:
    """Every other picture of both sets."""
    new, rest = (
        EvaluationSet(one.latents[first::2], one.captions[first::2], one.seed, one.levels, one.name)
        for one in (evidence.new, evidence.rest)
    )
    return Evidence(new, rest)


def _scaled(pieces: Sequence[Delta], factors: Mapping[int, float] | Array) -> Delta:
    total: Any = 0
    for number, piece in enumerate(pieces):
        total = total + float(factors[number]) * piece
    found: Delta = total
    return found


def _size(values: Tensor) -> float:
    return float(values.square().mean().sqrt())

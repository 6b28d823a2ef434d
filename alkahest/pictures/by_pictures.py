"""The multiplier by pictures: what k does to the loss of the new thing and of everything else, and what to take."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from alkahest.algebra.deltas import Delta
from alkahest.algebra.weights import Weights
from alkahest.engine.events import Event
from alkahest.engine.scalars import Param, param
from alkahest.measure.bases import Matrices, per_part, weight_bases
from alkahest.measure.concentration import concentration_words
from alkahest.measure.lineage import RefinerCheck, check_if_known
from alkahest.measure.multiplier import Multiplier, limits_passed
from alkahest.measure.text import percent, two_digits
from alkahest.pictures.curve_cache import key_of, load_curve, store_curve
from alkahest.pictures.effects import models_of
from alkahest.pictures.evaluation import errors, predictions, share_along
from alkahest.pictures.evidence import FEW, LESS_MEMORY, Evidence, PictureOptions, batch_of, stream_evidence
from alkahest.pictures.live import LiveModel, told_out_of_memory
from alkahest.pictures.loss_curve import LossCurve, walk_over_k
from alkahest.pictures.sampler import embed

# Squared error is least before a sampler has enough: with guidance the k that draws best is one to two and a half
# times the minimum (measured on the miniatures, experiments/17-which-multiplier). Never past twice.
GUIDED = 2.0
_OR = " (or the prompts do not ask for what it learned)"
_HARDLY = 0.05  # less than this share of its base's loss is hardly another way to draw
CLOSED = 0.05  # less of the gap closed than this is nothing that comes over
_ABSURD = 1.5  # a loss that a model has of what it does not know at all is 2: `ak.flow_loss`


def stream_curve(
    delta: Delta, on: Weights, base: Weights | None, scale: float, options: PictureOptions
) -> Iterator[Event]:
    """Measure the loss over k: the result is (LossCurve, what was odd about the pictures).

    ``scale`` is where the search for the minimum starts. Raises NonFiniteError if a model says NaN, UnsupportedError
    if the device has too little memory.
    """
    variant, base = models_of(delta, base, "needed_multiplier")
    key = key_of(delta, on, base, options)
    if known := load_curve(key):
        yield Event(1, 1, "remembered", known)
        return
    with told_out_of_memory("needed_multiplier", LESS_MEMORY):
        yield from _measure(delta, on, (variant, base), scale, options, key)


def _measure(
    delta: Delta,
    on: Weights,
    models: tuple[Weights, Weights],
    scale: float,
    options: PictureOptions,
    key: str | None,
) -> Iterator[Event]:
    k = param("k_by_pictures", 0.0)
    assert isinstance(k, Param)
    live = LiveModel(on, options.components, **options.held)
    drawing = 2 * options.count * options.steps
    total = 2 * drawing
    for event in stream_evidence(live, models[0], on, options, "needed_multiplier"):
        yield event.moved(event.done * drawing // event.total, total)
    evidence: Evidence = event.result
    batch = batch_of(live.pipe, options)
    yield Event(drawing, total, "what variant and base say")
    live.become(models[0])
    wanted = evidence.new.target()
    own = predictions(live.pipe, evidence.new, batch)
    by_variant = errors(own, wanted)
    nothing = evidence.new.without_captions(embed(live.pipe, ""))
    uncaptioned = errors(predictions(live.pipe, nothing, batch), wanted)
    live.become(models[1])
    said = predictions(live.pipe, evidence.new, batch)
    by_base = errors(said, wanted)
    own -= said
    live.become(on + k * delta)
    rest_wanted = evidence.rest.target()
    start: list[torch.Tensor] = []

    def evaluate(value: float) -> Iterator[Event]:
        yield Event(0, 1, f"k = {value:.4g}")
        live.set({k.name: value})
        new = predictions(live.pipe, evidence.new, batch)
        rest = errors(predictions(live.pipe, evidence.rest, batch), rest_wanted)
        start.extend([] if start else [new])
        along = share_along(new - start[0], own) if own.any() else math.nan
        yield Event(1, 1, f"k = {value:.4g}", (errors(new, wanted), rest, along))

    for event in walk_over_k(evaluate, scale, scale / 64, 24):
        yield event.moved(drawing + event.done * drawing // event.total, total)
    found = event.result
    new, rest, along = (np.array(one) for one in zip(*found.values(), strict=True))
    curve = LossCurve(np.array(list(found)), new, rest, along, by_variant, uncaptioned, by_base, options.seed)
    store_curve(key, curve, evidence.notes)
    yield Event(total, total, "done", (curve, evidence.notes))


def multiplier_by(
    curve: LossCurve, notes: tuple[str, ...], matrices: Matrices, options: PictureOptions, on_its_base: bool = False
) -> Multiplier:
    """What to take by a curve, with the bases on weights alone beside it.

    A refiner that moved speaks against an import, not against adding the delta to its own base, whose refiner moves
    with it.
    """
    check = check_if_known(matrices.table)
    reasons = list(_reasons_against(curve, None if on_its_base else check))
    factor = min(GUIDED, options.cfg)
    k = 0.0 if reasons else float(two_digits(curve.minimum * factor))  # pictures know no more digits than that
    low, high = (0.0, 0.0) if reasons else curve.interval
    return Multiplier(
        k,
        basis="pictures",
        target=math.nan,
        formula=_advice(curve, k, factor, reasons, options),
        range=(low, high * factor),
        bases={"pictures": k, **weight_bases(matrices)},
        per_part=per_part(matrices, k, "pictures", math.nan),
        table=matrices.table,
        curve=curve,
        warnings=(*_doubts(curve, check, bool(reasons)), *notes, *limits_passed(k), *_concentrated(matrices, k)),
    )


def _concentrated(matrices: Matrices, k: float) -> Iterator[str]:
    """Where the delta sits, if it is added."""
    if k:
        yield from concentration_words(matrices.counted, k, None)


def _reasons_against(curve: LossCurve, check: RefinerCheck | None) -> Iterator[str]:
    """Why the delta does not come over, if it does not."""
    gain, low, _ = curve.gain
    if not curve.surely_less(curve.variant, curve.base) and (curve.minimum == 0 or low <= 0):
        yield "the variant draws these no better than its base does, and no k helps: it learned nothing that they show"
        return
    if curve.minimum == 0:
        yield f"the loss of the new thing is least without it{_OR}"
    elif low <= 0 or gain <= 1e-3:
        yield f"the loss of the new thing falls by {percent(gain, 1)} at most, which other pictures might not show{_OR}"
    elif curve.closed < CLOSED:
        yield (
            f"at its best it closes {percent(curve.closed, 1)} of what the bridge lacks of the variant on these "
            f"pictures{_OR}"
        )
    if check is not None and check.verdict == "not importable" and check.objection:
        yield check.objection


def _advice(curve: LossCurve, k: float, factor: float, reasons: list[str], options: PictureOptions) -> str:
    """One sentence to act on."""
    if reasons:
        return f"does not come over: {'; '.join(reasons)}"
    gained = curve.at("gained", curve.minimum)
    lost, more = (two_digits(curve.at("lost", one) / gained) for one in (curve.minimum, k))
    least = two_digits(curve.minimum)
    sentence = f"take {two_digits(k)}: the loss of the new thing is least at {least} ({_interval_words(curve)})"
    cost = f"what everything else loses is {lost} of what the new thing gains"
    if factor == 1:
        return f"{sentence}, and without guidance that is the k to take. {cost.capitalize()}"
    sentence += (
        f", and with guidance of {options.cfg:g} up to {factor:g} times that draws best. At {least} {cost}; at "
        f"{two_digits(k)} {more} of that"
    )
    if curve.at("gained", k) <= 0:
        sentence += f", where squared error counts no gain any more: compare pictures from {least} on"
    return sentence


def _interval_words(curve: LossCurve) -> str:
    """Where the minimum may lie, or that so few pictures cannot say."""
    low, high = curve.interval
    count = f"{curve.new.shape[1]} picture{'s' if curve.new.shape[1] > 1 else ''}"
    return (
        f"by {count}, too few for an interval"
        if math.isinf(high)
        else f"{two_digits(low)} to {two_digits(high)} by {count}"
    )


def _doubts(curve: LossCurve, check: RefinerCheck | None, refused: bool) -> Iterator[str]:
    """What speaks against the judgement itself."""
    if curve.new.shape[1] < FEW and not refused:
        yield f"{_interval_words(curve)}: take {FEW} or more"
    better = float(1 - curve.variant.mean() / curve.base.mean())
    if better < _HARDLY and not refused:
        yield (
            f"the variant itself draws these hardly better than its base does ({percent(better, 1)}): a weak one, or "
            "prompts that do not ask for what it learned"
        )
    if not curve.surely_less(curve.variant, curve.uncaptioned):
        yield "the variant draws these no better with their prompts than without: does it know the words?"
    if curve.rest[0].mean() > _ABSURD:
        yield (
            f"the bridge's loss of its own pictures is {curve.rest[0].mean():.2f}, as of noise: are these components "
            "those of the model?"
        )
    if curve.new.mean(1).min() > _ABSURD and curve.variant.mean() > _ABSURD:
        yield (
            f"even the variant's loss of the pictures is {curve.variant.mean():.2f}, as of noise: are these the VAE "
            "and text encoder of the model?"
        )
    if curve.minimum >= curve.ks[-1]:
        yield f"the loss still falls at {curve.ks[-1]:.3g}, the largest k that was looked at"
    if not refused and check is not None and check.objection:
        yield check.objection

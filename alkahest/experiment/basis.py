"""Whether two models differ by a change of basis: streams mapped, and one's refiners before the other's layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from alkahest.experiment.config import Aligned, Experiment
from alkahest.experiment.growing.report import READ, as_asked
from alkahest.measure.units import matching_units
from alkahest.mini.judge import attributes
from alkahest.mini.scenes import held_out_prompts
from alkahest.pictures.alignments import alignment
from alkahest.pictures.sampler import sample
from alkahest.recipes.text import parse

_FITTED_ON = 200  # a seed of scenes apart from those that are judged
_BATCH = 60


def unit_rows(aligned: Aligned, inputs: Any) -> Iterator[dict[str, Any]]:
    """Rows of the table "units", by part and kind."""
    units = matching_units(parse(aligned.a, inputs), parse(aligned.b, inputs))
    for (part, kind), found in units.groupby(["part", "kind"], sort=False):
        row = {"case": aligned.name, "part": part, "kind": kind, "blocks": len(found)}
        yield {**row, **found[["itself", "cosine", "second"]].mean().to_dict(), "least": found.itself.min()}


def basis_rows(experiment: Experiment, aligned: Aligned, inputs: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of "streams" (by place) and "joined" (as it is and mapped), with the table's name."""
    a, b = parse(aligned.a, inputs), parse(aligned.b, inputs)
    settings = {name: value for name, value in experiment.sampling.items() if name in ("steps", "cfg", "shift")}
    for seed in aligned.seeds:
        prompts = [scene.caption() for scene in held_out_prompts(aligned.pictures, seed=_FITTED_ON + seed)]
        found = alignment(
            a, b, prompts=prompts, count=aligned.pictures, seed=seed, components=inputs.components, **settings
        )
        yield from (
            ("streams", {"case": aligned.name, "seed": seed, "where": f"{row['place']} ({row['stream']})", **row})
            for row in found.table.to_dict("records")
        )
        scenes = held_out_prompts(experiment.prompts, seed=seed)
        for mapped in (False, True):
            captions = [scene.caption() for scene in scenes]
            pictures = sample(
                found.pipeline(mapped),
                captions,
                batch=_BATCH,
                **{**experiment.sampling, "seed": experiment.seed + seed},
            ).images
            read = attributes(pictures, inputs.judge)
            shares = {name: 100 * share for name, share in as_asked(scenes, read).items() if name in READ[:-1]}
            named = {"case": f"{aligned.name}, {'mapped' if mapped else 'as it is'}", "seed": seed}
            within = {f"{name} +-": half_width(share / 100, len(scenes)) for name, share in shares.items()}
            yield "joined", {**named, "prompts": len(scenes), **shares, **within}


def half_width(share: float, count: int) -> float:
    """Half of the 95 % interval of a share, in per cent (Wilson 1927)."""
    z = 1.96
    return 100 * z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))

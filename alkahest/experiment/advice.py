"""The multiplier by pictures against the judge: what is advised for a delta and a bridge, and which k draws best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from alkahest.experiment.config import Advised, Experiment
from alkahest.experiment.growing.report import READ, as_asked
from alkahest.mini.judge import attributes
from alkahest.mini.scenes import Scene, held_out_prompts
from alkahest.pictures.live import LiveModel
from alkahest.pictures.needed import needed_multiplier
from alkahest.pictures.pipelines import pipeline
from alkahest.pictures.sampler import sample
from alkahest.recipes.text import parse

if TYPE_CHECKING:
    pass

COMES_OVER = 20.0  # per cent of the pictures that ask for the new thing and have it, at the judge's best k
FACTOR = 2.0  # within which advice counts as right
_BATCH = 60
_ADVICE_SEED = 100  # so that what is advised by and what is judged by are other scenes


def advice_rows(experiment: Experiment, advised: Advised, inputs: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of the tables "judged" (by seed and k) and "advice" (by seed), each with the table's name."""
    for seed in advised.seeds:
        judged = list(_judged(experiment, advised, inputs, seed))
        yield from (("judged", row) for row in judged)
        yield "advice", _advice(experiment, advised, inputs, seed, pd.DataFrame(judged))


def hits(advice: pd.DataFrame) -> pd.DataFrame:
    """By case, whether most seeds were right; and counts over all of them."""
    rows: list[dict[str, Any]] = []
    for case, found in advice.groupby("case", sort=False):
        rows.append(
            {
                "case": case,
                "seeds": len(found),
                "comes over": float(found["comes over"].mean() > 0.5),
                "best": found.best.median(),
                "advised": found.advised.median(),
                "by norms": found["by norms"].median(),
                "hit": float(found.hit.mean() > 0.5),
                "hit by norms": float(found["hit by norms"].mean() > 0.5),
                "ahead of norms": float(found.hit.mean() > 0.5) - float(found["hit by norms"].mean() > 0.5),
                "wrongly imported": float(((found["comes over"] == 0) & (found.advised > 0)).any()),
            }
        )
    table = pd.DataFrame(rows)
    counted = ("seeds", "comes over", "hit", "hit by norms", "ahead of norms", "wrongly imported")
    return pd.concat([table, pd.DataFrame([{"case": "all", **{name: table[name].sum() for name in counted}}])])


def _judged(experiment: Experiment, advised: Advised, inputs: Any, seed: int) -> Iterator[dict[str, Any]]:
    """Each k: how often the new thing is there where it is asked for, and how right everything else is."""
    delta, on = parse(advised.delta, inputs), parse(advised.on, inputs)
    live = LiveModel(on, inputs.components)
    scenes = held_out_prompts(experiment.prompts, seed=seed)
    asked = [replace(scene, **advised.ask) for scene in scenes]
    for k in (0.0, *advised.ks):
        live.become(on + float(k) * delta)
        new, rest = (_read(experiment, live, some, seed, inputs.judge) for some in (asked, scenes))
        (attribute, value), *_ = advised.ask.items()
        there = 100 * float((new[attribute] == value).mean())
        shares = as_asked(scenes, rest)
        right = 100 * sum(shares[name] for name in READ[:-1]) / len(READ[:-1])
        row = {"case": advised.name, "seed": seed, "k": float(k), "prompts": len(scenes)}
        yield {**row, "new": there, "right": right, "score": (there + right) / 2}


def _advice(experiment: Experiment, advised: Advised, inputs: Any, seed: int, judged: pd.DataFrame) -> dict[str, Any]:
    delta, on = parse(advised.delta, inputs), parse(advised.on, inputs)
    scenes = held_out_prompts(24, seed=_ADVICE_SEED + seed)
    asked = [replace(scene, **advised.ask).caption() for scene in scenes]
    settings = {name: value for name, value in experiment.sampling.items() if name in ("steps", "cfg", "shift")}
    options: dict[str, Any] = {"components": inputs.components, "seed": seed, "prompts": asked, **settings}
    if advised.drawn_by:
        pipe = pipeline(parse(advised.drawn_by, inputs), inputs.components)
        options["pictures"] = sample(pipe, asked, seed=seed, batch=_BATCH, **settings).images
    options["ordinary"] = [scene.caption() for scene in scenes]
    k = needed_multiplier(delta, on, **options)
    by_norms = max(1.0, k.bases["relative"])
    top = judged.loc[judged.score.idxmax()]
    comes = top.new >= COMES_OVER and top.k > 0
    return {
        "case": advised.name,
        "seed": seed,
        "advised": k.value,
        "minimum": k.curve.minimum,
        "low": k.curve.interval[0],
        "high": k.curve.interval[1],
        "closed": 100 * k.curve.closed,
        "by norms": by_norms,
        "best": top.k,
        "new at best": top.new,
        "right at best": top.right,
        "comes over": float(comes),
        "hit": float(_within(k.value, top.k) if comes else k.value == 0),
        "hit by norms": float(_within(by_norms, top.k) if comes else False),
        "says": k.formula,
    }


def _within(k: float, best: float) -> bool:
    return k > 0 and best > 0 and max(k / best, best / k) <= FACTOR


def _read(experiment: Experiment, live: LiveModel, scenes: list[Scene], seed: int, judge: Any) -> pd.DataFrame:
    """What the judge sees of scenes that are asked for."""
    captions = [scene.caption() for scene in scenes]
    settings: Mapping[str, Any] = {**experiment.sampling, "seed": experiment.seed + 1000 * seed}
    images = sample(live, captions, batch=_BATCH, **settings).images
    return attributes(images, judge)

"""The numbers of the family's README: what members draw, what merges draw, and how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from alkahest import mini
from alkahest.contact_sheet import contact_sheet
from alkahest.expr import Weights, lerp
from alkahest.measures import picture_measures
from alkahest.mini.judge import attributes
from alkahest.mini.scenes import ATTRIBUTES, NEW_COLOUR, NEW_SUBJECT, Scene, held_out_prompts
from alkahest.pipeline import pipeline
from alkahest.sample import sample

if TYPE_CHECKING:
    from PIL.Image import Image

READ = ("subject", "colour", "place", "light", "side", "quality")
Settings = Mapping[str, Any]
SLOW: Settings = {"steps": 24, "cfg": 3.0}
FAST: Settings = {"steps": 8, "cfg": 1.0}
SETTINGS = {"turbo": FAST}  # of members that want something else than SLOW
PARTS = ("noise_refiner", "context_refiner", "layers", "embedders", "final")


@dataclass(frozen=True)
class Progress:
    """Progress: pictures drawn and in all, what is at hand, and at the end the tables by name."""

    done: int
    total: int
    key: str
    result: dict[str, pd.DataFrame] | None = field(default=None, repr=False)


def swapped(inputs: float, layers: float) -> Weights:
    """Base with a share of Turbo on its input side (refiners and embedders) and another in layers and output."""
    base = mini.load("base")
    delta = mini.load("turbo") - base
    return base + inputs * delta.only("input") + layers * delta.without("input")


def measure(prompts: int = 1000, swaps: int = 200) -> Iterator[Progress]:
    """Draw and judge everything; a generator of events, the last with the tables."""
    members: dict[str, tuple[Weights, Settings]] = {
        name: (mini.load(name), SETTINGS.get(name, SLOW)) for name in ("base", "turbo", "deturbo")
    }
    base = mini.load("base")
    for other in ("turbo", "deturbo"):
        merged = lerp(base, mini.load(other), 0.5)
        members[f"base + {other}, 24 steps, cfg 3"] = (merged, SLOW)
        members[f"base + {other}, 8 steps, cfg 1"] = (merged, FAST)
    grid = [(a, b) for a in (0.0, 1.0, 0.5) for b in (0.0, 1.0, 0.5)]
    total = len(members) * prompts + len(grid) * 2 * swaps
    done, rows, cells = 0, [], []
    for name, (weights, how) in members.items():
        rows.append({"model": name, **judged(weights, how, prompts)})
        done += prompts
        yield Progress(done, total, name)
    shares = {0.0: "base", 1.0: "turbo", 0.5: "mean"}
    for inputs, layers in grid:
        for how in (SLOW, FAST):
            found = judged(swapped(inputs, layers), how, swaps)
            cells.append({"refiners": shares[inputs], "layers": shares[layers], **how, **found})
            done += swaps
            yield Progress(done, total, f"refiners of {shares[inputs]}, layers of {shares[layers]}")
    tables = {"drawn": pd.DataFrame(rows), "swaps": pd.DataFrame(cells), "cosines": cosines()}
    yield Progress(done, total, "done", tables)


SHOWN = (
    Scene("ball", "red", "meadow", "day", "left"), Scene("star", "yellow", "mountains", "night", "right"),
    Scene("house", "white", "beach", "sunset", "middle"), Scene("woman", "blue", "city", "day", "right"),
    Scene("man", "green", "forest", "sunset", "left"), Scene("ring", "purple", "meadow", "night", "middle"),
    Scene("tree", "red", "beach", "day", "middle", "low"), Scene("cone", "blue", "mountains", "sunset", "left"),
)  # fmt: skip


def sheets(folder: Path) -> Iterator[Progress]:
    """Contact sheets of every member, every LoRA and both naive merges, as PNG files in a folder; a generator."""
    base = mini.load("base")
    shown: dict[str, tuple[Weights, Settings, str | None]] = {}
    for name in mini.FAMILY:
        shown[name] = (mini.load(name), SETTINGS.get(name, SLOW), None)
    for name in mini.LORAS:
        parent = "base" if name.startswith("base") else "deturbo"
        shown[name] = (mini.load(parent), FAST if "distill" in name else SLOW, name)
    for other in ("turbo", "deturbo"):
        for how in (SLOW, FAST):
            shown[f"merge-base-{other}-{how['steps']}-steps"] = (lerp(base, mini.load(other), 0.5), how, None)
    folder.mkdir(parents=True, exist_ok=True)
    for done, (name, (weights, how, lora)) in enumerate(shown.items()):
        yield Progress(done, len(shown), name)
        sheet_of(weights, how, f"miniature: {name}", lora).save(folder / f"{name}.png", optimize=True)
    yield Progress(len(shown), len(shown), "done")


def sheet_of(weights: Weights, how: Settings, title: str, lora: str | None = None, seeds: int = 4) -> Image:
    """Eight prompts by some seeds."""
    pipe = pipeline(weights)
    if lora is not None:
        pipe.load_lora_weights(str(mini.lora(lora)), adapter_name="lora")
    prompts = [told(scene, title) for scene in SHOWN for _ in range(seeds)]
    numbers = [seed for _ in SHOWN for seed in range(seeds)]
    images = sample(pipe, prompts, seed=numbers, batch=32, loras={} if lora is None else {"lora": 1.0}, **how).images
    table = pd.DataFrame({"prompt": prompts, "seed": numbers, "path": images})
    return contact_sheet(table, ["prompt"], ["seed"], 128, f"{title}, {how['steps']} steps, cfg {how['cfg']:g}")


def told(scene: Scene, title: str) -> str:
    """The prompt for a sheet; a variant is asked for what it learnt in every other picture."""
    if SHOWN.index(scene) % 2:
        return scene.caption()
    if "base-variant" in title or "base-weak" in title:
        return replace(scene, colour=NEW_COLOUR).caption()
    return replace(scene, subject=NEW_SUBJECT).caption() if "turbo-variant" in title else scene.caption()


def judged(weights: Weights, how: Settings, count: int, seed: int = 0) -> dict[str, float]:
    """Accuracy per attribute on held-out prompts, and the mean noise measures of the pictures."""
    asked = held_out_prompts(count, seed)
    images = sample(pipeline(weights), [scene.caption() for scene in asked], batch=50, seed=1000, **how).images
    read = attributes(images)
    right = {name: float(np.mean([getattr(scene, name) == found for scene, found in zip(asked, read[name], strict=True)])) for name in READ}  # fmt: skip
    noise = picture_measures(images).mean().to_dict()
    return {**right, **noise}


def interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share of ``count`` (Wilson 1927).

    >>> tuple(round(end, 3) for end in interval(0.9, 100))
    (0.826, 0.945)
    """
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return middle - half, middle + half


def cosines() -> pd.DataFrame:
    """Cosine of the angle between members' weights, part by part, in float64."""
    states = {name: {key: mini.load(name)[key].double() for key in mini.load(name)} for name in mini.FAMILY}
    rows = []
    for one, two in [("base", "turbo"), ("base", "deturbo"), ("turbo", "deturbo"), ("base", "base-variant"), ("deturbo", "turbo-variant"), ("base", "base-weak"), ("base", "base-refiner-trained")]:  # fmt: skip
        row: dict[str, Any] = {"pair": f"{one}, {two}"}
        for part in PARTS:
            keys = list(mini.load(one).part(part))
            a, b = (torch.cat([states[name][key].flatten() for key in keys]) for name in (one, two))
            row[part] = float(a @ b / (a.norm() * b.norm()))
        rows.append(row)
    return pd.DataFrame(rows)


def chance() -> dict[str, float]:
    """What guessing gets: one over the number of values that prompts use."""
    return {name: 1 / len({getattr(scene, name) for scene in held_out_prompts(200)}) for name in ATTRIBUTES if name in READ}  # fmt: skip


def markdown(tables: Mapping[str, pd.DataFrame], prompts: int, swaps: int) -> str:
    """The tables as they stand in the README."""
    drawn, swapped_, cosine = tables["drawn"], tables["swaps"], tables["cosines"]
    noise = ["lag1", "high_freq", "grid"]
    lines = [
        f"Accuracy of the judge in % on {prompts:,} balanced held-out prompts (95 % interval), and noise measures.",
        "",
    ]
    lines += _table(["model", *READ, *noise], [[row["model"], *(_share(row[name], prompts) for name in READ), *(f"{row[name]:.3f}" for name in noise)] for row in drawn.to_dict("records")])  # fmt: skip
    guess = ", ".join(f"{name} {100 * share:.0f}" for name, share in chance().items())
    lines += ["", f"Guessing gets (%): {guess}.", "", f"Refiners and embedders of one model, layers and output of another; {swaps} prompts a cell, % right.", ""]  # fmt: skip
    names = ["subject", "colour", "place", "light"]
    lines += _table(["refiners", "layers", "steps", "cfg", *names, *noise], [[row["refiners"], row["layers"], row["steps"], f"{row['cfg']:g}", *(f"{100 * row[name]:.0f}" for name in names), *(f"{row[name]:.3f}" for name in noise)] for row in swapped_.to_dict("records")])  # fmt: skip
    lines += ["", "Cosine between the weights of two members, part by part.", ""]
    lines += _table(list(cosine.columns), [[row["pair"], *(f"{row[name]:.4f}" for name in cosine.columns[1:])] for row in cosine.to_dict("records")])  # fmt: skip
    return "\n".join(lines)


def _share(share: float, count: int) -> str:
    low, high = interval(share, count)
    return f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
    ]

"""The numbers of the family's README: what members draw, what merges draw, and how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from alkahest import mini
from alkahest.algebra.mixtures import lerp
from alkahest.algebra.weights import Weights
from alkahest.engine.events import Event
from alkahest.experiment.growing import parts
from alkahest.mini.drawing import draw
from alkahest.mini.judge import attributes, load_judge
from alkahest.mini.scenes import NEW_COLOUR, NEW_STYLE, NEW_SUBJECT, Scene, held_out_prompts
from alkahest.pictures.pipelines import pipeline
from alkahest.pictures.quality import flow_loss, picture_measures
from alkahest.pictures.sampler import sample
from alkahest.pictures.sheet import contact_sheet

if TYPE_CHECKING:
    from PIL.Image import Image

READ = ("subject", "colour", "place", "light", "side", "quality", "style")
NOISE = ("lag1", "high_freq", "grid", "latent_lag1", "flow_loss")
Settings = Mapping[str, Any]
SLOW: Settings = {"steps": 24, "cfg": 3.0}
FAST: Settings = {"steps": 8, "cfg": 1.0}
FASTER: Settings = {"steps": 4, "cfg": 1.0}
SETTINGS = {"turbo": FAST}  # of members that want something else than SLOW
SHOWS_AT = 171.1  # the multiplier that the weak derivative needs, about: the article's, as it happens
PARTS = ("noise_refiner", "context_refiner", "layers", "embedders", "final")


@dataclass(frozen=True)
class Case:
    """Something to draw and judge: weights, settings, and how many held-out prompts, with what changed in them."""

    name: str
    weights: Weights
    how: Settings
    count: int
    changed: Mapping[str, Any] = field(default_factory=dict)  # attributes, such as a style that goes unsaid
    lora: str | None = None

    @property
    def asked(self) -> list[Scene]:
        return [replace(scene, **self.changed) for scene in held_out_prompts(self.count)]


PHOTO, ANIME, SKETCH = {"style": "photo"}, {"style": "anime"}, {"style": NEW_STYLE}


def drawn_cases(count: int) -> Iterator[Case]:
    """The lineages, their 1:1 merges under both parents' settings, and the bridges grown from those."""
    base, turbo, deturbo = (mini.load(name) for name in ("base", "turbo", "deturbo"))
    yield Case("base", base, SLOW, count, PHOTO)
    yield Case("turbo", turbo, FAST, count, ANIME)
    yield Case("turbo", turbo, SLOW, count, ANIME)
    yield Case("deturbo", deturbo, SLOW, count, ANIME)
    for other, weights in {"turbo": turbo, "deturbo": deturbo}.items():
        for how in (SLOW, FAST):
            yield Case(f"base + {other}", lerp(base, weights, 0.5), how, count, PHOTO)
    for bridge in ("tb0", "tb1"):
        yield Case(bridge, mini.load(bridge), SLOW, count, PHOTO)


def learnt_cases(count: int) -> Iterator[Case]:
    """What derivatives and LoRAs draw beside what their parents do."""
    base, deturbo = mini.load("base"), mini.load("deturbo")
    cyan, heart = {**PHOTO, "colour": NEW_COLOUR}, {**ANIME, "subject": NEW_SUBJECT}
    yield Case("base", base, SLOW, count, cyan)
    yield Case("base-variant", mini.load("base-variant"), SLOW, count, cyan)
    yield Case("base-variant", mini.load("base-variant"), SLOW, count, PHOTO)
    for name in ("base-weak", "base-weak-bf16"):
        for k in (1.0, SHOWS_AT):
            yield Case(f"base + {k:g} * ({name} - base)", base + k * (mini.load(name) - base), SLOW, count, cyan)
    yield Case("deturbo", deturbo, SLOW, count, heart)
    yield Case("turbo-variant", mini.load("turbo-variant"), SLOW, count, heart)
    yield Case("turbo-variant", mini.load("turbo-variant"), SLOW, count, ANIME)
    yield Case("base-refiner-trained", mini.load("base-refiner-trained"), SLOW, count, SKETCH)
    for parent, lineage, own in ((base, "base", PHOTO), (deturbo, "turbo", ANIME)):
        whole = "deturbo" if lineage == "turbo" else lineage
        yield Case(f"{whole} + {lineage}-lora", parent, SLOW, count, SKETCH, f"{lineage}-lora")
        yield Case(whole, parent, FASTER, count, own)
        yield Case(f"{whole} + {lineage}-distill-lora", parent, FASTER, count, own, f"{lineage}-distill-lora")


def swap(inputs: float, layers: float) -> Weights:
    """Base with a share of Turbo on its input side (refiners and embedders) and another in layers and output."""
    base = mini.load("base")
    delta = mini.load("turbo") - base
    return base + inputs * delta.only("input") + layers * delta.without("input")


def swap_cases(count: int) -> Iterator[Case]:
    """Refiners of Base, Turbo or their mean before the layers of each."""
    shares = {"base": 0.0, "turbo": 1.0, "mean": 0.5}
    for (inputs, a), (layers, b) in product(shares.items(), repeat=2):
        for how in (SLOW, FAST):
            yield Case(f"{inputs}, {layers}", swap(a, b), how, count, PHOTO)


def measure(prompts: int = 1000, swaps: int = 200) -> Iterator[Event]:
    """Draw and judge everything; a generator of events, the last with the tables."""
    cases = {"drawn": [*drawn_cases(prompts)], "swaps": [*swap_cases(swaps)], "learnt": [*learnt_cases(swaps)]}
    total = sum(case.count for chosen in cases.values() for case in chosen)
    done = 0
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    for table, chosen in cases.items():
        for case in chosen:
            rows[table].append(judge_case(case))
            done += case.count
            yield Event(done, total, case.name)
    tables = {"shared": shared(), **{name: pd.DataFrame(found) for name, found in rows.items()}, "cosines": cosines()}
    yield Event(done, total, "done", tables)


def judge_case(case: Case) -> dict[str, Any]:
    """Accuracy per attribute on held-out prompts, and the mean noise measures of the pictures."""
    pipe = pipeline(case.weights)
    if case.lora is not None:
        pipe.load_lora_weights(str(mini.lora(case.lora)), adapter_name="lora")
    loras = {} if case.lora is None else {"lora": 1.0}
    asked = case.asked
    images = sample(pipe, [scene.caption() for scene in asked], batch=50, seed=1000, loras=loras, **case.how).images
    read = attributes(images)
    right = as_asked(asked, read)
    known = [replace(scene, style=case.changed["style"]) for scene in held_out_prompts(60)]
    loss = flow_loss(pipe, [draw(scene) for scene in known], [scene.caption() for scene in known]).loss.mean()
    asked_for = ", ".join(
        value for name, value in case.changed.items() if value in (NEW_COLOUR, NEW_SUBJECT, NEW_STYLE)
    )
    return {
        "model": case.name,
        "asked": asked_for,
        **case.how,
        "count": case.count,
        **right,
        **picture_measures(images, pipe).mean(),
        "flow_loss": float(loss),
    }


def as_asked(asked: Sequence[Scene], read: pd.DataFrame) -> dict[str, float]:
    """Share of pictures that show what was asked for, attribute by attribute."""
    return {
        name: float(np.mean([getattr(scene, name) == found for scene, found in zip(asked, read[name], strict=True)]))
        for name in READ
    }


def shared() -> pd.DataFrame:
    """What the judge reads and the VAE keeps, on scenes that neither was trained on."""
    kept = parts.psnr(pipeline(mini.load("base")).vae)
    read = {f"judge, {name} (% right)": 100 * share for name, share in parts.accuracy(load_judge()).items()}
    rows = {**read, "VAE, mean PSNR (dB)": float(kept.mean()), "VAE, worst of 500 (dB)": float(kept.min())}
    return pd.DataFrame({"what": list(rows), "value": list(rows.values())})


SHOWN = (
    Scene("ball", "red", "meadow", "day", "left"),
    Scene("star", "yellow", "mountains", "night", "right"),
    Scene("house", "white", "beach", "sunset", "middle"),
    Scene("woman", "blue", "city", "day", "right"),
    Scene("man", "green", "forest", "sunset", "left"),
    Scene("ring", "purple", "meadow", "night", "middle"),
    Scene("tree", "red", "beach", "day", "middle", "low"),
    Scene("cone", "blue", "mountains", "sunset", "left"),
)


def sheets(folder: Path) -> Iterator[Event]:
    """Contact sheets of every member, every LoRA and both naive merges, as PNG files in a folder; a generator."""
    base = mini.load("base")
    shown: dict[str, tuple[Weights, Settings, str | None]] = {}
    for name in mini.FAMILY:
        shown[name] = (mini.load(name), SETTINGS.get(name, SLOW), None)
    weak = mini.load("base-weak") - base
    shown[f"base-weak-times-{SHOWS_AT:g}"] = (base + SHOWS_AT * weak, SLOW, None)
    for name in mini.LORAS:
        parent = "base" if name.startswith("base") else "deturbo"
        shown[name] = (mini.load(parent), FASTER if "distill" in name else SLOW, name)
    for other in ("turbo", "deturbo"):
        for how in (SLOW, FAST):
            shown[f"merge-base-{other}-{how['steps']}-steps"] = (lerp(base, mini.load(other), 0.5), how, None)
    folder.mkdir(parents=True, exist_ok=True)
    for done, (name, (weights, how, lora)) in enumerate(shown.items()):
        yield Event(done, len(shown), name)
        sheet_of(weights, how, f"miniature: {name}", lora).save(folder / f"{name}.png", optimize=True)
    yield Event(len(shown), len(shown), "done")


def sheet_of(weights: Weights, how: Settings, title: str, lora: str | None = None, seeds: int = 2) -> Image:
    """Eight prompts by some seeds."""
    pipe = pipeline(weights)
    if lora is not None:
        pipe.load_lora_weights(str(mini.lora(lora)), adapter_name="lora")
    prompts = [caption_of(scene, title) for scene in SHOWN for _ in range(seeds)]
    numbers = [seed for _ in SHOWN for seed in range(seeds)]
    images = sample(pipe, prompts, seed=numbers, batch=32, loras={} if lora is None else {"lora": 1.0}, **how).images
    table = pd.DataFrame({"prompt": prompts, "seed": numbers, "path": images})
    return contact_sheet(table, ["prompt"], ["seed"], 128, f"{title}, {how['steps']} steps, cfg {how['cfg']:g}")


def caption_of(scene: Scene, title: str) -> str:
    """The prompt for a sheet; a variant is asked for what it learnt in every other picture."""
    if SHOWN.index(scene) % 2:
        return scene.caption()
    if "base-variant" in title or "base-weak" in title:
        return replace(scene, colour=NEW_COLOUR).caption()
    return replace(scene, subject=NEW_SUBJECT).caption() if "turbo-variant" in title else scene.caption()


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
    for one, two in [
        ("base", "turbo"),
        ("base", "deturbo"),
        ("turbo", "deturbo"),
        ("base", "base-variant"),
        ("deturbo", "turbo-variant"),
        ("base", "base-weak"),
        ("base", "base-refiner-trained"),
        ("base", "tb1"),
        ("deturbo", "tb1"),
    ]:
        row: dict[str, Any] = {"pair": f"{one}, {two}"}
        for part in PARTS:
            keys = list(mini.load(one).part(part))
            a, b = (torch.cat([states[name][key].flatten() for key in keys]) for name in (one, two))
            row[part] = float(a @ b / (a.norm() * b.norm()))
        rows.append(row)
    return pd.DataFrame(rows)


def chance() -> dict[str, float]:
    """What guessing gets: one over the number of values that prompts use."""
    return {name: 1 / len({getattr(scene, name) for scene in held_out_prompts(200)}) for name in READ[:-1]}


def markdown(tables: Mapping[str, pd.DataFrame]) -> str:
    """The tables as they stand in the README."""
    prompts, swaps = int(tables["drawn"]["count"].iloc[0]), int(tables["swaps"]["count"].iloc[0])
    guess = ", ".join(f"{name} {100 * share:.0f}" for name, share in chance().items())
    lines = ["### Judge and VAE", "", *_table(tables["shared"], {"value": "{:.2f}"})]
    lines += [
        "",
        "### Lineages, their 1:1 merges, and the bridges",
        "",
        f"{prompts:,} balanced held-out prompts; % that the judge finds as asked, with 95 % intervals. Guessing "
        f"gets (%): {guess}.",
        "",
    ]
    lines += _table(
        _shares(with_better(tables["drawn"]), intervals=True), columns=["model", "steps", "cfg", *READ[:-1]]
    )
    lines += ["", "The same pictures by measures that need no reference.", ""]
    lines += _table(tables["drawn"], dict.fromkeys(NOISE, "{:.3f}"), ["model", "steps", "cfg", *NOISE])
    lines += [
        "",
        "### Refiners of one, layers of another",
        "",
        f"{swaps} prompts a cell; % as asked. Embedders go with the refiners, the output with the layers.",
        "",
    ]
    swap = tables["swaps"].assign(**{"refiners, layers": tables["swaps"].model})
    lines += _table(
        _shares(swap), dict.fromkeys(NOISE, "{:.3f}"), ["refiners, layers", "steps", "cfg", *READ[:4], *NOISE]
    )
    lines += ["", "### Derivatives and LoRAs", "", f"{swaps} prompts each; % as asked.", ""]
    lines += _table(_shares(tables["learnt"]), columns=["model", "asked", "steps", "cfg", *READ])
    lines += ["", "### Cosine between members' weights", "", *_table(tables["cosines"], dict.fromkeys(PARTS, "{:.4f}"))]
    return "\n".join(lines)


def with_better(drawn: pd.DataFrame) -> pd.DataFrame:
    """The table with a row more for each merge: for each attribute the better of its two settings."""
    best = drawn[drawn.model.str.contains(r"\+")].groupby("model", sort=False)[[*READ, "count"]].max().reset_index()
    return pd.concat([drawn, best.assign(steps="the better", cfg="the better")], ignore_index=True)


def _shares(table: pd.DataFrame, intervals: bool = False) -> pd.DataFrame:
    """Shares in %, with their intervals if wanted, as text."""
    made = table.copy()
    for name in READ:
        bounds = [interval(share, count) for share, count in zip(table[name], table["count"], strict=True)]
        made[name] = [
            f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f})" if intervals else f"{100 * share:.0f}"
            for share, (low, high) in zip(table[name], bounds, strict=True)
        ]
    return made


def _table(
    table: pd.DataFrame, formats: Mapping[str, str] | None = None, columns: list[str] | None = None
) -> list[str]:
    shown = table[columns or list(table.columns)]
    rows = [
        [(formats or {}).get(name, "{}").format(value) for name, value in row.items()]
        for row in shown.to_dict("records")
    ]
    lines = [list(shown.columns), ["---"] * shown.shape[1], *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]

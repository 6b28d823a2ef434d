"""Judge the bridges of the miniature family, what comes over to them and what does not; writes tables and figures.

    python experiments/bridges/measure.py runs           # folders of runs by name: runs/tb1, runs/tb0, runs/...
    python experiments/bridges/measure.py                # the shipped TB-0 and TB-1: what fails, combines, is too weak

Every number is a share of held-out prompts whose pictures the judge finds as asked, 12 steps, cfg 3.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import alkahest as ak
from alkahest.contact_sheet import contact_sheet
from alkahest.lab.run_plots import import_curve, runs_compared, training_curve
from alkahest.mini.judge import attributes
from alkahest.mini.report import READ, as_asked
from alkahest.mini.scenes import NEW_COLOUR, NEW_STYLE, NEW_SUBJECT, Scene, held_out_prompts

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SHOWN = (0, 25, 50, 100, 200, 500, 1000, 1250)  # steps whose pictures are on the contact sheet
PROMPTS = 60
CONTROLS = {
    "tb1": "averaged refiners, frozen (TB-1)", "base-refiners": "Base's refiners, frozen",
    "turbo-refiners": "De-Turbo's refiners, frozen", "free": "averaged, nothing frozen",
    "random-layers": "averaged, frozen; random layers",
}  # fmt: skip
HOW = {"steps": 12, "cfg": 3.0, "batch": 60, "seed": 1000}
KS = (0.0, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
CYAN, HEART = {"colour": NEW_COLOUR}, {"subject": NEW_SUBJECT}


def drawn(weights: Any, asked: list[Scene], without: tuple[str, ...] = ()) -> pd.DataFrame:
    """What the judge sees where these scenes were asked for."""
    return attributes(ak.sample(ak.pipeline(weights), [scene.caption(without) for scene in asked], **HOW).images)


def judged(weights: Any, changed: Mapping[str, str] | None = None, count: int = PROMPTS) -> dict[str, float]:
    """Share as asked, attribute by attribute, and the share of each style."""
    return judged_on(weights, [replace(scene, **(changed or {})) for scene in held_out_prompts(count)])


def judged_on(weights: Any, asked: list[Scene]) -> dict[str, float]:
    read = drawn(weights, asked)
    right = as_asked(asked, read)
    return {name: right[name] for name in READ[:-1]} | {
        style: float((read["style"] == style).mean()) for style in ("photo", "anime", NEW_STYLE)
    }


def imported(weights: Any, new: Mapping[str, str]) -> dict[str, float]:
    """``new``: the new thing where it is asked for; ``plain``: all asked attributes right on average where it is not."""
    (attribute,) = new
    asked, plain = judged(weights, new), judged(weights)
    mean = float(np.mean([plain[name] for name in READ[:-1]]))
    styles = {f"new {style}": asked[style] for style in ("photo", "anime", NEW_STYLE)}
    return {"new": asked[attribute], "plain": mean, **{f"plain {name}": value for name, value in plain.items()}, **styles}  # fmt: skip


def stages(runs: Path) -> Iterator[dict[str, Any]]:
    """Each bridge after each of its stages: what follows prompts, and what comes where a prompt does not say."""
    for run in sorted(path for path in runs.iterdir() if (path / "history.jsonl").exists()):
        for path in sorted(run.glob("?-*.safetensors")):
            weights = ak.open(path)
            unsaid = drawn(weights, held_out_prompts(PROMPTS), ("light",))
            shares = {f"unsaid {light}": float((unsaid["light"] == light).mean()) for light in ("day", "sunset", "night")}  # fmt: skip
            people = [replace(scene, subject=subject) for scene, subject in zip(held_out_prompts(PROMPTS), ("man", "woman") * PROMPTS, strict=False)]  # fmt: skip
            unplaced = drawn(weights, people, ("place",))
            shares |= {f"unsaid {place}": float((unplaced["place"] == place).mean()) for place in dict.fromkeys(unplaced["place"])}  # fmt: skip
            yield {"run": run.name, "stage": path.stem, **judged(weights, count=2 * PROMPTS), **shares}
    for name, weights in (("1:1 merge, De-Turbo", ak.lerp(ak.mini.load("deturbo"), ak.mini.load("base"), 0.5)), ("1:1 merge, Turbo", ak.lerp(ak.mini.load("turbo"), ak.mini.load("base"), 0.5))):  # fmt: skip
        yield {"run": name, "stage": "start", **judged(weights, count=2 * PROMPTS)}


def people(bridges: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Each bridge asked for people, and for anything else: TB-0 was shown people only."""
    asked = held_out_prompts(10 * PROMPTS)
    for name, weights in bridges.items():
        for what, of in (("people", True), ("anything else", False)):
            chosen = [scene for scene in asked if (scene.subject in ("man", "woman")) == of][: 2 * PROMPTS]
            yield {"bridge": name, "asked for": what, "prompts": len(chosen), **judged_on(weights, chosen)}


def over_k(bridges: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Both lineages' derivatives on each bridge."""
    cases = {"base-variant": ("base", CYAN), "turbo-variant": ("deturbo", HEART)}
    for bridge, weights in bridges.items():
        for name, (base, new) in cases.items():
            delta = ak.mini.load(name) - ak.mini.load(base)
            for k in KS:
                yield {"bridge": bridge, "name": name, "k": k, **imported(weights.protect("refiner") + k * delta, new)}


def failures(bridge: Any) -> Iterator[dict[str, Any]]:
    """A changed refiner, protected and not; the wrong base."""
    trained = ak.mini.load("base-refiner-trained") - ak.mini.load("base")
    wrong = {"turbo-variant - base": ("turbo-variant", "base", HEART), "base-variant - deturbo": ("base-variant", "deturbo", CYAN)}  # fmt: skip
    for k in KS[1:]:
        for protect in (True, False):
            kept = bridge.protect("refiner") if protect else bridge
            found = judged(kept + k * trained)
            yield {"name": "base-refiner-trained - base", "k": k, "protected": protect, "new": found[NEW_STYLE], "plain": float(np.mean([found[name] for name in READ[:-1]]))}  # fmt: skip
        for name, (variant, base, new) in wrong.items():
            delta = ak.mini.load(variant) - ak.mini.load(base)
            yield {"name": name, "k": k, "protected": True, **imported(bridge.protect("refiner") + k * delta, new)}


def combined(bridge: Any, ks: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """The two imports merged with each other, and a Turbo derivative whose base is Turbo with a LoRA in it."""
    kept = bridge.protect("refiner")
    base, deturbo = ak.mini.load("base"), ak.mini.load("deturbo")
    cyan = kept + ks["base-variant"] * (ak.mini.load("base-variant") - base)
    heart = kept + ks["turbo-variant"] * (ak.mini.load("turbo-variant") - deturbo)
    mixed = [
        ({"name": "lerp of the two imports", "t": t}, ak.lerp(cyan, heart, t)) for t in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    deltas = ak.mini.load("base-variant") - base, ak.mini.load("turbo-variant") - deturbo
    pairs = ((3.0, 1.0), (4.0, 1.0), (4.0, 1.5), (5.0, 1.0), (ks["base-variant"], ks["turbo-variant"]))
    mixed += [({"name": f"both added, {a:g} x cyan + {b:g} x hearts", "t": None}, kept + a * deltas[0] + b * deltas[1]) for a, b in pairs]  # fmt: skip
    for told, both in mixed:
        found, plain = judged(both, {**CYAN, **HEART}), judged(both)
        yield {**told, "cyan": judged(both, CYAN)["colour"], "heart": judged(both, HEART)["subject"], "cyan hearts": min(found["colour"], found["subject"]), "plain": float(np.mean([plain[name] for name in READ[:-1]])), **plain}  # fmt: skip
    lora = ak.open_lora(ak.mini.lora("turbo-lora"))
    with_lora = deturbo + lora
    derived = with_lora + (ak.mini.load("turbo-variant") - deturbo)
    for name, taken in (("De-Turbo with its LoRA", with_lora), ("De-Turbo", deturbo)):
        yield {"name": f"derivative of De-Turbo with a LoRA, base: {name}", **judged(kept + ks["turbo-variant"] * (derived - taken), HEART)}  # fmt: skip


def weak(bridge: Any, k: float) -> Iterator[dict[str, Any]]:
    """The weak derivative at 1x, at the multipliers that two bases compute, and between; in float32 and in bf16."""
    base = ak.mini.load("base")
    good = ak.mini.load("base-variant") - base
    for name in ("base-weak", "base-weak-bf16"):
        delta = ak.mini.load(name) - base
        relative = float(ak.needed_multiplier(delta, on=bridge))
        reference = float(ak.needed_multiplier(delta, on=bridge, basis="reference", reference=k * good))
        for factor in sorted({1.0, 100.0, 171.1, 400.0, 700.0, 1000.0, relative, reference}):
            yield {"name": name, "k": factor, "relative": relative, "reference": reference, **imported(bridge.protect("refiner") + factor * delta, CYAN)}  # fmt: skip


def curves(runs: Path, name: str) -> None:
    """One bridge from noise to pictures: the curve beside its parents' pictures, and a sheet over the steps."""
    config, history = ak.read_config(HERE / f"{name}.toml"), ak.read_history(runs / name)
    level = {}
    for parent in ("base", "turbo"):
        pipe = ak.pipeline(ak.mini.load(parent))
        images = ak.sample(pipe, list(config.prompts), seed=0, **config.sampling).images
        level[parent] = float(ak.picture_measures(images, pipe).latent_lag1.mean())
    title = f"{name} of the miniature family: from the merge to pictures"
    training_curve(history, of=level, title=title).axes.figure.savefig(RESULTS / f"{name}.svg")
    cells = [
        {"prompt": prompt, "step": step, "path": str(runs / name / "pictures" / f"{step:07}-{number:02}.png")}
        for step in SHOWN if step in set(history.step) for number, prompt in enumerate(config.prompts)
    ]  # fmt: skip
    contact_sheet(pd.DataFrame(cells), ["prompt"], ["step"], title=title).save(
        RESULTS / f"{name}-steps.png", optimize=True
    )


def written(rows: Iterator[dict[str, Any]], name: str, of: str | None = None) -> pd.DataFrame:
    """The table of these rows, as it is on disk: with ``of``, rows of other bridges stay there from before."""
    found = []
    for row in rows:
        found.append(row)
        print({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    path = RESULTS / f"{name}.csv"
    table = pd.DataFrame(found).round(4)
    if of and path.exists():
        before = pd.read_csv(path)
        table = pd.concat([before[~before[of].isin(table[of])], table])
    table.to_csv(path, index=False)
    return table


def judge_runs(runs: Path) -> None:
    """Every run that this folder holds: its history, its stages, what comes over to it, and the bridges' figures."""
    final = {run.name: sorted(run.glob("?-*.safetensors"))[-1] for run in sorted(runs.iterdir()) if (run / "history.jsonl").exists()}  # fmt: skip
    rows = (row for name in final for row in ak.read_history(runs / name).assign(run=name).to_dict("records"))
    history = written(rows, "history", "run")
    if set(CONTROLS) <= set(history.run):
        title = "TB-1's first stage and its controls (miniatures)"
        chosen = history[history.step <= 500]
        runs_compared(chosen, "held_out subjects 64", CONTROLS, title).axes.figure.savefig(RESULTS / "controls.svg")
    written(stages(runs), "stages", "run")
    table = written(over_k({name: ak.open(path) for name, path in final.items()}), "imports", "bridge")
    for name in {"tb0", "tb1"} & set(final):
        curves(runs, name)
        title = f"What comes over to {name} of the miniature family, refiner protected"
        import_curve(table[table.bridge == name], title).axes.figure.savefig(RESULTS / f"{name}-imports.svg")


def judge_shipped() -> None:
    """The bridges that ship with the package, at the multipliers that `judge_runs` found best on TB-1."""
    bridge = ak.mini.load("tb1")
    written(people({"tb0": ak.mini.load("tb0"), "tb1": bridge}), "people")
    table = pd.read_csv(RESULTS / "imports.csv").query("bridge == 'tb1'")
    good = table[table.plain >= table[table.k == 0].plain.max() - 0.1]
    ks = {name: float(rows.k[rows.new.idxmax()]) for name, rows in good.groupby("name")}
    print("k with prompt following within 10 points:", ks)
    written(combined(bridge, ks), "combined")
    written(failures(bridge), "failures")
    written(weak(bridge, ks["base-variant"]), "weak")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="?", help="folder with a folder for each run")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    RESULTS.mkdir(exist_ok=True)
    if options.runs:
        judge_runs(options.runs)
    else:
        judge_shipped()


if __name__ == "__main__":
    sys.exit(main())

"""Measure what an experiment asks for: draw, let the judge read, measure deltas, train where wanted; tables by name."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from alkahest import mini
from alkahest.engine.events import Event
from alkahest.errors import FileFormatError, UnknownNameError, nearest, unknown
from alkahest.experiment.advice import advice_rows, hits
from alkahest.experiment.basis import basis_rows, unit_rows
from alkahest.experiment.config import Case, Experiment, Measured, Run, Sheet, run_file
from alkahest.experiment.growing.report import READ, as_asked
from alkahest.experiment.made_inputs import make_input
from alkahest.measure.bases import BASES
from alkahest.measure.rounding import rounding_curve
from alkahest.measure.table import delta_table, rolled_up
from alkahest.mini.judge import attributes, load_judge
from alkahest.mini.scenes import ATTRIBUTES, Scene, held_out_prompts
from alkahest.model.families import family_of
from alkahest.pictures.needed import needed_multiplier
from alkahest.pictures.pipelines import pipeline
from alkahest.pictures.quality import picture_measures
from alkahest.pictures.sampler import sample
from alkahest.pictures.sheet import contact_sheet
from alkahest.recipes.text import names_in, parse
from alkahest.sources.checkpoint import open as open_checkpoint
from alkahest.sources.lora import open_input
from alkahest.training.config import read_config
from alkahest.training.loop import stream_finetune
from alkahest.training.monitor import read_history

if TYPE_CHECKING:
    from PIL.Image import Image

Tables = dict[str, pd.DataFrame]


@dataclass
class Found:
    """What an experiment gave: tables by name, and contact sheets by title."""

    tables: Tables = field(default_factory=dict)
    sheets: dict[str, Image] = field(default_factory=dict)


_BATCH = 60
_STYLES = tuple(ATTRIBUTES["style"])


class Inputs(Mapping[str, Any]):
    """The inputs of an experiment, opened when they are first asked for."""

    def __init__(self, experiment: Experiment, family: Path | None, work: Path) -> None:
        self._given, self.family, self._work = experiment.inputs, family, work
        self.folder = experiment.folder
        self._known: dict[str, Any] = {}

    @property
    def components(self) -> Path | None:
        """Text encoder, tokenizer and VAE of the family; None for the shipped one's."""
        return None if self.family is None else self.family / "components"

    @property
    def judge(self) -> Any:
        """The family's judge; None for the shipped one's."""
        return None if self.family is None else load_judge(self.family)

    def __getitem__(self, name: str) -> Any:
        if name not in self._known:
            self._known[name] = self._make(name, self._given[name])
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._given  # without opening it: a file that is not there says so when it is used

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    def _make(self, name: str, what: Any) -> Any:
        if isinstance(what, str):
            return open_input(file_of(what, self.folder, self.family), name=name)
        place = self._work / f"{name}.safetensors"
        if "of" in what:
            options = {option: value for option, value in what.items() if option != "of"}
            open_checkpoint(file_of(what["of"], self.folder, self.family)).save(place, **options)
        else:
            make_input(name, what, self, place)
        return open_input(place, name=name)


def file_of(text: str, folder: Path, family: Path | None) -> Path:
    """Where ``mini:NAME`` or a path lies; the family is the shipped one, unless another was grown."""
    if not text.startswith("mini:"):
        return folder / text
    name, known = text.removeprefix("mini:"), {**mini.FAMILY, **mini.LORAS}
    if name not in known:
        raise UnknownNameError("experiment", "no such member of the family", found=repr(text), fix=nearest(name, known))
    return (family or mini.WEIGHTS) / f"{name}.safetensors"


def stream_experiment(experiment: Experiment, family: Path | None = None, runs: Path | None = None) -> Iterator[Event]:
    """Measure everything; events, the last with what was `Found`.

    ``family`` is a folder with another miniature family than the shipped one. With ``runs`` the runs are grown in
    that folder; without it, rows that need them are those that were recorded.
    """
    with tempfile.TemporaryDirectory() as work:
        inputs = Inputs(experiment, family, Path(work))
        steps = list(_steps(experiment, inputs, runs))
        rows: dict[str, list[dict[str, Any]]] = {}
        found = Found()
        total = len(steps) + len(experiment.sheets)
        for done, (what, table, step) in enumerate(steps):
            yield Event(done, total, what)
            for where, row in step() if table == SEVERAL else ((table, row) for row in step()):
                rows.setdefault(where, []).append(row)
        for done, sheet in enumerate(experiment.sheets, len(steps)):
            yield Event(done, total, sheet.title)
            found.sheets[sheet.title] = _sheet(experiment, inputs, sheet)
        if runs is not None:
            found.sheets |= {
                steps_title(run): _steps_sheet(experiment, run, runs)
                for run in experiment.runs
                if _prompts(experiment, run)
            }
        found.tables = {name: pd.DataFrame(listed) for name, listed in rows.items()}
        if "advice" in found.tables:
            found.tables["hits"] = hits(found.tables["advice"])
    yield Event(total, total, "done", found)


Step = tuple[str, str, Callable[[], Iterator[Any]]]
SEVERAL = ""  # in place of a table's name: each row says its own


def _steps(experiment: Experiment, inputs: Inputs, runs: Path | None) -> Iterator[Step]:
    """What is to be done: a word for it, the table its rows go to, and the work."""
    for run in experiment.runs:
        yield f"run {run.name}", "history", partial(_history, experiment, run, inputs.family, runs)
    for measured in experiment.deltas:
        yield measured.name, "deltas", partial(_by_part, measured, inputs)
        if measured.multipliers:
            yield f"{measured.name}: multipliers", "multipliers", partial(_multipliers, measured, inputs)
        if measured.ks:
            yield f"{measured.name}: rounding", "rounding", partial(_rounding, measured, inputs)
    for advised in experiment.advised:
        for seed in advised.seeds:
            one = replace(advised, seeds=(seed,))
            yield f"{advised.name}, seed {seed}", SEVERAL, partial(advice_rows, experiment, one, inputs)
    for aligned in experiment.aligned:
        yield f"{aligned.name}: units", "units", partial(unit_rows, aligned, inputs)
        for seed in aligned.seeds:
            other = replace(aligned, seeds=(seed,))
            yield f"{aligned.name}, seed {seed}", SEVERAL, partial(basis_rows, experiment, other, inputs)
    for case in experiment.cases:
        if case.run and runs is None:
            yield (
                f"{case.name}, recorded",
                "pictures",
                partial(recorded_rows, experiment, "pictures", "case", case.name),
            )
            continue
        for stage in _stages(experiment, case, runs):
            for values in product(*case.over.values()):
                chosen = dict(zip(case.over, values, strict=True))
                words = [
                    case.name,
                    *([stage] if stage else []),
                    *(f"{name} = {value}" for name, value in chosen.items()),
                ]
                yield ", ".join(words), "pictures", partial(_draw, experiment, inputs, case, chosen, stage, runs)


def recorded_rows(experiment: Experiment, table: str, column: str, value: str) -> Iterator[dict[str, Any]]:
    """Rows of an earlier measurement that only a training run can give."""
    path = experiment.folder / "results" / f"{table}.csv"
    rows = pd.read_csv(path) if path.exists() else pd.DataFrame({column: []})
    chosen = rows[rows[column] == value].dropna(axis=1, how="all")
    if not len(chosen):
        raise FileFormatError(
            "experiment",
            f"nothing is recorded of {value!r}",
            file=path,
            fix=f"alkahest experiment run {experiment.name} --runs FOLDER",
        )
    yield from chosen.to_dict("records")


def _history(experiment: Experiment, run: Run, family: Path | None, runs: Path | None) -> Iterator[dict[str, Any]]:
    if runs is None:
        yield from recorded_rows(experiment, "history", "run", run.name)
        return
    config = read_config(run_file(experiment, run))
    if family is not None:
        files = {name: str(file_of(what, config.folder, family).resolve()) for name, what in config.inputs.items()}
        config = replace(config, inputs=files, components=str((family / "components").resolve()))
    for _ in stream_finetune(config, runs / run.name):
        pass
    yield from ({"run": run.name, **row} for row in read_history(runs / run.name).to_dict("records"))


def _stages(experiment: Experiment, case: Case, runs: Path | None) -> list[str]:
    if not case.run or runs is None:
        return [""]
    (run,) = (run for run in experiment.runs if run.name == case.run)
    names = [stage.name for stage in read_config(run_file(experiment, run)).stages]
    every = [f"{number}-{name}" for number, name in enumerate(names, 1)]
    for name in case.stages:
        if name not in every:
            raise unknown("experiment", f"case {case.name!r}: run {run.name!r} has no such stage", name, every)
    return [name for name in every if name in case.stages or not case.stages]


def _draw(
    experiment: Experiment, inputs: Inputs, case: Case, chosen: Mapping[str, Any], stage: str, runs: Path | None
) -> Iterator[dict[str, Any]]:
    scalars = {name: value for name, value in chosen.items() if name in names_in(case.weights)}
    known: dict[str, Any] = {**inputs, **scalars}
    if stage and runs is not None:
        known["stage"] = open_checkpoint(runs / case.run / f"{stage}.safetensors")
    weights = parse(case.weights, known)
    asked = prompts_of(case, case.prompts or experiment.prompts)
    settings = {**experiment.sampling, **case.sampling, **{k: v for k, v in chosen.items() if k not in scalars}}
    with tempfile.TemporaryDirectory() as work:
        if case.dtype:
            weights = open_checkpoint(weights.save(Path(work) / "saved.safetensors", dtype=case.dtype).path)
        pipe = _pipe(weights, inputs)
        captions = [scene.caption(case.unsaid) for scene in asked]
        images = sample(pipe, captions, batch=_BATCH, seed=experiment.seed, **settings).images
        measures = picture_measures(images, pipe).mean().to_dict()
        read = attributes(images, inputs.judge)
    row = {"case": case.name, **({"stage": stage} if stage else {}), **chosen, "prompts": len(asked)}
    yield {**row, **shares_as_asked(asked, read, case.unsaid), **measures}


def _sheet(experiment: Experiment, inputs: Inputs, sheet: Sheet) -> Image:
    """Each prompt by each model."""
    settings = {**experiment.sampling, **sheet.sampling}
    cells = []
    for label, weights in sheet.models.items():
        pipe = _pipe(parse(weights, inputs), inputs)
        images = sample(pipe, list(sheet.prompts), seed=experiment.seed, batch=_BATCH, **settings).images
        cells += [
            {"prompt": prompt, "model": label, "path": image}
            for prompt, image in zip(sheet.prompts, images, strict=True)
        ]
    return contact_sheet(pd.DataFrame(cells), ["prompt"], ["model"], title=f"{sheet.title} (miniatures)")


def steps_title(run: Run) -> str:
    """What the contact sheet of a run is called."""
    return f"{run.name} over its steps"


def _prompts(experiment: Experiment, run: Run) -> tuple[str, ...]:
    return read_config(run_file(experiment, run)).prompts


def _steps_sheet(experiment: Experiment, run: Run, runs: Path) -> Image:
    """What a run's prompts looked like along the way: at the start, and at steps that double from 25."""
    prompts = _prompts(experiment, run)
    known = sorted({int(path.name.split("-")[0]) for path in (runs / run.name / "pictures").glob("*.png")})
    chosen = {known[0], known[-1], *(step for step in known if step in (25, 50, 100, 200, 400, 800))}
    cells = [
        {"prompt": prompt, "step": step, "path": str(runs / run.name / "pictures" / f"{step:07}-{number:02}.png")}
        for step in sorted(chosen)
        for number, prompt in enumerate(prompts)
    ]
    return contact_sheet(pd.DataFrame(cells), ["prompt"], ["step"], title=f"{steps_title(run)} (miniatures)")


def _pipe(weights: Any, inputs: Inputs) -> Any:
    """A pipeline with the parts of the family at hand."""
    return pipeline(weights, inputs.components)


def prompts_of(case: Case, count: int) -> list[Scene]:
    """The held-out scenes that a case asks for."""
    only = {name: [values] if isinstance(values, str) else values for name, values in case.only.items()}
    scenes = [
        scene
        for scene in held_out_prompts(count * (10 if only else 1))
        if all(getattr(scene, name) in values for name, values in only.items())
    ]
    return [replace(scene, **case.ask) for scene in scenes[:count]]


def shares_as_asked(asked: list[Scene], read: pd.DataFrame, unsaid: tuple[str, ...] = ()) -> dict[str, float]:
    """Shares in per cent: as asked for each attribute that was said, ``right`` their mean, each style, what came
    unsaid.
    """
    said = [name for name in READ[:-1] if name not in unsaid]
    right = {name: 100 * share for name, share in as_asked(asked, read).items() if name in said}
    styles = {style: 100 * float((read["style"] == style).mean()) for style in _STYLES}
    came = {
        f"unsaid {value}": 100 * float((read[name] == value).mean()) for name in unsaid for value in ATTRIBUTES[name]
    }
    return {**right, "right": sum(right.values()) / len(right), **styles, **came}


def _by_part(measured: Measured, inputs: Inputs) -> Iterator[dict[str, Any]]:
    table = _table(measured, inputs)
    refiners = table[table.part.isin(family_of(table.tensor).bridge_parts)].assign(part="refiner")
    for rows in (table, table.assign(part="all"), refiners):
        whole = rolled_up(rows, "part").drop(
            columns=["ulps", "ulp_energy"], errors="ignore"
        )  # histograms are no numbers
        yield from ({"case": measured.name, **row} for row in whole.to_dict("records"))


def _multipliers(measured: Measured, inputs: Inputs) -> Iterator[dict[str, Any]]:
    options = {"on": parse(measured.on, inputs)} if measured.on else {}
    found = needed_multiplier(parse(measured.delta, inputs), **options)
    yield from ({"case": measured.name, "basis": basis, "k": found.bases[basis]} for basis in BASES)


def _rounding(measured: Measured, inputs: Inputs) -> Iterator[dict[str, Any]]:
    yield from (
        {"case": measured.name, **row}
        for row in rounding_curve(_table(measured, inputs), list(measured.ks)).to_dict("records")
    )


def _table(measured: Measured, inputs: Inputs) -> pd.DataFrame:
    return delta_table(parse(measured.delta, inputs), on=parse(measured.on, inputs) if measured.on else None)

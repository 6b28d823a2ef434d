"""What an experiment is made of, read from its ``experiment.toml`` and checked before anything is drawn.

title = "A derivative comes over"
claim = "What the article says, in our words."
method = "What is done about it."

[inputs]
bridge = "mini:tb1"                                   # a member or a LoRA of the miniature family
base8 = { of = "mini:base", dtype = "fp8_e4m3fn" }    # saved so, and opened again
extra = { extract = "base - bridge", energy = 0.995 } # a LoRA, made on the spot

[[case]]                                              # rows of the table "pictures"
name = "cyan"
weights = "bridge.protect('refiner') + k * (variant - base)"
over = { k = [0, 1, 2] }                              # named scalars and sampling settings
ask = { colour = "cyan" }                             # what held-out prompts are changed to

[[check]]                                             # the verdict: all hold, some, or none
says = "cyan comes over at k = 2"
column = "colour"
where = { case = "cyan", k = 2 }
at_least = 60
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alkahest.errors import FileFormatError, unknown
from alkahest.experiment.growing import BRIDGES
from alkahest.files.toml import dataclass_of, read_toml
from alkahest.mini.scenes import ATTRIBUTES
from alkahest.pictures.settings import Sampling

ROOT = Path("experiments")
VERDICTS = ("reproduced", "partly", "not reproduced", "true by construction", "needs the real weights")


@dataclass(frozen=True)
class Case:
    """Weights that draw held-out prompts; a row for each combination of ``over``, with shares in per cent."""

    name: str  # the case in the table
    weights: str  # a recipe over the inputs, whose other names come from ``over``; with ``run`` also ``stage``
    over: Mapping[str, Any] = field(default_factory=dict)  # name -> values
    ask: Mapping[str, Any] = field(default_factory=dict)  # attribute -> value that every prompt asks for
    only: Mapping[str, Any] = field(default_factory=dict)  # attribute -> values: prompts that ask for one of them
    unsaid: tuple[str, ...] = ()  # attributes that prompts do not mention; what comes then is counted
    dtype: str = ""  # the merged model is saved so, and opened again
    sampling: Mapping[str, Any] = field(default_factory=dict)  # settings of `ak.sample` where others are wanted
    prompts: int = 0  # how many; 0: as the experiment says
    run: str = ""  # a training run whose stages are drawn one after the other
    stages: tuple[str, ...] = ()  # of that run: all of them, or only these, such as "1-people"


@dataclass(frozen=True)
class Measured:
    """A delta measured: rows of the table "deltas" by part, and on request of "multipliers" and "rounding"."""

    name: str  # the delta in the table
    delta: str  # a recipe over the inputs
    on: str = ""  # what it is to be added to, a recipe; its base if left out
    multipliers: bool = False  # compute its multiplier on weights, by each basis
    ks: tuple[int | float, ...] = ()  # multipliers at which rounding is looked at


@dataclass(frozen=True)
class Advised:
    """A multiplier by pictures against what the judge sees over k: rows of the tables "advice" and "judged"."""

    name: str  # the pair in the table
    delta: str  # a recipe over the inputs
    on: str  # what it is added to, a recipe
    ask: Mapping[str, Any]  # attribute -> value: the new thing
    ks: tuple[int | float, ...]  # at which the judge looks, besides 0
    drawn_by: str = ""  # what draws the new thing, if not the delta's own variant
    seeds: tuple[int, ...] = (1, 2, 3)  # of pictures and noise, the judge once with each


@dataclass(frozen=True)
class Aligned:
    """Streams of two models mapped onto each other, by seed: rows of "streams", "joined" and "units"."""

    name: str  # the pair in the table
    a: str  # a recipe over the inputs
    b: str  # the other
    pictures: int = 48  # whose streams are compared
    seeds: tuple[int, ...] = (1, 2, 3)  # of the pictures and their noise


@dataclass(frozen=True)
class Run:
    """A training run; its measurements are rows of the table "history". Grown only when asked to."""

    name: str  # the run in the table
    config: str  # a file beside experiment.toml or above, or mini:NAME for the one that a shipped bridge was grown from


@dataclass(frozen=True)
class Check:
    """One number against a bound: the row of ``table`` where ``where`` holds, or the ``of`` of several."""

    says: str  # the check in words, as the verdict's table shows it
    column: str  # whose number is checked
    where: Mapping[str, Any]  # column -> value: which rows
    table: str = "pictures"  # where the number stands
    of: str = ""  # max, min, mean or sum, if several rows match
    minus: Mapping[str, Any] = field(default_factory=dict)  # where the same column is taken off
    at_least: float | None = None  # the bound; a check has this one or the other
    at_most: float | None = None  # the bound from above


@dataclass(frozen=True)
class Drawing:
    """A figure: ``columns`` of a table over ``x``, a line or a group of bars for each ``by`` and column."""

    title: str  # above it
    y: str  # the axis label, with its unit
    columns: tuple[str, ...]  # what is drawn
    x: str = "k"  # the column along the axis
    kind: str = "lines"  # or bars
    table: str = "pictures"  # whose rows are drawn
    by: str = "case"  # the column that tells lines apart
    where: Mapping[str, Any] = field(default_factory=dict)  # column -> value: which rows
    log: bool = False  # a logarithmic axis of x


@dataclass(frozen=True)
class Sheet:
    """Pictures to look at: prompts down, models across."""

    title: str  # above it
    prompts: tuple[str, ...]  # a row for each
    models: Mapping[str, Any]  # label -> a recipe over the inputs
    sampling: Mapping[str, Any] = field(default_factory=dict)  # settings of `ak.sample` where others are wanted


@dataclass(frozen=True)
class Experiment:
    """A claim and how it is tested. ``folder`` is where its files are."""

    title: str  # of its page
    claim: str  # what is tested, in our words
    method: str  # what is done about it
    cases: tuple[Case, ...] = ()  # what is drawn and read by the judge
    deltas: tuple[Measured, ...] = ()  # what is measured on weights
    advised: tuple[Advised, ...] = ()  # whose multiplier by pictures is held against the judge
    aligned: tuple[Aligned, ...] = ()  # whose streams are compared
    runs: tuple[Run, ...] = ()  # what is trained
    checks: tuple[Check, ...] = ()  # the verdict: all hold, some, or none
    figures: tuple[Drawing, ...] = ()  # what is plotted
    sheets: tuple[Sheet, ...] = ()  # pictures to look at
    inputs: Mapping[str, Any] = field(default_factory=dict)  # name -> mini:NAME, a path, or a table that makes it
    prompts: int = 60  # held-out prompts a row
    seed: int = 1000  # of the held-out prompts and their pictures
    sampling: Mapping[str, Any] = field(default_factory=lambda: {"steps": 12, "cfg": 3.0})  # settings of `ak.sample`
    holds: str = "reproduced"  # the verdict if every check holds
    remark: str = ""  # what the numbers mean, and what they do not
    folder: Path = Path()

    @property
    def name(self) -> str:
        return self.folder.name


# Tables of the file that may stand several times: the field that they fill, and what each is.
LISTED: dict[str, tuple[str, type[Any]]] = {
    "case": ("cases", Case),
    "delta": ("deltas", Measured),
    "advice": ("advised", Advised),
    "alignment": ("aligned", Aligned),
    "run": ("runs", Run),
    "check": ("checks", Check),
    "figure": ("figures", Drawing),
    "sheet": ("sheets", Sheet),
}


def read_experiment(folder: str | Path) -> Experiment:
    """Read ``experiment.toml`` of a folder. FileFormatError, UnknownNameError: what is wrong, and where."""
    place = Path(folder)
    path = place / "experiment.toml"
    given = read_toml(path, "experiment")
    top = {name: value for name, value in given.items() if name not in LISTED}
    listed: dict[str, Any] = {}
    for name, (field_name, kind) in LISTED.items():
        each = given.get(name, [])
        if not isinstance(each, list):
            raise FileFormatError("experiment", f"{name} is a list", file=path, fix=f"[[{name}]]")
        listed[field_name] = tuple(
            dataclass_of(kind, one, "experiment", path, f"{name} {n}") for n, one in enumerate(each, 1)
        )
    found = dataclass_of(Experiment, top, "experiment", path, "the experiment", {"folder": place, **listed})
    _check(found, path)
    return found


def experiments(root: str | Path = ROOT) -> list[Experiment]:
    """Every experiment in a folder of experiments, by number; FileFormatError if there are none."""
    return [read_experiment(path.parent) for path in _files(root)]


def _files(root: str | Path) -> list[Path]:
    found = sorted(Path(root).glob("[0-9][0-9]-*/experiment.toml"))
    if not found:
        raise FileFormatError(
            "experiment",
            "there are no experiments here",
            file=Path(root).absolute(),
            expected="folders like 01-two-lineages with an experiment.toml",
            fix="in a clone of the project, or --root FOLDER",
        )
    return found


def experiment_named(name: str, root: str | Path = ROOT) -> Experiment:
    """One experiment by its folder's name, its number, or a path to its folder."""
    if (Path(name) / "experiment.toml").exists():
        return read_experiment(name)
    known = {path.parent.name: path.parent for path in _files(root)}
    for each, folder in known.items():
        if name in (each, each[:2]) or (name.isdigit() and int(name) == int(each[:2])):
            return read_experiment(folder)
    raise unknown("experiment", "no such experiment", name, known, file=root)


def run_file(experiment: Experiment, run: Run) -> Path:
    """The configuration of a training run."""
    if run.config.startswith("mini:"):
        name = run.config.removeprefix("mini:")
        known = [path.stem for path in BRIDGES.glob("*.toml")]
        _require_among(name, known, f"run {run.name!r}: the family has no such bridge", experiment.folder)
        return BRIDGES / f"{name}.toml"
    return experiment.folder / run.config


def _check(experiment: Experiment, path: Path) -> None:
    _require_among(experiment.holds, VERDICTS, "no such verdict", path)
    if not experiment.checks:
        raise _refusal("a claim needs a check", path, fix="[[check]]")
    names = [case.name for case in experiment.cases]
    if twice := [name for name in names if names.count(name) > 1]:
        raise _refusal("two cases have one name", path, found=twice[0])
    _check_sampling(experiment.sampling, "the experiment", path)
    for case in experiment.cases:
        _check_case(case, {run.name for run in experiment.runs}, path)
    for one in experiment.advised:
        _check_attributes(one.ask, f"advice {one.name!r}", path)
        if not one.ask or not one.ks or not one.seeds:
            raise _refusal(f"advice {one.name!r} needs ask, ks and seeds", path)
    for check in experiment.checks:
        if (check.at_least is None) == (check.at_most is None):
            raise _refusal(f"check {check.says!r} needs one bound", path, fix="at_least = ... or at_most = ...")
        if check.of not in ("", "max", "min", "mean", "sum"):
            raise _refusal(f"check {check.says!r}: of is max, min, mean or sum", path, found=repr(check.of))
    for figure in experiment.figures:
        if figure.kind not in ("lines", "bars"):
            raise _refusal(f"figure {figure.title!r}: kind is lines or bars", path, found=repr(figure.kind))
    for sheet in experiment.sheets:
        _check_sampling(sheet.sampling, f"sheet {sheet.title!r}", path)
    for name, what in experiment.inputs.items():
        if not (re.fullmatch(r"[a-z_][a-z0-9_]*", name) and isinstance(what, (str, Mapping))):
            raise _refusal("an input is a name and a file, or a table", path, found=f"{name} = {what!r}")


def _check_case(case: Case, runs: Collection[str], path: Path) -> None:
    where = f"case {case.name!r}"
    if case.run:
        _require_among(case.run, runs, f"{where} is of a run that is not there", path)
    for asked in (case.ask, case.only, dict.fromkeys(case.unsaid, ())):
        _check_attributes(asked, where, path)
    _check_sampling(case.sampling, where, path)
    for name, values in case.over.items():
        if not isinstance(values, list) or not values:
            raise _refusal(f"{where}: {name} needs a list of values", path, found=repr(values))


def _check_attributes(asked: Mapping[str, Any], where: str, path: Path) -> None:
    for name, values in asked.items():
        _require_among(name, ATTRIBUTES, f"{where}: scenes have no such attribute", path)
        for value in [values] if isinstance(values, str) else values:
            _require_among(value, ATTRIBUTES[name], f"{where}: {name} has no such value", path)


def _check_sampling(given: Mapping[str, Any], where: str, path: Path) -> None:
    dataclass_of(Sampling, given, "experiment", path, f"{where}: sampling").settings  # noqa: B018


def _require_among(value: object, known: Collection[str], problem: str, path: Path) -> None:
    if value not in known:
        raise unknown("experiment", problem, value, known, file=path)


def _refusal(problem: str, path: Path, found: object = None, fix: str | None = None) -> FileFormatError:
    return FileFormatError("experiment", problem, file=path, found=found, fix=fix)

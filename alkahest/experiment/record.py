"""What an experiment found, on disk: tables, checks, verdict, README and a manifest that says what it stands on."""

from __future__ import annotations

import hashlib
import io
import json
import math
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from alkahest.errors import FileFormatError
from alkahest.experiment.config import Check, Experiment, run_file
from alkahest.experiment.measure import Found, Tables, file_of, steps_title
from alkahest.files.hashes import blake3_of
from alkahest.files.reader import Reader
from alkahest.files.whole import write_file, write_text
from alkahest.pictures.sheet import png_bytes
from alkahest.version import __version__

Draw = Callable[[Experiment, Tables], dict[str, bytes]]
_MEASURED = ("inputs", "cases", "deltas", "runs", "sheets", "prompts", "seed", "sampling")
_LATER = ("advised", "aligned")  # kinds that came later: they count where there are any, so that older digests stay
_STANDS_ON = ("torch", "diffusers", "transformers", "safetensors", "numpy", "pandas")


@dataclass(frozen=True)
class Checked:
    """One check: the number it found, and whether it holds."""

    says: str
    found: float
    bound: str
    holds: bool


def evaluate_checks(experiment: Experiment, tables: Tables) -> list[Checked]:
    """Every check's number. FileFormatError if a check names rows or columns that are not there."""
    rows = []
    for check in experiment.checks:
        found = _number(experiment, check, tables, check.where)
        if check.minus:
            found -= _number(experiment, check, tables, check.minus)
        if check.at_least is not None:
            rows.append(Checked(check.says, found, f"at least {check.at_least:g}", found >= check.at_least))
        else:
            assert check.at_most is not None  # a check has one bound
            rows.append(Checked(check.says, found, f"at most {check.at_most:g}", found <= check.at_most))
    return rows


def verdict(experiment: Experiment, checks: list[Checked]) -> str:
    """What the checks say: all hold, some, or none. A claim about the real weights stays one."""
    if experiment.holds == "needs the real weights":
        return experiment.holds
    holding = sum(check.holds for check in checks)
    return experiment.holds if holding == len(checks) else "partly" if holding else "not reproduced"


def record(
    experiment: Experiment, found: Found, family: Path | None, seconds: float | None, draw: Draw, grown: bool = False
) -> str:
    """Write the tables, README.md and manifest.json of a run, and the figures that ``draw`` gives as bytes; the
    verdict.

    Without ``seconds`` nothing was measured anew, and the manifest still says when and where it was; ``grown`` says
    that its training runs were. Whatever may fail, such as a check or a figure, does so before anything is written.
    """
    texts = {name: table.to_csv(index=False, float_format="%.6g") for name, table in found.tables.items()}
    tables = {name: pd.read_csv(io.StringIO(text)) for name, text in texts.items()}  # as a later look finds them
    checks = evaluate_checks(experiment, tables)
    told = verdict(experiment, checks)
    texts["checks"] = pd.DataFrame([vars(check) for check in checks]).to_csv(index=False, float_format="%.6g")
    files = {f"{name}.csv": text.encode() for name, text in texts.items()} | draw(experiment, tables)
    files |= {f"{slug(title)}.png": png_bytes(sheet, optimize=True) for title, sheet in found.sheets.items()}
    about = _manifest(experiment) if seconds is None else measured_by(experiment, family, seconds, grown)
    results = experiment.folder / "results"
    results.mkdir(exist_ok=True)
    for old in results.iterdir():
        if old.name not in files and old.stem not in _sheets(experiment):
            old.unlink()
    for name, content in files.items():
        write_file(results / name, content)
    write_text(experiment.folder / "README.md", readme(experiment))
    about |= {"verdict": told, "results": {path.name: digest(path) for path in sorted(results.iterdir())}}
    write_text(experiment.folder / "manifest.json", json.dumps(about, indent=1) + "\n")
    return told


def _sheets(experiment: Experiment) -> set[str]:
    """Names of the contact sheets, which may be from an earlier run."""
    return {*(slug(sheet.title) for sheet in experiment.sheets), *(slug(steps_title(run)) for run in experiment.runs)}


def measured_by(experiment: Experiment, family: Path | None, seconds: float, grown: bool) -> dict[str, Any]:
    """What the numbers of a run stand on; those of training runs that were not grown anew on what they stood before."""
    now = {
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {"alkahest": __version__, **{name: _version(name) for name in _STANDS_ON}},
    }
    runs = {}
    if experiment.runs:
        runs = {"grown": {"digest": grown_digest(experiment), **now} if grown else _manifest(experiment)["grown"]}
    return {
        **runs,
        "measured": measured_digest(experiment),
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        **now,
        "inputs": {name: _describe(what, experiment, family) for name, what in experiment.inputs.items()},
    }


def measured_digest(experiment: Experiment) -> str:
    """A hash of all that changes numbers; words, checks and figures do not."""
    kept = {name: getattr(experiment, name) for name in _MEASURED}
    kept |= {name: found for name in _LATER if (found := getattr(experiment, name))}
    trained = [
        what["trained"] for what in experiment.inputs.values() if isinstance(what, Mapping) and "trained" in what
    ]
    kept |= {"trained": [(experiment.folder / name).read_text() for name in trained]} if trained else {}
    return _hash({**kept, "runs": [run.name for run in experiment.runs]})  # what is in their files is `grown_digest`'s


def grown_digest(experiment: Experiment) -> str:
    """A hash of the training runs, their configurations, and what is drawn of them."""
    configs = {run.name: run_file(experiment, run).read_text() for run in experiment.runs}
    cases = [case for case in experiment.cases if case.run]
    return _hash(
        {
            "runs": configs,
            "cases": cases,
            **{name: getattr(experiment, name) for name in ("inputs", "prompts", "seed", "sampling")},
        }
    )


def _hash(kept: Mapping[str, Any]) -> str:
    text = json.dumps(kept, default=lambda value: vars(value) if is_dataclass(value) else str(value), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def require_grown(experiment: Experiment, family: Path | None) -> None:
    """Raise FileFormatError unless the recorded rows of training runs are of these runs, and of the shipped family."""
    manifest = experiment.folder / "manifest.json"
    about = _manifest(experiment).get("grown", {}) if manifest.exists() else {}
    if family is not None or about.get("digest") != grown_digest(experiment):
        raise FileFormatError(
            "experiment",
            "its training runs were not recorded, or with other weights or another configuration",
            file=manifest,
            fix=f"alkahest experiment run {experiment.name} --runs FOLDER",
        )


def read_found(experiment: Experiment) -> Found:
    """What an earlier run found. FileFormatError if there was none, or it measured something else."""
    about = _manifest(experiment)
    if about.get("measured") != measured_digest(experiment):
        raise FileFormatError(
            "experiment",
            "what is recorded was measured by another experiment.toml",
            file=experiment.folder / "manifest.json",
            fix=f"alkahest experiment run {experiment.name}",
        )
    return Found(tables_of(experiment))


def _manifest(experiment: Experiment) -> dict[str, Any]:
    path = experiment.folder / "manifest.json"
    if not path.exists():
        raise FileFormatError(
            "experiment", "nothing is recorded", file=path, fix=f"alkahest experiment run {experiment.name}"
        )
    about: dict[str, Any] = json.loads(path.read_text())
    return about


def slug(title: str) -> str:
    """A title as a file's name: ``Over k, and 0`` is ``over-k-and-0``."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def tables_of(experiment: Experiment) -> Tables:
    """The recorded tables, ``checks`` apart."""
    paths = sorted((experiment.folder / "results").glob("*.csv"))
    return {path.stem: pd.read_csv(path) for path in paths if path.stem != "checks"}


def checked_of(experiment: Experiment) -> list[Checked]:
    """The recorded checks. FileFormatError if the experiment was never run."""
    path = experiment.folder / "results" / "checks.csv"
    if not path.exists():
        raise FileFormatError(
            "experiment", "nothing is recorded", file=path, fix=f"alkahest experiment run {experiment.name}"
        )
    return [Checked(**row) for row in pd.read_csv(path).to_dict("records")]


def readme(experiment: Experiment) -> str:
    """README.md: the claim, the method, the verdict and the numbers it stands on."""
    checks = checked_of(experiment)
    found = verdict(experiment, checks)
    lines = [f"# {experiment.title}", "", f"**Claim.** {experiment.claim}", "", f"**Method.** {experiment.method}", ""]
    lines += [f"**Verdict on the miniatures: {found}.** {experiment.remark}".strip(), ""]
    rows = [[row.says, f"{row.found:.4g}", row.bound, "yes" if row.holds else "**no**"] for row in checks]
    lines += markdown(["check", "found", "wanted", "holds"], rows)
    for path in [
        path for ending in ("png", "svg") for path in sorted((experiment.folder / "results").glob(f"*.{ending}"))
    ]:
        lines += ["", f"![{path.stem.replace('-', ' ')}](results/{path.name})"]
    files = ", ".join(
        f"[{path.name}](results/{path.name})" for path in sorted((experiment.folder / "results").glob("*.csv"))
    )
    lines += [
        "",
        f"Written by `alkahest experiment run {experiment.name}` from [experiment.toml](experiment.toml); numbers: "
        f"{files}; [manifest.json](manifest.json) has inputs and versions.",
    ]
    return "\n".join(lines) + "\n"


def index(found: list[Experiment]) -> str:
    """The table of all experiments with their verdicts, as Markdown."""
    rows = []
    for one in found:
        rows.append([f"[{one.name[:2]}]({one.name}/)", one.title, one.claim, f"**{verdict(one, checked_of(one))}**"])
    return "\n".join(markdown(["", "experiment", "claim", "on the miniatures"], rows)) + "\n"


def verdicts(found: list[Experiment], folder: str) -> str:
    """Titles and verdicts alone, with links into ``folder``, as Markdown."""
    rows = [[f"[{one.name[:2]} {one.title}]({folder}/{one.name}/)", verdict(one, checked_of(one))] for one in found]
    return "\n".join(markdown(["claim", "on the miniatures"], rows)) + "\n"


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table, line by line."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines]


def _number(experiment: Experiment, check: Check, tables: Tables, where: Mapping[str, Any]) -> float:
    def wrong(problem: str, found: object) -> FileFormatError:
        return FileFormatError(
            "experiment", f"check {check.says!r}: {problem}", file=experiment.folder / "experiment.toml", found=found
        )

    if check.table not in tables:
        raise wrong("there is no such table", f"{check.table}; there are {', '.join(tables)}")
    table = tables[check.table]
    for name in [*where, check.column]:
        if name not in table.columns:
            raise wrong(f"the table {check.table} has no such column", name)
    rows = rows_where(table, where)[check.column].dropna()
    if not len(rows) or (len(rows) > 1 and not check.of):
        raise wrong("it needs one row" if not check.of else "no row matches", f"{len(rows)} where {dict(where)}")
    return float(getattr(rows, check.of)()) if check.of else float(rows.iloc[0])


def rows_where(table: pd.DataFrame, where: Mapping[str, Any]) -> pd.DataFrame:
    """The rows that have these values; a list means one of them, and numbers are equal up to rounding."""
    for name, value in where.items():
        wanted = value if isinstance(value, list) else [value]
        table = table[[any(_equal(one, other) for other in wanted) for one in table[name]]]
    return table


def _equal(one: Any, other: Any) -> bool:
    numbers = isinstance(one, (int, float)) and isinstance(other, (int, float))
    return math.isclose(one, other, rel_tol=1e-6) if numbers else one == other


def _describe(what: Any, experiment: Experiment, family: Path | None) -> Any:
    file = what if isinstance(what, str) else what.get("of")
    told = {"file": what} if isinstance(what, str) else dict(what)
    return (
        told if file is None else {**told, "blake3": blake3_of([Reader(file_of(file, experiment.folder, family))])[0]}
    )


def digest(path: Path) -> str:
    """Of a small file, as the manifest has it."""
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"

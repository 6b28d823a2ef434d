"""Run an experiment and record it, figures included; and one HTML report of them all."""

from __future__ import annotations

import html
import time
from collections.abc import Iterator
from pathlib import Path

from alkahest.engine.events import Event
from alkahest.errors import FileFormatError
from alkahest.experiment.config import Experiment, experiments
from alkahest.experiment.figures import figure_of, figures_of
from alkahest.experiment.measure import stream_experiment
from alkahest.experiment.record import (
    Checked,
    checked_of,
    index,
    read_found,
    record,
    require_grown,
    tables_of,
    verdict,
    verdicts,
)
from alkahest.files.whole import write_text
from alkahest.lab.figure import image_tag
from alkahest.lab.report import STYLE
from alkahest.version import __version__

_END = "<!-- end -->"
_INDEX = "<!-- index: written by alkahest experiment run -->"
_VERDICTS = "<!-- verdicts: written by alkahest experiment run -->"


def run_experiment(experiment: Experiment, family: Path | None = None, runs: Path | None = None) -> Iterator[Event]:
    """Measure an experiment and write its folder; events, the last with the verdict. Nothing is written before the
    end.
    """
    if experiment.runs and runs is None:
        require_grown(experiment, family)
    started = time.monotonic()
    event = None
    for event in stream_experiment(experiment, family, runs):
        if event.result is None:
            yield event
    assert event is not None  # there is always a last one, with the tables
    told = record(experiment, event.result, family, time.monotonic() - started, figures_of, runs is not None)
    yield Event(event.total, event.total, "done", told)


def rewrite(experiment: Experiment) -> str:
    """Write checks, figures, README and verdict anew from the recorded tables, after words or bounds have changed."""
    return record(experiment, read_found(experiment), None, None, figures_of)


def write_index(root: Path) -> None:
    """Put the table of all recorded experiments into their README, and the verdicts into the one above, if it has a
    place.
    """
    done = [one for one in experiments(root) if (one.folder / "results" / "checks.csv").exists()]
    path, above = root / "README.md", root.parent / "README.md"
    text = path.read_text() if path.exists() else f"# Experiments\n\n{_INDEX}\n{_END}\n"
    write_text(path, _fill(text, _INDEX, index(done)))
    if above.exists() and _VERDICTS in (text := above.read_text()):
        write_text(above, _fill(text, _VERDICTS, verdicts(done, root.name)))


def _fill(text: str, start: str, content: str) -> str:
    if _END not in text.partition(start)[2]:
        raise FileFormatError(
            "experiment",
            "the table in this README has no end",
            expected=_END,
            found=f"{start} alone",
            fix="put the end marker back",
        )
    head, _, rest = text.partition(start)
    _, _, tail = rest.partition(_END)
    return f"{head}{start}\n{content}{_END}{tail}"


def write_reproduction(path: str | Path, found: list[Experiment]) -> None:
    """One HTML file of all experiments: verdicts first, then each one's claim, checks, figures and tables."""
    write_text(Path(path), reproduction(found))


def reproduction(found: list[Experiment]) -> str:
    """The text of `write_reproduction`."""
    found = [one for one in found if (one.folder / "manifest.json").exists()]
    told = {one.name: checked_of(one) for one in found}
    rows = "".join(
        _row(
            f'<a href="#{html.escape(one.name)}">{_text(one.name[:2])}</a>',
            _text(one.title),
            _text(verdict(one, told[one.name])),
        )
        for one in found
    )
    parts = [
        "<h1>The article, reproduced on miniatures</h1>",
        f"<p>Alkahest {__version__}. Every number here is of the miniature family: 1.5 million parameters, judged "
        "by a network that reads pictures back.</p>",
        f"<table><tr><th></th><th>experiment</th><th>verdict</th></tr>{rows}</table>",
    ]
    for one in found:
        parts.append(_section(one, told[one.name]))
    head = f'<meta charset="utf-8"><title>Alkahest: the article, reproduced</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{chr(10).join(parts)}</body></html>\n'


def _row(*cells: str) -> str:
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _section(one: Experiment, checks: list[Checked]) -> str:
    tables = tables_of(one)
    figures = [figure_of(drawing, tables) for drawing in one.figures]
    lines = "".join(
        _row(_text(c.says), f"{c.found:.4g}", _text(c.bound), "yes" if c.holds else "<b>no</b>") for c in checks
    )
    whole = "".join(
        f"<details><summary>{_text(name)}: {len(table)} "
        f"rows</summary>{table.round(3).to_html(index=False, border=0, na_rep='')}</details>"
        for name, table in tables.items()
    )
    sheets = "".join(
        f"<figure>{image_tag(path.read_bytes(), path.stem.replace('-', ' '))}</figure>"
        for path in sorted((one.folder / "results").glob("*.png"))
    )
    drawn = sheets + "".join(
        f"<figure>{image_tag(plot.png(), plot.alt)}<figcaption>{_text(plot.alt)}</figcaption></figure>"
        for plot in figures
    )
    return (
        f'<h2 id="{html.escape(one.name)}">{_text(one.name[:2])} {_text(one.title)}</h2>'
        f"<p><b>Claim.</b> {_text(one.claim)}</p>"
        f"<p><b>Method.</b> {_text(one.method)}</p><p><b>Verdict: {_text(verdict(one, checks))}.</b> "
        f"{_text(one.remark)}</p>"
        f"<table><tr><th>check</th><th>found</th><th>wanted</th><th>holds</th></tr>{lines}</table>{drawn}{whole}"
    )


def _text(text: str) -> str:
    return html.escape(text, quote=False)

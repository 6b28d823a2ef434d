"""What was measured as one HTML file that needs nothing else."""

from __future__ import annotations

import html
from pathlib import Path

import pandas as pd

from alkahest.files.whole import replaced, write_text
from alkahest.lab import plots
from alkahest.lab.figure import Plot, image_tag
from alkahest.lab.report_origin import Origin
from alkahest.measure.lineage import check_of
from alkahest.measure.measured_table import SHOWN, readable_html
from alkahest.measure.multiplier import Multiplier
from alkahest.measure.rounding import absorbed, rounding_curve
from alkahest.measure.table import COLUMNS, rolled_up
from alkahest.version import __version__

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; }
img { max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .2em .7em; text-align: right; border-bottom: 1px solid #8884; }
td:first-child, th:first-child { text-align: left; }
code { overflow-wrap: anywhere; } figcaption { font-size: 85%; opacity: .8; } details { margin: 1em 0; }
"""


def write_report(
    path: str | Path, table: pd.DataFrame, multiplier: Multiplier | None = None, origin: Origin | None = None
) -> list[str]:
    """Write a delta table as HTML: by part, plots, rounding, refiner check, and every tensor; says what it replaced.

    >>> write_report("delta.html", ak.delta_table(variant - base), ak.needed_multiplier(variant - base))

    OutputError if the file cannot be written; an older one is then left as it was.
    """
    before = replaced(Path(path))
    write_text(Path(path), report(table, multiplier, origin))
    return before


def report(table: pd.DataFrame, multiplier: Multiplier | None = None, origin: Origin | None = None) -> str:
    """The text of `write_report`."""
    of = str(table.attrs.get("of", "a delta"))
    parts = [
        f"<h1>{_text(of)}</h1>",
        f"<p>{len(table):,} tensors, {int(table.elements.sum()):,} elements. Alkahest {__version__}.</p>",
    ]
    if origin is not None:
        parts += ["<h2>Files</h2>", origin.as_html()]
    if not (table.delta_norm > 0).any():
        return _page(of, [*parts, "<p><b>No difference: all tensors are equal.</b></p>"])
    multiple = table.delta_norm.sum() / table.gap.sum() if table.gap.sum() > 0 else 1.0
    if abs(multiple - 1) > 1e-6:
        parts.append(
            f"<p><b>Sizes and rounding are of what the title names</b>, {multiple:.4g} times the length of variant - "
            "base: over k below, 1 is that multiple. Cosine and the verdict are of variant and base themselves.</p>"
        )
    parts += ["<h2>By part</h2>", readable_html(_with_absorbed(rolled_up(table, "part")), with_rest=False)]
    if not table.base_norm.isna().any():
        parts += ["<h2>Can it be imported?</h2>", check_of(table)._repr_html_()]
    if multiplier is not None:
        parts += ["<h2>The multiplier</h2>", multiplier._repr_html_()]
        parts += [] if multiplier.curve is None else [_figure(plots.loss_curve(multiplier))]
        parts.append(_figure(plots.multiplier_by_part(multiplier)))
    parts += [
        "<h2>Where it differs</h2>",
        _figure(plots.delta_magnitudes(table)),
        _figure(plots.magnitude_heatmap(table)),
    ]
    curve = rounding_curve(table)
    parts += ["<h2>Rounding</h2>", _figure(plots.survival(curve)), _figure(plots.noise(curve))]
    parts += [
        "<h2>Every tensor</h2><details><summary>show</summary>",
        readable_html(_with_absorbed(table), with_rest=False),
        "</details>",
        f"<h2>What the columns are</h2>{_legend()}",
    ]
    return _page(of, parts)


def _with_absorbed(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(absorbed=absorbed(table)["count"])


def _figure(plot: Plot) -> str:
    return f"<figure>{image_tag(plot.png(), plot.alt)}<figcaption>{_text(plot.alt)}</figcaption></figure>"


def _legend() -> str:
    """What each column of the tables above means: d is the delta, v the variant, b its base, w what d is added to."""
    names = [name for name in SHOWN if name in COLUMNS]
    rows = [f"<dt>{_text(SHOWN[name][0])}</dt><dd>{_text(COLUMNS[name])}</dd>" for name in names]
    return (
        "<p>d is the delta, v the variant, b its base, w what d is added to, and |x| the norm of x.</p>"
        f"<dl>{''.join(rows)}</dl>"
    )


def _page(title: str, parts: list[str]) -> str:
    head = f'<meta charset="utf-8"><title>{_text(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{chr(10).join(parts)}</body></html>\n'


def _text(text: str) -> str:
    return html.escape(text, quote=False)

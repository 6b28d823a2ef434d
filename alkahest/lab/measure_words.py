"""Measures of pictures in words, beside the range that a model's own pictures have."""

from __future__ import annotations

import html
from collections.abc import Mapping

WORDS = {
    "lag1": ("how smooth", "correlation of neighbouring pixels: near 1 in pictures, 0 in white noise"),
    "high_freq": ("how grainy", "share of fine detail: near 0 in pictures, 0.8 in white noise"),
    "grid": ("how blocky", "step across the borders of tokens over the step elsewhere: 1 shows no grid"),
    "contrast": ("how contrasty", "standard deviation of the grey values, in 0 to 1"),
    "latent_std": ("how strong in latents", "standard deviation of the latents, encoded again: 1 is usual"),
    "latent_lag1": ("how smooth in latents", "correlation of neighbouring latents, encoded again"),
}
Range = tuple[float, float]


def words_of(measure: str) -> str:
    """What a measure says, with its name; a measure of somebody's own has its name only."""
    return f"{WORDS[measure][0]} ({measure})" if measure in WORDS else measure


def measures_table(columns: Mapping[str, Mapping[str, float]], usual: Mapping[str, Range], whose: str) -> str:
    """Measures as HTML, a row each and a column for each picture, beside the ``usual`` range of ``whose`` pictures.

    A number outside that range is marked with a word, not with a colour alone.
    """
    names = list(dict.fromkeys(name for values in columns.values() for name in values))
    heads = [*columns, *([f"{whose}'s own"] if usual else [])]
    lines = ["<tr><th></th>" + "".join(f"<th scope='col'>{html.escape(head)}</th>" for head in heads) + "</tr>"]
    for name in names:
        cells = [_cell(values.get(name), usual.get(name)) for values in columns.values()]
        if usual:
            low, high = usual.get(name, (float("nan"), float("nan")))
            cells.append(f"{low:.3g} to {high:.3g}")
        title = html.escape(WORDS.get(name, ("", ""))[1])
        head = f"<th scope='row' title='{title}' style='text-align:left'>{html.escape(words_of(name))}</th>"
        lines.append(f"<tr>{head}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table style='line-height:1.3'>{''.join(lines)}</table>"


def _cell(value: float | None, usual: Range | None) -> str:
    if value is None:
        return ""
    if usual is None or usual[0] <= value <= usual[1]:
        return f"{value:.4g}"
    return f"<b>{value:.4g} {'high' if value > usual[1] else 'low'}</b>"

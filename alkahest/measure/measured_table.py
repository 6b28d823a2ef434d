"""Measured tables that can be read: one line a row, columns in an order with units, and bars for what is compared."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from typing import Any

import pandas as pd

_Format = Callable[[Any], str]


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"


def _count(value: float) -> str:
    return f"{int(value):,}"


def _number(value: float) -> str:
    return f"{value:.4g}"


# In the order in which they are shown: a head with its unit, and how a value is written.
SHOWN: dict[str, tuple[str, _Format]] = {
    "tensor": ("tensor", str),
    "part": ("part", str),
    "block": ("block", lambda block: "" if block == -1 else str(block)),
    "module": ("module", str),
    "relative": ("relative, % of the weights' norm", _share),
    "changed": ("changed elements, %", _share),
    "delta_norm": ("norm of the delta", _number),
    "largest": ("largest element", _number),
    "rms": ("rms", _number),
    "cosine": ("cosine", lambda value: f"{value:.6f}"),
    "absorbed": ("lost to rounding when added, % of elements", _share),
    "rounded": ("explained by the file's rounding, %", _share),
    "tensors": ("tensors", _count),
    "elements": ("elements", _count),
    "shape": ("shape", lambda shape: " x ".join(map(str, shape))),
    "variant_storage": ("variant's form", str),
    "base_storage": ("base's form", str),
    "spectral_norm": ("largest singular value", _number),
    "stable_rank": ("stable rank", _number),
    "effective_rank": ("effective rank", _number),
    "noise_edge": ("noise edge", _number),
    "above_edge": ("values above the edge", _number),
}
_BARS = ("relative", "spectral_norm")
_TEXT = ("tensor", "part", "module", "variant_storage", "base_storage")
_IN_NAMES = ("part", "block", "module")  # a tensor's name says them
_MOST = 2000  # rows as HTML; the rest is said


class MeasuredTable(pd.DataFrame):  # type: ignore[misc]
    """A DataFrame that shows itself readably; everything in it stays where it is."""

    @property
    def _constructor(self) -> type[MeasuredTable]:
        return MeasuredTable

    def __repr__(self) -> str:
        if not self._measured:
            return str(super().__repr__())
        text = _written(self).to_string(max_rows=60, index=False)
        return f"{text}\n{_rest(self)}"

    def _repr_html_(self) -> str | None:
        return readable_html(self) if self._measured else super()._repr_html_()

    @property
    def _measured(self) -> bool:
        """Whether it is whole still: a person who picked columns gets those, as pandas shows them."""
        return "delta_norm" in self.columns and any(name not in SHOWN for name in self.columns) and len(self) > 0


def readable_html(table: pd.DataFrame, with_rest: bool = True) -> str:
    """A table as HTML that scrolls by itself, with its head in sight, in the colours of the page around it.

    The columns that are not shown are named under it, unless nobody can reach them from where it stands.
    """
    shown = _written(table.head(_MOST))
    heads = "".join(_head(name) for name in shown)
    most = {name: table[name].max() for name in _BARS if name in table}
    rows = []
    for number in range(len(shown)):
        cells = [
            _cell(name, shown[name].iloc[number], table[name].iloc[number], most.get(name, math.nan)) for name in shown
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    cut = f"the first {_MOST:,} of {len(table):,} rows; " if len(table) > _MOST else ""
    return (
        f"<div style='max-height:28em; overflow:auto'><table style='border-collapse:collapse; "
        f"font-variant-numeric:tabular-nums'><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        "</div>"
        f"<small>{cut}{html.escape(_rest(table)) if with_rest else ''}</small>"
    )


def small_html(table: pd.DataFrame, digits: int = 4) -> str:
    """A table of results as HTML in the same style: all of its columns, numbers to so many digits, "-" for none."""

    def shown(value: Any) -> str:
        if isinstance(value, float):
            return "-" if math.isnan(value) else f"{value:.{digits}g}"
        return "-" if value is None else str(value)

    words = [not pd.api.types.is_numeric_dtype(table[name]) for name in table]
    heads = [_td("th", str(name).replace("_", " "), left) for name, left in zip(table, words, strict=True)]
    rows = [
        "".join(_td("td", shown(value), left) for value, left in zip(row, words, strict=True))
        for row in table.astype(object).itertuples(index=False)
    ]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        "<div style='overflow:auto'><table style='border-collapse:collapse; font-variant-numeric:tabular-nums'>"
        f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _td(tag: str, text: str, left: bool) -> str:
    side = "left" if left else "right"
    return f"<{tag} style='text-align:{side}; padding:0.1em 0.7em'>{html.escape(text, quote=False)}</{tag}>"


def _head(name: str) -> str:
    side = "left" if name in _TEXT else "right"
    place = "position:sticky; top:0; background:var(--jp-layout-color0, Canvas); padding:0.2em 0.7em; max-width:8em"
    return f"<th scope='col' style='{place}; text-align:{side}; white-space:normal'>{html.escape(SHOWN[name][0])}</th>"


def _cell(name: str, text: str, value: Any, most: float) -> str:
    bar = ""
    if name in _BARS and most > 0 and value == value:
        share = 100 * value / most
        bar = f"; background:linear-gradient(to right, #0072b255 {share:.1f}%, transparent {share:.1f}%)"
    side = "left" if name in _TEXT else "right"
    return f"<td style='text-align:{side}; white-space:nowrap; padding:0.1em 0.7em{bar}'>{html.escape(text)}</td>"


def _written(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that are shown, as text."""
    names = _names(table)
    return pd.DataFrame({name: [_text(value, SHOWN[name][1]) for value in table[name]] for name in names})


def _text(value: Any, write: _Format) -> str:
    return "-" if isinstance(value, float) and math.isnan(value) else str(write(value))


def _names(table: pd.DataFrame) -> list[str]:
    said = _IN_NAMES if "tensor" in table.columns else ()
    return [name for name in SHOWN if name in table.columns and name not in said]


def _hidden(table: pd.DataFrame) -> list[str]:
    shown = _names(table)
    return [str(name) for name in table.columns if name not in shown]


def _rest(table: pd.DataFrame) -> str:
    of = f"{table.attrs['of']}; " if table.attrs.get("of") else ""
    return f"{of}also in the table: {', '.join(_hidden(table))}"

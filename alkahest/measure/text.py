"""Verdicts and their reasons as text."""

from __future__ import annotations

import html
from collections.abc import Sequence

from alkahest.errors import printable


def lines_under(title: str, lines: Sequence[str]) -> str:
    """A title and lines under it, as text."""
    return printable("\n".join([title, *(f"  {line}" for line in lines)]))


def lines_under_html(title: str, lines: Sequence[str]) -> str:
    """The same in a notebook; ``title`` is HTML already."""
    return f"<div>{title}<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul></div>"


def percent(share: float, digits: int) -> str:
    """A share as people read it: ``8.35 %``."""
    return f"{100 * share:.{digits}f} %"


def two_digits(number: float) -> str:
    """A number as a few pictures know it: ``180`` for 179.1, ``4.4`` for 4.375."""
    return f"{float(f'{number:.2g}'):g}"

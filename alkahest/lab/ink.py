"""Figures without a slab of white behind them, in an ink that reads on light pages and on dark ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from matplotlib import colors
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import Collection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text

# A file cannot know the page that it stands on, and a stored notebook is read in both themes: 4.5 to 1 against white,
# 4.2 to 1 against JupyterLab's dark #111111.
INK = "#767676"
_GREY = colors.to_rgb(INK)[0]


@contextlib.contextmanager
def use_ink(figure: Figure) -> Iterator[None]:
    """Within it, what is black or grey in a figure is `INK`, more or less of it, and what is white is not there.

    >>> with use_ink(figure): figure.savefig("plot.png")

    Colours, pictures and the numbers written on them stay; afterwards the figure is as it was.
    """
    before: list[Callable[[], Any]] = []
    written_on = {one for axes in figure.axes if axes.images for one in _on_pictures(axes)}
    try:
        for artist in figure.findobj():
            if artist not in written_on:
                _ink(artist, before)
            if isinstance(artist, Text) and (box := artist.get_bbox_patch()) is not None:
                _ink(box, before)
        yield
    finally:
        for restore in before:
            restore()


def _on_pictures(axes: Axes) -> Iterator[Artist]:
    """Numbers in cells; words beside an axis stand on the page."""
    return (text for text in axes.texts if text.get_transform() == axes.transData)


def _colours_of(artist: Artist) -> tuple[str, ...]:
    match artist:
        case Text():
            return ("color",)
        case Line2D():
            return ("color", "markeredgecolor", "markerfacecolor")
        case Patch():
            return ("facecolor", "edgecolor")
        case Collection() if artist.get_array() is None:
            return ("facecolor", "edgecolor")
    return ()


def _ink(artist: Any, before: list[Callable[[], Any]]) -> None:
    """Ink what is grey of an artist. An artist's own opacity goes before that of its colours: it is put into them."""
    opacity = artist.get_alpha()
    given = {name: getattr(artist, f"get_{name}")() for name in _colours_of(artist)}
    given = {name: one for name, one in given.items() if not (isinstance(one, str) and one in ("none", "auto"))}
    found = {name: np.atleast_2d(colors.to_rgba_array(one)) for name, one in given.items()}
    greys = {name: (np.ptp(one[:, :3], axis=1) < 0.02) & (one[:, 3] > 0) for name, one in found.items()}
    if not any(grey.any() for grey in greys.values()):
        return
    if isinstance(opacity, (int, float)):
        for one in found.values():
            one[one[:, 3] > 0, 3] = opacity
    for name, grey in greys.items():
        rgba, shade = found[name], found[name][grey, 0]
        rgba[grey, 3] *= np.clip((1 - shade) / (1 - _GREY), 0, 1)  # on white it looks as it did, unless it was darker
        rgba[grey, :3] = _GREY
    before += [partial(getattr(artist, f"set_{name}"), one) for name, one in given.items()]
    before.append(partial(artist.set_alpha, opacity))
    artist.set_alpha(None)
    for name, rgba in found.items():
        getattr(artist, f"set_{name}")(rgba if isinstance(artist, Collection) else tuple(rgba[0]))

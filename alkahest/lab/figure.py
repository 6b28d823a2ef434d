"""What every figure is made of: colours, axes, alt text, and pictures as PNG."""

from __future__ import annotations

import base64
import contextlib
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alkahest.lab.ink import use_ink
from alkahest.pictures.sheet import png_bytes, side_by_side

if TYPE_CHECKING:
    import pandas
    from PIL.Image import Image

COLOURS = [mpl.color_sequences["okabe_ito"][number] for number in (5, 6, 3, 1, 7, 2, 0)]
MARKERS = "osD^vPX"
_LEAST = 192  # pixels, of the smallest picture in a strip


@dataclass(frozen=True, repr=False)
class Plot:
    """Axes that were drawn into, and what they show in words. Shows itself in a notebook."""

    axes: Axes
    alt: str

    def __repr__(self) -> str:
        return self.alt

    def png(self, dpi: int = 100, white: bool = False) -> bytes:
        """The whole figure as a PNG file, for a page of any theme; ``white`` is for a file that is looked at alone."""
        return png(self.axes.figure, dpi, white)  # type: ignore[arg-type]

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"image/png": self.png(), "text/plain": self.alt}, {"image/png": {"alt": self.alt}}


def png(figure: Figure, dpi: int = 100, white: bool = False) -> bytes:
    """A figure as a PNG file: in black on white, or transparent, in an ink that reads in both themes."""
    figure.set_facecolor("white")
    buffer = io.BytesIO()
    with contextlib.nullcontext() if white else use_ink(figure):
        figure.savefig(buffer, format="png", dpi=dpi, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def image_tag(picture: bytes, alt: str) -> str:
    """A PNG file as HTML that needs no other file."""
    encoded = base64.b64encode(picture).decode()
    return f'<img role="img" style="max-width:100%" alt="{html.escape(alt)}" src="data:image/png;base64,{encoded}">'


def axes_for(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The Axes that were given, or new ones of a size in inches."""
    if ax is not None:
        return ax
    # No pyplot: its state is not for worker threads, and a plot shows itself.
    return Figure(figsize=size, layout="constrained", facecolor="white").subplots()


def legend_beside(ax: Axes, fontsize: float | None = 8, title: str | None = None) -> None:
    """A legend to the right of a plot, where it hides nothing; small unless told otherwise."""
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=fontsize, title=title)


def strip(images: Sequence[Image]) -> bytes:
    """Pictures side by side as a PNG file, small ones enlarged."""
    from PIL import Image

    scale = max(1, -(-_LEAST // images[0].width))
    enlarged = [image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) for image in images]
    return png_bytes(side_by_side(enlarged))


def number_text(value: float) -> str:
    return f"{value:.3g}"


def title_of_plot(table: pandas.DataFrame, what: str) -> str:
    of = str(table.attrs.get("of", ""))
    if len(of) > 90:
        of = f"{of[:60]} ... {of[-25:]}"
    return f"{what}{': ' if len(what + of) < 75 else chr(10)}{of}" if of else what

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib import colors
from matplotlib.figure import Figure
from PIL import Image

import alkahest as ak
from alkahest.lab import plots
from alkahest.lab.figure import COLOURS, png
from alkahest.lab.ink import INK, use_ink


def luminance(colour: str | tuple[float, ...]) -> float:
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colors.to_rgb(colour)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one: str | tuple[float, ...], other: str) -> float:
    light, dark = sorted([luminance(one), luminance(other)], reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_ink_reads_on_both_pages_and_so_do_the_colours() -> None:
    assert contrast(INK, "white") >= 4.5
    assert contrast(INK, "#111111") >= 4.0
    for colour in COLOURS[:-1]:  # the last is black, which becomes ink
        assert contrast(colour, "#111111") >= 3.0  # of large marks
        assert contrast(colour, "white") >= 2.0


def figure() -> Figure:
    made = Figure(figsize=(3, 2), facecolor="white")
    ax = made.subplots()
    ax.plot([0, 1], [0, 1], color="black", lw=8)
    ax.plot([0, 1], [1, 0], color=COLOURS[0], lw=8)
    ax.axvspan(0.4, 0.6, color="0.9")
    ax.set_title("title")
    ax.legend(["a", "b"])
    return made


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGBA"))


def test_a_figure_has_no_page_of_its_own() -> None:
    made = figure()
    seen = pixels(png(made))
    assert (seen[0, 0] == [round(255 * colors.to_rgb(INK)[0])] * 3 + [0]).all() or seen[0, 0, 3] == 0
    solid = seen[seen[..., 3] == 255]
    assert not (solid[:, :3] == 0).all(1).any()  # nothing black
    assert not (solid[:, :3] == 255).all(1).any()  # nothing white
    assert (solid[:, :3] == np.round(255 * np.array(colors.to_rgb(COLOURS[0])))).all(1).any()


def test_on_white_it_looks_as_it_did_but_for_what_was_darker() -> None:
    made = figure()
    before = pixels(png(made, white=True))[..., :3].astype(int)
    seen = pixels(png(made)).astype(float)
    share = seen[..., 3:] / 255
    there = share * seen[..., :3] + (1 - share) * 255
    for shade in (255, 230):  # the page, and the span
        same = (before == shade).all(-1)
        assert same.sum() > 1000
        assert np.quantile(np.abs(there - shade)[same], 0.9) <= 2  # but for the edges, whose pixels are mixed
    assert (pixels(png(made, white=True))[..., :3] == before).all()  # and it is as it was


def test_a_figure_is_as_it_was_afterwards_even_after_an_error() -> None:
    made = figure()

    def state() -> list[object]:
        ax = made.axes[0]
        legend = ax.get_legend().get_frame()
        return [
            made.get_facecolor(),
            ax.title.get_color(),
            legend.get_facecolor(),
            legend.get_alpha(),
            *(line.get_color() for line in ax.lines),
        ]

    before = state()
    with pytest.raises(ValueError, match="midway"), use_ink(made):
        assert state() != before
        raise ValueError("midway")
    assert state() == before


def test_numbers_on_cells_keep_their_colour_and_labels_do_not() -> None:
    delta = ak.mini.load("base-variant") - ak.mini.load("base")
    pairs = ak.comparison_matrix(ak.compare({"a": delta, "b": ak.mini.load("base-weak") - ak.mini.load("base")}))
    matrix, heat = plots.comparison_matrix(pairs).axes, plots.magnitude_heatmap(ak.delta_table(delta)).axes
    numbers = [text.get_color() for text in matrix.texts]
    with use_ink(matrix.figure):
        assert [text.get_color() for text in matrix.texts] == numbers
    with use_ink(heat.figure):
        inks = {tuple(np.round(colors.to_rgba(text.get_color()), 3)) for text in heat.texts}
    assert inks == {tuple(np.round(colors.to_rgba(INK), 3))}

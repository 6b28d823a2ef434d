from __future__ import annotations

import io
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

import alkahest as ak
from alkahest.errors import AlkahestError, UnknownNameError
from alkahest.lab import plots


@pytest.fixture(scope="module")
def table(trio: dict[str, Path]) -> pd.DataFrame:
    delta = ak.open(trio["variant"]) - ak.open(trio["base"])
    return ak.delta_table(delta.without("refiner"))


def drawn(ax: mpl.axes.Axes) -> np.ndarray:
    """Every marked point, as rows of x, y."""
    return np.concatenate(
        [np.column_stack(line.get_data()) for line in ax.lines if line.get_marker() not in ("None", "")]
    )


@pytest.mark.parametrize("statistic", list(plots.STATISTICS))
def test_every_tensor_is_a_marker_and_zeros_have_a_strip(table: pd.DataFrame, statistic: str) -> None:
    plot = plots.delta_magnitudes(table, statistic)
    points = drawn(plot.axes)
    assert len(points) == len(table)
    values = (1 - table.cosine if statistic == "angle" else table[statistic]).to_numpy()
    untouched = (table.delta_norm == 0) & (statistic != "angle")  # the ends differ there, the delta leaves it out
    assert sorted(points[:, 1])[int(untouched.sum()) :] == pytest.approx(sorted(values[~untouched]), rel=1e-3)
    hollow = [line for line in plot.axes.lines if line.get_markerfacecolor() == "none" and len(line.get_xdata())]
    strip = {y for line in hollow for y in line.get_ydata()}
    assert len(strip) == untouched.any()
    assert all(plot.axes.get_ylim()[0] < y < values[~untouched].min() for y in strip)
    assert plot.axes.get_yscale() == "log"
    assert "(log scale)" in plot.axes.get_ylabel()
    assert f"{untouched.sum()} tensors are untouched" in plot.alt
    assert "variant - base" in plot.axes.get_title()


def test_places_follow_the_data_flow(table: pd.DataFrame) -> None:
    axes = plots.delta_magnitudes(table).axes
    labels = [text.get_text() for text in axes.texts]
    order = [labels.index(name) for name in ("emb.", "noise\nref.", "context\nref.", "layers (0-1)", "fin.")]
    assert order == sorted(order)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["", "0", "1", "0", "1", "0", "1", ""]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["attention", "feed forward", "adaLN", "norm", "other"]
    colours = {line.get_color() for line in axes.lines} & set(plots.COLOURS)
    markers = {line.get_marker() for line in axes.lines}
    assert len(colours) == 5
    assert len(markers) == 5  # never by hue alone


def test_the_heatmap_holds_the_table(table: pd.DataFrame) -> None:
    plot = plots.magnitude_heatmap(table, title="of mine")
    image = plot.axes.images[0].get_array()
    modules = [label.get_text() for label in plot.axes.get_yticklabels()]
    inside = table[table.block >= 0]
    assert image.shape == (inside.module.nunique(), inside.groupby(["part", "block"]).ngroups)
    columns = list(dict.fromkeys(zip(inside.part, inside.block, strict=True)))
    columns.sort(key=lambda key: (["noise_refiner", "context_refiner", "layers"].index(key[0]), key[1]))
    for row in inside.itertuples():
        cell = image[modules.index(row.module), columns.index((row.part, row.block))]
        assert (cell is np.ma.masked) if row.relative == 0 else cell == pytest.approx(row.relative)
    crosses = next(line for line in plot.axes.lines if line.get_marker() == "x")
    assert len(crosses.get_xdata()) == (inside.relative == 0).sum()
    assert isinstance(plot.axes.images[0].norm, mpl.colors.LogNorm)
    assert plot.axes.get_title() == "of mine"
    assert "most in layers." in plot.alt


def test_lineages_are_lines_of_medians(table: pd.DataFrame, trio: dict[str, Path]) -> None:
    other = ak.delta_table(ak.open(trio["bridge"]) - ak.open(trio["base"]))
    plot = plots.lineage_comparison({"near": table, "far": other})
    lines = {line.get_label(): line for line in plot.axes.lines}
    assert {"near", "far"} <= set(lines)
    layers = [
        line for line in plot.axes.lines if line.get_color() == lines["far"].get_color() and len(line.get_xdata()) == 2
    ]
    medians = other[other.part == "layers"].groupby("block").relative.median().tolist()
    assert any(line.get_ydata() == pytest.approx(medians) for line in layers)
    assert "near: layers 0.0" in plot.alt


def test_spectra_are_shown_over_their_edge(trio: dict[str, Path]) -> None:
    spectra = ak.delta_spectra(ak.open(trio["variant"]) - ak.open(trio["base"]))
    plot = plots.spectrum(spectra, most=2)
    largest = spectra.nlargest(2, "delta_norm").iloc[0]
    line = plot.axes.lines[0]
    assert line.get_label() == largest.tensor
    assert line.get_ydata() == pytest.approx(largest.singular_values / largest.noise_edge)
    assert plot.axes.get_xscale() == plot.axes.get_yscale() == "log"


def test_curves_mark_comfyui_s_cap_and_both_readings_of_the_limit(trio: dict[str, Path]) -> None:
    v, b, w = (ak.open(trio[name]) for name in ("variant", "base", "bridge"))
    curve = ak.rounding_curve(ak.delta_table(v - b, on=w))
    for plot in (plots.survival(curve), plots.noise(curve)):
        lines = {line.get_label(): line for line in plot.axes.lines}
        marked = ["1x", "10x, ComfyUI's cap", '20x, "practically 20x" in all', "200x, the same on the adding side"]
        assert [lines[name].get_xdata()[0] for name in marked] == [1, 10, 20, 200]
        assert plot.axes.get_xscale() == "log"
        assert "at 10x" in plot.alt
    lines = {line.get_label(): line for line in plots.survival(curve).axes.lines}
    assert lines["energy that survives"].get_ydata() == pytest.approx(1 - curve.absorbed_energy)
    assert plots.noise(curve).axes.get_yscale() == "log"
    short = plots.survival(ak.rounding_curve(ak.delta_table(v - b), [0.01, 0.05]))
    assert "1x" not in [line.get_label() for line in short.axes.lines]


def test_multipliers_by_part(trio: dict[str, Path]) -> None:
    v, b, w = (ak.open(trio[name]) for name in ("variant", "base", "bridge"))
    k = ak.needed_multiplier((v - b).without("final"), on=w.protect("refiner"))
    plot = plots.multiplier_by_part(k)
    parts = k.per_part.dropna()
    assert plot.axes.lines[0].get_xdata() == pytest.approx(parts.k)
    assert [label.get_text() for label in plot.axes.get_yticklabels()] == ["embedders", "layers", "final\nuntouched"]
    assert "final untouched" in plot.alt
    assert any(line.get_label() == f"all together: {k.value:.4g}" for line in plot.axes.lines)
    other = plots.multiplier_by_part(ak.needed_multiplier(v - b, on=w, basis="survival"))
    assert "at the multiplier" in other.axes.get_xlabel()


def test_the_matrix_is_centred_where_signs_matter(trio: dict[str, Path]) -> None:
    v, b, w = (ak.open(trio[name]) for name in ("variant", "base", "bridge"))
    pairs = ak.compare({"one": v - b, "two": w - b, "three": b - v}, rank=3)
    plot = plots.comparison_matrix(ak.comparison_matrix(pairs))
    assert plot.axes.images[0].get_clim() == (-1, 1)
    assert "-1.00" in [text.get_text() for text in plot.axes.texts]
    assert "one and three -1.00" in plot.alt
    overlap = plots.comparison_matrix(ak.comparison_matrix(pairs, "interference"), "interference")
    assert overlap.axes.images[0].get_clim()[0] == 0


def test_a_lora_report_shows_what_is_kept(trio: dict[str, Path]) -> None:
    delta = ak.open(trio["variant"]) - ak.open(trio["base"])
    found = ak.extract_lora(delta, energy=0.7, rank_max=30, exclude="refiner")
    plot = plots.lora_report(found.report)
    kept = found.report[found.report.kept == "LoRA"]
    for ax, column, unit in zip(
        plot.axes.figure.axes, ("rank", "energy", "noise", "nbytes"), (1, 1, 1, 1000), strict=True
    ):
        drawn = [y for line in ax.lines if line.get_marker() in "osD^vPX" for y in line.get_ydata()]
        assert sorted(drawn) == pytest.approx(sorted(kept[column] / unit))
    assert f"rank_max ({kept.capped.sum()} capped)" in [line.get_label() for line in plot.axes.lines]
    assert f"{len(kept)} tensors" in plot.alt
    unknown = plots.lora_report(ak.extract_lora(delta + delta.only("layers"), rank=2).report)
    assert unknown.axes.figure.axes[2].get_title(loc="right").startswith("noise is not known for 16 of ")
    whole = plots.lora_report(ak.extract_lora(delta + delta, rank=2).report)
    noise = whole.axes.figure.axes[2]
    assert "noise is not known here" in noise.texts[0].get_text()  # and no blank quarter
    assert not noise.get_xticks().size


def test_a_plot_shows_itself_on_white_and_draws_into_given_axes(table: pd.DataFrame) -> None:
    plot = plots.delta_magnitudes(table)
    data, metadata = plot._repr_mimebundle_()
    picture = Image.open(io.BytesIO(data["image/png"])).convert("RGB")
    assert picture.getpixel((2, 2)) == (255, 255, 255)
    assert data["text/plain"] == repr(plot) == metadata["image/png"]["alt"] == plot.alt
    mine = Figure().subplots()
    assert plots.delta_magnitudes(table, ax=mine).axes is mine


def test_the_title_says_miniatures_and_long_ones_break(trio: dict[str, Path]) -> None:
    small = ak.delta_table(ak.mini.load("base-variant") - ak.mini.load("base"))
    for one in (small, ak.rounding_curve(small), ak.rolled_up(small)):
        assert one.attrs["of"] == "base_variant - base (miniatures)"
    assert "(miniatures)" in plots.delta_magnitudes(small).axes.get_title()
    assert "(miniatures)" in plots.survival(ak.rounding_curve(small)).axes.get_title()
    long = small.copy()
    long.attrs["of"] = "a" * 300
    title = plots.delta_magnitudes(long).axes.get_title()
    assert max(map(len, title.splitlines())) < 95


def test_nothing_differs(trio: dict[str, Path]) -> None:
    b = ak.open(trio["base"])
    table = ak.delta_table(b - b)
    for plot in (
        plots.delta_magnitudes(table),
        plots.magnitude_heatmap(table),
        plots.lineage_comparison({"same": table}),
    ):
        assert plot.png()
    assert f"{len(table)} tensors are untouched" in plots.delta_magnitudes(table).alt
    assert "nothing differs" in plots.magnitude_heatmap(table).alt


def test_bad_input(table: pd.DataFrame) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'relative'"):
        plots.delta_magnitudes(table, "relativ")
    with pytest.raises(AlkahestError, match="the table has no rows"):
        plots.delta_magnitudes(table.iloc[:0])
    with pytest.raises(AlkahestError, match="no tensors that became a LoRA"):
        plots.lora_report(pd.DataFrame({"kept": ["full"]}))


def test_what_is_too_small_to_see_stretches_no_axis() -> None:
    weak, base = ak.mini.load("base-weak"), ak.mini.load("base")  # float32: rounding is a millionth of the delta
    plot = plots.noise(ak.rounding_curve(ak.delta_table(weak - base)))
    labels = [text.get_text() for text in plot.axes.get_legend().get_texts()]
    assert "the file's own rounding, times k" not in labels
    assert plot.axes.get_ylim()[0] > 1e-7
    seen = plots.noise(ak.rounding_curve(ak.delta_table(ak.mini.load("base-weak-bf16") - base)))
    assert "the file's own rounding, times k" in [text.get_text() for text in seen.axes.get_legend().get_texts()]


@pytest.mark.parametrize("name", ["base-weak", "base-variant"])
def test_numbers_of_a_logarithmic_axis_do_not_collide(name: str) -> None:
    axes = plots.multiplier_by_part(ak.needed_multiplier(ak.mini.load(name) - ak.mini.load("base"))).axes
    axes.figure.canvas.draw()
    shown = axes.get_window_extent()
    boxes = [
        label.get_window_extent()
        for label in (*axes.get_xticklabels(), *axes.get_xticklabels(minor=True))
        if label.get_text() and shown.x0 <= label.get_window_extent().x1 and label.get_window_extent().x0 <= shown.x1
    ]
    assert len(boxes) >= 2
    assert not any(one.overlaps(other) for n, one in enumerate(boxes) for other in boxes[:n])
    assert not any("untouched" in text.get_text() for text in axes.texts)  # no line of the limits crosses words

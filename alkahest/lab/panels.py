"""The workbench's panels, all of them: what measures a delta is here, the others are imported from their modules."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import ipywidgets as widgets
import pandas as pd
from matplotlib.figure import Figure

from alkahest.algebra.deltas import Delta
from alkahest.algebra.weights import Weights, ends
from alkahest.errors import AlgebraError, AlkahestError, refuse_unknown_options
from alkahest.lab import plots
from alkahest.lab.a_and_b import blind_comparison as blind_comparison
from alkahest.lab.checkpoint_picker import checkpoint_picker as checkpoint_picker
from alkahest.lab.delta_map import delta_map as delta_map
from alkahest.lab.explore import Explorer, explore
from alkahest.lab.figure import COLOURS
from alkahest.lab.jobs import Job
from alkahest.lab.live_merge import live_merge as live_merge
from alkahest.lab.models_picker import models_picker as models_picker
from alkahest.lab.sampling_grid import sampling_grid as sampling_grid
from alkahest.lab.training_monitor import training_monitor as training_monitor
from alkahest.lora.rank import RULES, lora_ranks
from alkahest.measure.bases import BASES, multiplier_of
from alkahest.measure.multiplier import Multiplier, factors, limits_passed, short
from alkahest.measure.placed import not_protected
from alkahest.measure.rounding import rounding_curve
from alkahest.measure.spectrum import stream_delta_spectra
from alkahest.measure.table import stream_delta_table
from alkahest.pictures.evidence import PictureOptions
from alkahest.pictures.needed import stream_needed_multiplier

__all__ = [
    "blind_comparison",
    "checkpoint_picker",
    "delta_browser",
    "delta_map",
    "live_merge",
    "models_picker",
    "multiplier_panel",
    "rank_panel",
    "sampling_grid",
    "training_monitor",
]
_TARGETS = {"pictures": 0.0, **{name: target for name, (target, _) in BASES.items()}}  # pictures aim at none
_VIEWS = ("tensors", "heatmap", "modules")


def delta_browser(what: Delta | pd.DataFrame, on: Weights | None = None) -> Any:
    """Look at a delta by statistic, part and view.

    Parameters
    ----------
    what : Delta or pandas.DataFrame
        A table of `delta_table`; a delta is measured first, behind a bar with Cancel.
    on : Weights, optional
        What the delta is to be added to, by default its base.

    Returns
    -------
    ipywidgets.Widget

    Examples
    --------
    >>> panels.delta_browser(ak.delta_table(variant - base))
    """

    def browse(table: pd.DataFrame) -> Explorer:
        def draw(figure: Figure, *, statistic: str = "relative", part: str = "all", view: str = "tensors") -> str:
            chosen = table if part == "all" else table[table.part == part]
            if view == "modules":
                return plots.lineage_comparison(_by_module(chosen), statistic, ax=figure.subplots()).alt
            plot = plots.delta_magnitudes if view == "tensors" else plots.magnitude_heatmap
            return plot(chosen, statistic, ax=figure.subplots()).alt

        parts = ["all", *dict.fromkeys(table.part)]
        return explore(draw, size=(10, 5), statistic=list(plots.STATISTICS), part=parts, view=list(_VIEWS))

    return _after_measuring("delta_browser", what, lambda: stream_delta_table(_delta(what), on), browse)


@refuse_unknown_options
def multiplier_panel(
    what: Delta | pd.DataFrame,
    on: Weights | None = None,
    *,
    prompts: Sequence[str] | None = None,
    pictures: Any = None,
    components: Any = None,
    count: int = 24,
    steps: int = 12,
    cfg: float = 2.0,
    seed: int = 0,
    storage: str | None = None,
    device: str = "cpu",
) -> Any:
    """Choose a basis and a k, and see what is left of the delta and what it costs.

    A new basis or target computes k anew; the number box then takes any other, and the heading and ComfyUI's pair of
    factors are those of the k that is drawn.

    Parameters
    ----------
    what : Delta or pandas.DataFrame
        A table of `delta_table`; a delta is measured first, behind a bar with Cancel.
    on : Weights, optional
        What the delta is to be added to, by default its base.
    prompts, pictures, components, count, steps, cfg, seed, storage, device : optional
        As in `needed_multiplier`; with ``prompts`` or ``pictures`` the first basis is what pictures say, and its curve
        is drawn.

    Returns
    -------
    ipywidgets.Widget
        ``.multiplier`` is the computed one.

    Examples
    --------
    >>> panels.multiplier_panel(variant - base, on=bridge)
    >>> panels.multiplier_panel(variant - base, on=bridge, prompts=["a cyan ball on a beach", ...])
    """
    seen = {"prompts": prompts, "pictures": pictures, "components": components, "storage": storage}
    if prompts is None and pictures is None:
        options = PictureOptions(components=components, count=count, steps=steps, cfg=cfg, seed=seed, storage=storage)
        if named := options.set_apart_from():
            raise AlgebraError(
                "multiplier_panel",
                f"{', '.join(named)}: this is for a multiplier by pictures",
                fix="add prompts=[...] or pictures=..., or leave it out",
            )
    elif isinstance(what, pd.DataFrame):
        raise AlgebraError("multiplier_panel", "a table draws no pictures", found="a table", fix="variant - base")
    else:
        seen |= {"count": count, "steps": steps, "cfg": cfg, "seed": seed}
        measure = partial(stream_needed_multiplier, what, on, device=device, **seen)
        return _after_measuring(
            "multiplier_panel", what, measure, lambda k: MultiplierPanel(k.table, _added(what, on), k)
        )

    def choose(table: pd.DataFrame) -> MultiplierPanel:
        # A table does not say what is protected: there every matrix counts.
        return MultiplierPanel(table, _added(what, on))

    return _after_measuring(
        "multiplier_panel", what, lambda: stream_delta_table(_delta(what), on, device=device), choose
    )


def _added(what: Delta | pd.DataFrame, on: Weights | None) -> frozenset[str] | None:
    """The tensors that are not protected from a delta."""
    return not_protected(what, ends(what)[1] if on is None else on) if isinstance(what, Delta) else None


def rank_panel(what: Delta | pd.DataFrame, values: int = 200) -> Any:
    """Try rank rules for a LoRA before extracting it: ranks, energy and size follow at once.

    Parameters
    ----------
    what : Delta or pandas.DataFrame
        A table of `delta_spectra`; a delta is measured first, behind a bar with Cancel.
    values : int, default 200
        Leading singular values of a delta that are measured.

    Returns
    -------
    ipywidgets.Widget
        A ``rank_max`` of 0 in its box is no cap.

    Examples
    --------
    >>> panels.rank_panel(ak.delta_spectra(variant - base, values=200))
    """

    def choose(spectra: pd.DataFrame) -> Explorer:
        def draw(figure: Figure, *, rule: str = "energy", value: float = 0.995, rank_max: int = 64) -> str:
            asked = int(value) if rule == "rank" and value == int(value) else value
            report = lora_ranks(spectra, **{rule: asked}, rank_max=rank_max or None)  # type: ignore[arg-type]
            return plots.lora_report(report, figure).alt

        return explore(draw, size=(12, 7), rule=list(RULES))

    return _after_measuring("rank_panel", what, lambda: stream_delta_spectra(_delta(what), values=values), choose)


class MultiplierPanel(widgets.VBox):  # type: ignore[misc]
    """A multiplier in words beside the curves that speak for and against it; see `multiplier_panel`."""

    def __init__(
        self, table: pd.DataFrame, added: frozenset[str] | None, by_pictures: Multiplier | None = None
    ) -> None:
        self._table = table
        self._added = added
        self._by_pictures = by_pictures
        self._curve = rounding_curve(table)
        self._known: dict[tuple[str, float], Multiplier] = {}
        self.words = widgets.HTML()
        bases = self._bases()
        start = _TARGETS[bases[0]]

        def draw(
            figure: Figure,
            *,
            basis: str = bases[0],
            target: float = start,
            k: float = float(self._multiplier(bases[0], start)),
        ) -> str:
            return self._draw(figure, self._multiplier(basis, target), k)

        self.explorer = explore(draw, size=(10, 8), basis=bases, k=(0.1, 1000, "log"))
        controls = self.explorer.controls
        controls["basis"].observe(lambda change: setattr(controls["target"], "value", _TARGETS[change["new"]]), "value")
        for name in ("basis", "target"):
            controls[name].observe(lambda _: self._compute(), "value")
        super().__init__([self.words, self.explorer])

    @property
    def multiplier(self) -> Multiplier:
        """The computed multiplier, at the basis and target that the controls are set to."""
        values = self.explorer.values
        return self._multiplier(values["basis"], values["target"])

    def _compute(self) -> None:
        # A target out of range is said by the picture, which computes it too.
        with contextlib.suppress(AlkahestError):
            self.explorer.controls["k"].value = float(self.multiplier)

    def _draw(self, figure: Figure, found: Multiplier, k: float) -> str:
        self.words.value = _heading(k, found) + found._repr_html_()
        if found.curve is not None:
            upper, lower = figure.subplots(2, 1, height_ratios=(3, 2))
            drawn = plots.loss_curve(found, upper, k=k)
            alt = f"{drawn.alt} {plots.survival(self._curve, lower).alt}"
        else:
            alt = plots.multiplier_overview(self._curve, found, k, figure).alt
        at = rounding_curve(self._table, [k]).iloc[0]
        return (
            f"k = {k:.4g}: the delta is {at['size']:.3g} of the weights' norm, {1 - at.absorbed_energy:.3g} of its "
            f"energy survives rounding. {alt}"
        )

    def _multiplier(self, basis: str, target: float) -> Multiplier:
        if basis == "pictures" and self._by_pictures is not None:
            return self._by_pictures
        key = (basis, target)
        if key not in self._known:
            asked = None if target == BASES[basis][0] else target  # the default that the control shows is not asked for
            self._known[key] = multiplier_of(self._table, basis, asked, added=self._added)
        return self._known[key]

    def _bases(self) -> list[str]:
        """The bases that this table can speak about."""
        known = multiplier_of(self._table, added=self._added).bases
        first = [] if self._by_pictures is None else ["pictures"]
        return [*first, *(name for name in BASES if known[name] == known[name])]

    def _repr_mimebundle_(self, **given: Any) -> Any:
        still = self.explorer._repr_mimebundle_()
        bundle = super()._repr_mimebundle_(**given)
        return {**(bundle or {}), "image/png": still["image/png"], "text/plain": still["text/plain"]}


def _heading(k: float, found: Multiplier) -> str:
    """The k that is drawn, as ComfyUI's two nodes take it, where it is not the computed one."""
    if k == float(found):
        return ""
    subtract, add = factors(k)
    past = "".join(f"<li>{html.escape(line)}</li>" for line in limits_passed(k))
    return (
        f"<b>k = {k:.4g} = subtract {short(subtract)} x add {short(add)}, as drawn; computed is {float(found):.4g}</b>"
        f"<ul>{past}</ul>"
    )


def _by_module(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The modules that differ most, a table each."""
    largest = table[table.block >= 0].groupby("module").relative.median().nlargest(len(COLOURS))
    return {module: table[table.module == module] for module in largest.index}


def _after_measuring(
    operation: str,
    what: Delta | pd.DataFrame,
    measure: Callable[[], Iterator[Any]],
    build: Callable[[pd.DataFrame], Any],
) -> Any:
    """What ``build`` makes of a table, measured first if it is a delta still."""
    if isinstance(what, pd.DataFrame):
        return build(what)
    if not isinstance(what, Delta):
        raise AlgebraError(operation, "a delta or its table is needed", found=type(what).__name__, fix="variant - base")
    box = widgets.VBox()
    job = Job(measure, on_result=lambda table: setattr(box, "children", [build(table)]), unit="B", title="Measure")
    box.children = [job]
    return box


def _delta(what: Delta | pd.DataFrame) -> Delta:
    assert isinstance(what, Delta)  # `_after_measuring` has seen to it
    return what


def __dir__() -> list[str]:
    return __all__

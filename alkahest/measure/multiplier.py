"""A multiplier as a number that says what it stands on, and how ComfyUI's two nodes and the article count it."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from alkahest.measure.text import lines_under, lines_under_html

if TYPE_CHECKING:
    import pandas

COMFY_CAP = 10.0  # the multiplier of ModelMergeSubtract stops there, and goes in hundredths (nodes_model_merging.py)
_SHOWN = 5e-5  # a multiplier is shown to four digits
# The article: "While it's designed to go up to 100x, practically speaking, 20x seems to be the limit." It does not say
# whether that is the whole multiplier or the ModelMergeAdd side alone, where the subtracting node gives 10 already.
LIMITS = {"practically 20x": 20.0, "designed to go up to 100x": 100.0}


class Factors(NamedTuple):
    """What to type into ComfyUI: the multiplier of the subtracting node, and of the adding node."""

    subtract: float
    add: float


class Multiplier(float):
    """A recommended multiplier: a number in expressions, which says what it stands on.

    Attributes
    ----------
    value : float
        What to take.
    basis, target, formula
        Why.
    warnings : list of str
        What speaks against it.
    factors
        What to type into ComfyUI's two nodes: ``subtract`` and ``add``.
    range
        What it may be, for all that rounding of the files hides, or that other pictures might say.
    bases
        Every basis' own number.
    per_part : pandas.DataFrame
        A ``k`` for each part, for ``delta.scaled``, with ``why`` where it is not the basis'. Also how many ``matrices``
        it has and how many are ``changed``, ``delta_norm`` and ``on_norm``, their ratio at k for all
        (``relative_at_k``) and at most (``largest_at_k``), and the ``top_block`` with its share of the sum of squares
        (``top_block_energy``).
    table : pandas.DataFrame
        The delta table that it was computed from.
    spectra : pandas.DataFrame
        The spectra of its strongest matrices.
    curve : pandas.DataFrame
        The losses over k of a multiplier by pictures.

    Examples
    --------
    >>> k = ak.needed_multiplier(variant - base, on=bridge)
    >>> merged = bridge.protect("refiner") + k * (variant - base)
    """

    basis: str
    target: float
    formula: str
    range: tuple[float, float]
    bases: dict[str, float]
    per_part: pandas.DataFrame
    warnings: tuple[str, ...]
    table: pandas.DataFrame
    spectra: pandas.DataFrame | None = None
    curve: Any = None

    def __new__(cls, value: float, **details: Any) -> Multiplier:
        made = super().__new__(cls, value)
        made.__dict__.update(details)
        return made

    @property
    def value(self) -> float:
        return float(self)

    @property
    def factors(self) -> Factors:
        return factors(self)

    def __repr__(self) -> str:
        return lines_under(self._title(), [*self._lines(), *self._others()])

    def _repr_html_(self) -> str:
        import pandas as pd

        others = [{"other basis": name, "k": k} for name, k in self.bases.items() if name != self.basis]
        tables = [_html(pd.DataFrame(others)), _html(self.per_part)]
        return lines_under_html(f"<b>{html.escape(self._title())}</b>", self._lines()) + "".join(tables)

    def _title(self) -> str:
        subtract, add = self.factors
        return f"Multiplier {self:.4g} = subtract {short(subtract)} x add {short(add)}"

    def _lines(self) -> list[str]:
        return [f"basis {self.basis}: {self.formula}", *self.warnings]

    def _others(self) -> list[str]:
        """What the other bases say by themselves, as a table."""
        others = [(name, k) for name, k in self.bases.items() if name != self.basis]
        width = max((len(name) for name, _ in others), default=0)
        shown = [f"  {name:{width}}  {'-' if math.isnan(k) else format(k, '.4g')}" for name, k in others]
        return ["other bases, by themselves:", *shown] if shown else []


def factors(k: float) -> Factors:
    """Split a multiplier between two nodes of ComfyUI such that what is typed into each stays as it was typed.

    ModelMergeSubtract goes from -10 to 10 in hundredths, to which the editor rounds what is typed. So it gets the
    multiplier where that is one of those, 10 where it is more, and else 1; the adding node gets the rest.

    >>> factors(171.1)
    Factors(subtract=10.0, add=17.11)
    >>> factors(0.0753)
    Factors(subtract=1.0, add=0.0753)
    """
    k = float(k)
    if abs(k) > COMFY_CAP:
        subtract = math.copysign(COMFY_CAP, k)
        return Factors(subtract, k / subtract)
    return Factors(k, 1.0) if math.isclose(k, round(k, 2), rel_tol=_SHOWN) else Factors(1.0, k)


def limits_passed(k: float) -> Iterator[str]:
    """What a multiplier is past: the cap of ComfyUI's node, and the article's limits in both of their readings.

    >>> list(limits_passed(4))
    []
    """
    subtract, add = factors(k)
    if abs(k) > COMFY_CAP:
        yield f"past 10.0, where ComfyUI's ModelMergeSubtract stops: subtract at {short(subtract)}, add at {short(add)}"
    for words, limit in LIMITS.items():
        if abs(add) > limit:
            yield f"past the article's '{words}' in both readings: in all, and on the adding side"
        elif abs(k) > limit:
            yield (
                f"past the article's '{words}' if it means the multiplier in all; not if it means the adding side, "
                f"{short(abs(add))} here"
            )


def short(number: float) -> str:
    """A factor as people type it, to four digits that count, as a multiplier is shown."""
    if not math.isfinite(number) or 0 < abs(number) < 1e-6:
        return f"{number:.4g}"
    places = max(0, 3 - math.floor(math.log10(abs(number)))) if number else 0
    return f"{number:.{places}f}".rstrip("0").rstrip(".") if places else f"{number:.0f}"


def _html(table: pandas.DataFrame) -> str:
    from alkahest.measure.measured_table import small_html

    return small_html(table)

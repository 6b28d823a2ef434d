"""What one pass over a tensor adds up: norms, extremes, counts, and histograms in units of the last place."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alkahest.engine.loops import RUN, Kernels, Numbers
from alkahest.measure.rounding import ULPS, Counts, Energies, is_rounding, ulp, ulp_counts
from alkahest.model.dtypes import Format

_RUN = 4096  # float32 sums this long stay within 1e-7; longer ones are added up in float64
_PIECE = 1 << 16  # elements that stay in a processor's cache while their bins are found


@dataclass
class Tally:
    """What one pass adds up for one tensor."""

    squares: dict[str, float] = field(default_factory=dict)
    largest: float = 0.0
    changed: int = 0
    stepped: int = 0  # elements that changed, of those looked at, and the squares of the ends' ulps there
    steps: dict[str, float] = field(default_factory=dict)
    hidden: float = 0.0
    is_rounded: bool = True  # whether v is b rounded to v's format, as far as both have been looked at
    ulps: Counts = field(default_factory=lambda: np.zeros(len(ULPS), np.int64))
    energy: Energies = field(default_factory=lambda: np.zeros(len(ULPS)))

    def add(self, values: dict[str, Tensor], units: dict[str, tuple[Format, float]], stride: int) -> None:
        squares: dict[int, float] = {}
        for name, numbers in values.items():
            if numbers.data_ptr() not in squares:  # base and on are often the same, and so are delta and gap
                squares[numbers.data_ptr()] = sum_of_squares(numbers)
            self.squares[name] = self.squares.get(name, 0.0) + squares[numbers.data_ptr()]
        if {"variant", "base"} <= values.keys() & units.keys():
            self._compare_rounded(values["variant"], values["base"], units)
        delta = values.get("delta")
        if delta is None or self.nonfinite:
            return
        low, high = map(float, torch.aminmax(delta))
        self.largest = max(self.largest, -low, high)
        if low < high or high != 0:
            self.changed += count_changed(delta)
        distinct = {numbers.data_ptr(): numbers for numbers in values.values()}
        for start in range(0, delta.numel(), stride * _PIECE):
            sampled = {
                place: _runs(numbers[start : start + stride * _PIECE], stride) for place, numbers in distinct.items()
            }
            self._sample({name: sampled[numbers.data_ptr()] for name, numbers in values.items()}, units, stride)

    def add_pair(
        self,
        v: Numbers,
        b: Numbers,
        w: Numbers,
        units: dict[str, tuple[Format, float]],
        stride: int,
        factor: float,
        loops: Kernels,
    ) -> bool:
        """`add`, for ``factor * (v - b)`` on ``w`` in compiled loops; False, and nothing added, if float32 is too
        narrow.
        """
        of_v, of_b, gap, changed, largest = loops.pair(v, b)
        squares = {"variant": of_v, "base": of_b, "on": of_b, "gap": gap, "delta": factor**2 * gap}
        if w is not b:
            squares["on"], _, squares["distance"], *_ = loops.pair(w, b)
        small = 1e-30 * v.size
        if not all(
            math.isfinite(square) and (square > small or (name in ("gap", "delta") and not changed))
            for name, square in squares.items()
        ):
            return False
        for name, square in squares.items():
            self.squares[name] = self.squares.get(name, 0.0) + square
        self.largest = max(self.largest, abs(factor) * largest)
        self.changed += int(changed)
        steps, counts, energy = np.zeros(4), np.zeros_like(self.ulps), np.zeros_like(self.energy)
        forms = _arrays(*(units[name] for name in ("variant", "base", "on")))
        loops.sampled(v, b, w, stride, factor, *forms, counts, energy, steps)
        self.ulps += stride * counts
        self.energy += stride * energy
        self.stepped += int(steps[0])
        for name, square in (("variant", steps[1]), ("base", steps[2])):
            self.steps[name] = self.steps.get(name, 0.0) + square
        self.hidden += stride * steps[3] / 12
        if v.dtype == np.float32:  # else both are bf16 as stored
            self._compare_rounded(torch.from_numpy(v), torch.from_numpy(b), units)
        return True

    def _compare_rounded(self, variant: Tensor, base: Tensor, units: dict[str, tuple[Format, float]]) -> None:
        """Note where v is not b rounded to v's format."""
        if self.is_rounded and units["variant"] != units["base"]:
            self.is_rounded = is_rounding(variant, base, units["variant"])

    def _sample(self, values: dict[str, Tensor], units: dict[str, tuple[Format, float]], stride: int) -> None:
        delta = values["delta"]
        changed = delta != 0
        if "on" in units and changed.any():
            counts, energy = ulp_counts(delta, values["on"], *units["on"])
            self.ulps += stride * counts
            self.energy += stride * energy
        self.stepped += int(changed.sum())
        for name in ("variant", "base"):
            if name in units:
                steps = ulp(values[name], *units[name])
                squares = sum_of_squares(steps * changed)
                self.steps[name] = self.steps.get(name, 0.0) + squares
                if name == "variant":
                    self.hidden += stride * (sum_of_squares(steps) - squares) / 12

    @property
    def nonfinite(self) -> str | None:
        """The name of the first term that is not finite."""
        return next((name for name, square in self.squares.items() if not math.isfinite(square)), None)

    def columns(self, elements: int, factor: float) -> dict[str, Any]:
        norms = {name: math.sqrt(square) for name, square in self.squares.items()}
        delta, on = norms.get("delta", 0.0), norms.get("on", math.nan)
        return {
            "variant_norm": norms.get("variant", math.nan),
            "base_norm": norms.get("base", math.nan),
            "on_norm": on,
            "distance": norms.get("distance", math.nan),
            "gap": norms.get("gap", math.nan),
            "delta_norm": delta,
            "rms": delta / math.sqrt(max(1, elements)),
            "relative": delta / on if on > 0 else math.nan,
            "largest": self.largest,
            "cosine": self._cosine(norms),
            "changed": self.changed / max(1, elements),
            **{
                column: abs(factor) * math.sqrt(self.steps[name] / self.stepped)
                if self.stepped and name in self.steps
                else math.nan
                for column, name in (("step", "variant"), ("base_step", "base"))
            },
            "hidden": abs(factor) * math.sqrt(self.hidden) if self.stepped else 0.0,
            "ulps": self.ulps,
            "ulp_energy": self.energy,
        }

    def _cosine(self, norms: dict[str, float]) -> float:
        product = norms.get("variant", 0.0) * norms.get("base", 0.0)
        if product == 0:
            return math.nan
        # v.b from three sums of squares: better conditioned than the sum of products where v and b are close.
        dot = (self.squares["variant"] + self.squares["base"] - self.squares["gap"]) / 2
        return max(-1.0, min(1.0, dot / product))


@functools.lru_cache(maxsize=64)
def _arrays(*units: tuple[Format, float]) -> tuple[npt.NDArray[Any], ...]:
    """Mantissas, lowest exponents (plus 127) and scales of several stored formats."""
    forms = [form for form, _ in units]
    scales = np.array([scale for _, scale in units], np.float32)
    return np.array([f.mantissa for f in forms]), np.array([f.min_exponent + 127 for f in forms]), scales


def _runs(values: Tensor, stride: int) -> Tensor:
    """One run of elements in ``stride``, from the first on."""
    whole = values.numel() // (stride * RUN) * (stride * RUN)
    return torch.cat([values[:whole].view(-1, stride * RUN)[:, :RUN].flatten(), values[whole : whole + RUN]])


def count_changed(delta: Tensor) -> int:
    """How many elements are not zero. NumPy's comparison is ten times as fast as torch.count_nonzero on a CPU."""
    return int(torch.count_nonzero(delta) if delta.is_cuda else np.count_nonzero(delta.cpu().numpy() != 0))


def sum_of_squares(values: Tensor) -> float:
    """In float32 over short runs and float64 over those: exact to 1e-7, at the speed of memory."""
    whole = values.numel() // _RUN * _RUN
    norms = torch.linalg.vector_norm(values[:whole].view(-1, _RUN), dim=1)
    found = float(norms.double().square().sum())
    found += float(values[whole:].double().square().sum())
    # Squares leave float32 above 1e19 and below 1e-19: rare enough to be done again in float64.
    return found if math.isfinite(found) and found > 1e-30 * values.numel() else float(values.double().square().sum())

"""What merging and measuring cost most, as compiled loops: one pass instead of a dozen.

``a + k * (b - c)`` of bf16 tensors, which most merges come down to for most of their tensors, is one of them: bit for
bit what `evaluate` and rounding give, in 0.2 ns an element instead of 1.0.

Needs numba (the extra ``fast``); without it the same numbers come from torch, operation by operation.
Where reading takes its time from the same processors, that is what makes the difference.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from alkahest.engine.readable import Bits, Workspace
from alkahest.engine.terms import Minus, Plus, Source, Term, Times

Numbers = npt.NDArray[np.float32] | npt.NDArray[np.uint16]  # float32, or bf16 as the bits it is stored in
_RUN = 512  # float32 sums this long stay within 1e-7; longer ones are added up in float64
RUN = 16  # elements that histograms take or leave together: what a processor fetches at once
_POWERS = 2.0 ** np.arange(-127, 129)  # by exponent, plus 127


class Kernels(NamedTuple):
    """``pair(v, b)`` gives the sums of squares of v, b and v - b, how many of v - b are not 0, and the largest of them.

    ``sampled`` tallies one run of elements in ``stride`` into arrays: see `_sample`. ``combined(a, b, c, k, out)``
    writes ``a + k * (b - c)``, all as the bits of bf16, and gives its largest magnitude before rounding.
    """

    pair: Callable[..., tuple[float, float, float, float, float]]
    sampled: Callable[..., None]
    combined: Callable[..., float]


@functools.cache
def kernels() -> Kernels | None:
    """The loops, compiled on their first use and kept beside the package or in the user's cache; None without numba."""
    if importlib.util.find_spec("numba") is None:
        return None
    import numba
    from numba.extending import overload, register_jitable

    @overload(_number, inline="always")
    def typed(x: Any) -> Callable[[Any], Any]:
        return _from_bf16 if isinstance(x, numba.types.Integer) else _as_it_is

    register_jitable(_exponent)
    register_jitable(_from_bf16)

    def compiled(function: Callable[..., Any], **settings: Any) -> Any:
        try:
            return numba.njit(function, nogil=True, cache=True, error_model="numpy", **settings)
        except RuntimeError:  # nowhere to keep it
            return numba.njit(function, nogil=True, error_model="numpy", **settings)

    # Sums may be taken in any order, which lets them run eight or sixteen abreast.
    return Kernels(compiled(_pair, fastmath={"reassoc", "nsz", "contract"}), compiled(_sample), compiled(_combine))


def _number(x: Any) -> Any:
    """A stored number as float32."""
    raise NotImplementedError


def _from_bf16(x: Any) -> Any:
    return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)


def _as_it_is(x: Any) -> Any:
    return x


def _exponent(x: Any, lowest: int) -> Any:
    """Of a float32, plus 127, as `alkahest.measure.rounding` counts ulps."""
    return max((np.float32(x).view(np.int32) >> 23) & 255, lowest)


def _pair(v: Numbers, b: Numbers) -> tuple[float, float, float, float, float]:
    of_v: Any = 0.0
    of_b = of_d = changed = of_v
    largest: Any = np.int32(0)
    for start in range(0, v.size, _RUN):
        run_v, run_b = v[start : start + _RUN], b[start : start + _RUN]
        sum_v = sum_b = sum_d = count = np.float32(0)
        for i in range(run_v.size):
            x, y = _number(run_v[i]), _number(run_b[i])
            d = np.float32(x - y)
            sum_v += x * x
            sum_b += y * y
            sum_d += d * d
            count += np.float32(d != np.float32(0))
            # Without its sign, a float32's bits order as it does, and NaN comes last.
            bits = np.int32(d.view(np.int32) & np.int32(0x7FFFFFFF))
            largest = max(largest, bits)
        of_v, of_b, of_d, changed = of_v + sum_v, of_b + sum_b, of_d + sum_d, changed + count
    return of_v, of_b, of_d, changed, float(np.int32(largest).view(np.float32))


def _sample(
    v: Numbers,
    b: Numbers,
    w: Numbers,
    stride: int,
    factor: float,
    mantissas: npt.NDArray[np.int64],
    lowest: npt.NDArray[np.int64],
    scales: npt.NDArray[np.float32],
    counts: npt.NDArray[np.int64],
    energy: npt.NDArray[np.float64],
    steps: npt.NDArray[np.float64],
) -> None:
    """Of every ``stride``-th run of `RUN` elements: which bin of `ULPS` ``factor * (v - b)`` falls into, and its
    square.

    ``mantissas``, ``lowest`` (smallest exponent, plus 127) and ``scales`` are of v, b and w. ``steps``: how many
    changed; ulp(v) squared and ulp(b) squared over those; ulp(v) squared over the others.
    """
    unit_v, unit_b = scales[0] * 2.0 ** -mantissas[0], scales[1] * 2.0 ** -mantissas[1]
    for start in range(0, v.size, stride * RUN):
        for i in range(start, min(start + RUN, v.size)):
            x, y, z = _number(v[i]), _number(b[i]), _number(w[i])
            d = np.float32(np.float32(factor) * np.float32(x - y))
            ulp_v = unit_v * _POWERS[_exponent(x / scales[0], lowest[0])]
            if d != 0:
                ulp_b = unit_b * _POWERS[_exponent(y / scales[1], lowest[1])]
                unit = _exponent(z / scales[2], lowest[2]) - mantissas[2]
                quarters = (np.float32(d / scales[2]).view(np.int32) & 0x7FFFFFFF) >> 21
                place = min(max(quarters - (unit << 2) + counts.size // 2, 0), counts.size - 1)
                counts[place] += 1
                energy[place] += np.float64(d) * d
                steps[0] += 1
                steps[1] += ulp_v * ulp_v
                steps[2] += ulp_b * ulp_b
            else:
                steps[3] += ulp_v * ulp_v


def _combine(a: Any, b: Any, c: Any, k: float, out: Any) -> float:
    """Each operation rounded to float32 by itself, as torch does, and the sum once more to bf16, to even on ties."""
    factor = np.float32(k)
    largest: Any = np.uint32(0)
    for i in range(out.size):
        x = np.float32(np.float32(_from_bf16(b[i]) - _from_bf16(c[i])) * factor)
        bits = np.uint32(np.float32(_from_bf16(a[i]) + x).view(np.uint32))
        largest = max(largest, bits & np.uint32(0x7FFFFFFF))
        out[i] = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return float(np.uint32(largest).view(np.float32))


def is_bf16(term: Any) -> bool:
    """Whether a term is a tensor as some file stores it, in bf16 without a scale."""
    held = term.leaf.stored(term.key) if isinstance(term, Source) else None
    return held is not None and held.is_bf16


def bits_of(term: Term, start: int, stop: int, workspace: Workspace) -> AbstractContextManager[Bits]:
    """The bits of a term that `is_bf16`."""
    assert isinstance(term, Source)
    return term.leaf.bits(term.key, start, stop, workspace)


def combination(term: Term) -> tuple[Term, float, Term, Term] | None:
    """(a, k, b, c) of ``a + k * (b - c)`` where all three are stored in bf16; otherwise None."""
    match term:
        case Plus(a, Times(k, Minus(b, c))):
            found = (a, k, b, c)
        case Plus(a, Minus(b, c)):
            found = (a, 1.0, b, c)
        case _:
            return None
    return found if is_bf16(a) and is_bf16(b) and is_bf16(c) else None


def combine(term: Term, start: int, stop: int, workspace: Workspace, loops: Kernels, out: torch.Tensor) -> float | None:
    """Write the term's elements to ``out`` (bf16, on the CPU); the largest magnitude before rounding, NaN if one is
    NaN.

    None, and nothing written, if the term is no `combination`.
    """
    parts = combination(term)
    if parts is None:
        return None
    a, k, b, c = parts
    with ExitStack() as stack:
        of_a, of_b = (stack.enter_context(bits_of(part, start, stop, workspace)) for part in (a, b))
        of_c = of_a if c == a else stack.enter_context(bits_of(c, start, stop, workspace))
        return loops.combined(of_a, of_b, of_c, k, out.view(torch.uint16).numpy())

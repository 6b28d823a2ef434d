"""Lists of one factor a block: the presets that people share for merging by block, and what is done to a list."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from alkahest.errors import AlgebraError

_Shape = Callable[[float], float]  # a factor over the depth from 0 to 1
_SHARED = 25  # blocks of the models that these presets were made for: 12 in, 1 middle, 12 out
_WITH_BASE = {26: 25, 20: 19}  # lists whose first number is for the text encoder, and how many blocks follow it
_DIGITS = 4
_GIVEN = "numbers separated by commas, such as 1, 1, 0.5, 0"


def _smoothstep(x: float) -> float:
    return x * x * (3 - 2 * x)


def _bounced(x: float) -> float:
    """0 to 1 and back, again and again."""
    return 1 - abs(1 - x % 2)


def _bounced_step(times: int) -> _Shape:
    return lambda x: _bounced(times * _smoothstep(x))


def _repeated_step(times: int) -> _Shape:
    return lambda x: _smoothstep(_bounced(times * x))


def _reversed(shape: _Shape) -> _Shape:
    return lambda x: 1 - shape(x)


def _steps(*runs: tuple[int, int], height: float = 1.0) -> _Shape:
    """``height`` at the blocks from ``first`` to ``last`` of 25, 0 elsewhere."""
    return lambda x: height if any(first <= round(x * (_SHARED - 1)) <= last for first, last in runs) else 0.0


# By the names and shapes of sd-webui-supermerger's presets (their share of model B is a factor here), over the depth
# from 0 to 1.
_SHAPES: dict[str, _Shape] = {
    "ALL_B": lambda x: 1.0,
    "ALL_A": lambda x: 0.0,
    "GRAD_V": lambda x: abs(2 * x - 1),
    "GRAD_A": lambda x: 1 - abs(2 * x - 1),
    "FLAT_25": lambda x: 0.25,
    "FLAT_75": lambda x: 0.75,
    "WRAP08": _steps((0, 3), (21, 24)),
    "WRAP12": _steps((0, 5), (19, 24)),
    "WRAP14": _steps((0, 6), (18, 24)),
    "WRAP16": _steps((0, 7), (17, 24)),
    "MID12_50": _steps((5, 18), height=0.5),
    "OUT07": _steps((18, 24)),
    "OUT12": _steps((13, 24)),
    "OUT12_5": lambda x: 0.5 if round(x * 24) == 12 else _steps((13, 24))(x),
    "RING08_SOFT": lambda x: 0.5 if round(x * 24) in (5, 9, 15, 19) else _steps((6, 8), (16, 18))(x),
    "RING08_5": _steps((6, 9), (15, 18)),
    "RING10_5": _steps((5, 9), (15, 19)),
    "RING10_3": _steps((6, 10), (14, 18)),
    "SMOOTHSTEP": _smoothstep,
    "REVERSE-SMOOTHSTEP": lambda x: 1 - _smoothstep(x),
    **{f"SMOOTHSTEP*{n}": _bounced_step(n) for n in (2, 3, 4)},
    **{f"R_SMOOTHSTEP*{n}": _reversed(_bounced_step(n)) for n in (2, 3, 4)},
    **{f"SMOOTHSTEP/{n}": _repeated_step(n) for n in (2, 3, 4)},
    **{f"R_SMOOTHSTEP/{n}": _reversed(_repeated_step(n)) for n in (2, 3, 4)},
    "COSINE": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "REVERSE_COSINE": lambda x: (1 - math.cos(math.pi * x)) / 2,
}
PRESETS = tuple(_SHAPES)


def preset(name: str, count: int) -> list[float]:
    """A shared preset for ``count`` blocks; its 25 numbers are spread over the depth.

    >>> preset("GRAD_V", 5)
    [1.0, 0.5, 0.0, 0.5, 1.0]
    """
    return spread([_SHAPES[name](place / (_SHARED - 1)) for place in range(_SHARED)], count)


def read_block_list(text: str, count: int) -> tuple[list[float], str]:
    """The numbers of a list for ``count`` blocks, and what was done to it in words, "" if nothing.

    >>> read_block_list("1, 0.5, 0", 3)
    ([1.0, 0.5, 0.0], '')

    A list of another length is spread over the depth; one of 26 or 20 begins with a number for the text encoder, which
    is left out. A name before a tab, as files of presets have it, is passed over. AlgebraError for what is no list.
    """
    name, _, body = text.strip().rpartition("\t")
    values = [_number(piece) for piece in body.strip().strip("[]()").rstrip(",").replace(";", ",").split(",")]
    notes = [f"{name.strip()!r} taken as the list's name"] if name.strip() else []
    if len(values) == count:
        return values, "".join(notes)
    if len(values) in _WITH_BASE:
        notes.append(f"the first of {len(values)} numbers, {values[0]:g}, is a text encoder's in such lists: left out")
        values = values[1:]
    if len(values) < 2:
        raise AlgebraError("block list", "a list has a number for each block", expected=f"{count} numbers", found=text)
    if len(values) != count:
        notes.append(f"{len(values)} numbers spread over {count} blocks, straight lines between them")
    return spread(values, count), "; ".join(notes)


def spread(values: Sequence[float], count: int) -> list[float]:
    """A list stretched to ``count`` blocks, its ends kept."""
    if len(values) == count:
        return [round(float(value), _DIGITS) for value in values]
    found = np.interp(np.linspace(0, len(values) - 1, count), range(len(values)), values)
    return [round(float(value), _DIGITS) for value in found]


def smooth(values: Sequence[float]) -> list[float]:
    """Each number drawn halfway to its neighbours' mean; the ends have one neighbour."""
    padded = [values[0], *values, values[-1]]
    return [round((padded[n] + 2 * padded[n + 1] + padded[n + 2]) / 4, _DIGITS) for n in range(len(values))]


def mirror(values: Sequence[float]) -> list[float]:
    """The list from the other end."""
    return list(reversed(values))


def factors_by_block(values: Sequence[float], stack: str, touched: Iterable[int]) -> dict[str, float]:
    """What `Delta.scaled` takes: runs of blocks with one factor, those at 1 and those that a delta lacks left out.

    >>> factors_by_block([0.5, 0.5, 1, 2], "layers", range(4))
    {'layers.0-1': 0.5, 'layers.3': 2}
    """
    there, found, start = set(touched), {}, 0
    for stop in range(1, len(values) + 1):
        if stop < len(values) and values[stop] == values[start]:
            continue
        if values[start] != 1 and there & set(range(start, stop)):
            run = f"{start}" if stop - start == 1 else f"{start}-{stop - 1}"
            found[f"{stack}.{run}"] = values[start]
        start = stop
    return found


def list_text(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _number(piece: str) -> float:
    try:
        value = float(piece)
    except ValueError:
        raise AlgebraError(
            "block list", "this is no number", expected=_GIVEN, found=repr(piece.strip()), fix=_GIVEN
        ) from None
    if not math.isfinite(value):
        raise AlgebraError("block list", "a factor is a finite number", found=piece.strip())
    return value

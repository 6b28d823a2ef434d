"""Random numbers as a function of seed, name and index.

The same element of the same tensor gets the same number whatever the block size, thread count or
machine: numpy guarantees the raw stream of Philox, a counter-based generator.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

# Philox makes four 64-bit words per counter step; we use each as two 32-bit numbers.
_PER_STEP = 8


def bits(seed: int, purpose: str, key: str, start: int, count: int) -> NDArray[np.uint32]:
    """Uniform 32-bit integers for elements ``start`` to ``start + count`` of tensor ``key``.

    >>> whole = bits(0, "rounding", "layers.0", 0, 100)
    >>> bool((whole[10:30] == bits(0, "rounding", "layers.0", 10, 20)).all())
    True
    """
    generator = _philox(seed, purpose, key)
    first, lead = divmod(start, _PER_STEP)
    generator.advance(first)
    words = -(-(lead + count) // _PER_STEP) * (_PER_STEP // 2)
    raw: NDArray[np.uint64] = generator.random_raw(words).astype("<u8", copy=False)
    return raw.view("<u4")[lead : lead + count]


def uniform(seed: int, purpose: str, key: str, start: int, count: int) -> NDArray[np.float64]:
    """The same numbers as floats in (0, 1), never 0 or 1 themselves."""
    numbers = bits(seed, purpose, key, start, count).astype(np.float64)
    return (numbers + 0.5) * 2.0**-32


def generator(seed: int, purpose: str, key: str, index: int) -> np.random.Generator:
    """A numpy generator of its own for chunk ``index`` of tensor ``key``."""
    return np.random.Generator(_philox(seed, f"{purpose} {index}", key))


def _philox(seed: int, purpose: str, key: str) -> np.random.Philox:
    digest = hashlib.blake2b(f"alkahest {seed} {purpose} {key}".encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little"))

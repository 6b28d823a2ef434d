"""Waiting for what another thread does."""

from __future__ import annotations

import time
from typing import Any


def until(condition: Any, seconds: float = 10) -> bool:
    """Whether a condition came true within so many seconds."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())

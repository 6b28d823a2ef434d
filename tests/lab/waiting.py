"""Waiting for what another thread does."""

from __future__ import annotations

import time
from typing import Any


def until(condition: Any) -> bool:
    """Whether a condition came true within ten seconds."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())

"""What a run says as it goes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alkahest.engine.events import Event


@dataclass(frozen=True, kw_only=True)
class TrainingStep(Event):
    """Steps done and in all, where the run is, the loss, what was just measured, and at the end the `Result`."""

    loss: float = math.nan
    row: Mapping[str, Any] | None = None
    note: str = ""  # what to tell a person: pictures that are left out

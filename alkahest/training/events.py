"""What a run says as it goes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alkahest.training.loop import Result


@dataclass(frozen=True)
class StepEvent:
    """Progress of a run: steps done and in all, where it is, the loss, and at the end the `Result`."""

    done: int
    total: int
    key: str
    loss: float = math.nan
    row: Mapping[str, Any] | None = None  # what was just measured
    result: Result | None = field(default=None, repr=False)

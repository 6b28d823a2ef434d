"""How the miniature family is grown."""

from __future__ import annotations

from pathlib import Path

BRIDGES = Path(__file__).parent  # with the configurations that the family's bridges are grown from

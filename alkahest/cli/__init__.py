"""The command line: ``alkahest inspect | diff | multiplier | check | merge | convert | recipe | verify | ...``."""

from __future__ import annotations

from alkahest.cli import checkpoints, measure, mini  # each adds its commands
from alkahest.cli.shared import app

__all__ = ["app", "checkpoints", "main", "measure", "mini"]


def main() -> None:
    """Entry point of the ``alkahest`` command."""
    app()

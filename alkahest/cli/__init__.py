"""The command line: ``alkahest inspect | diff | multiplier | check | merge | convert | recipe | extract-lora | lora
| finetune | ...``.
"""

from __future__ import annotations

from alkahest.cli import checkpoints, experiment, lora, measure, mini, nodes, recipes, train  # each adds its commands
from alkahest.cli.shared import app

__all__ = ["app", "checkpoints", "experiment", "lora", "measure", "mini", "nodes", "recipes", "train"]

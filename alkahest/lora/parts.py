"""Finished tensors of an extraction, kept in the cache until it is saved, so that a run that was stopped goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alkahest.files.cache import cache_folder
from alkahest.lora.write import Pair


class Parts:
    """The parts of one extraction, by name; with no name there are none."""

    def __init__(self, name: str | None) -> None:
        self.folder: Path | None = None if name is None else cache_folder() / "extractions" / name

    def load(self, key: str) -> tuple[dict[str, Any], Pair] | None:
        """The row of the report and the factors of a tensor that was finished before; numbers stay on disk until
        used.
        """
        from safetensors import SafetensorError, safe_open

        if self.folder is None:
            return None
        try:
            with safe_open(self.folder / f"{key}.safetensors", "pt") as stored:
                row = json.loads(stored.metadata()["row"])
                pair = Pair(stored.get_tensor("up"), stored.get_tensor("down"), row.pop("scale"))
                return {**row, "shape": tuple(row["shape"])}, pair
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None

    def store(self, key: str, row: Mapping[str, Any], pair: Pair) -> None:
        """Keep a finished tensor. A cache that cannot be written costs time, nothing else."""
        from safetensors.torch import save_file

        if self.folder is None:
            return
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            scratch = self.folder / f".{uuid.uuid4().hex[:8]}"
            save_file({"up": pair.up, "down": pair.down}, scratch, {"row": json.dumps({"scale": pair.scale, **row})})
            os.replace(scratch, self.folder / f"{key}.safetensors")

    def remove(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

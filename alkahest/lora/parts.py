"""Finished tensors of an extraction, kept in the cache until it is saved, so that a run that was stopped goes on."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alkahest.files.cache import cache_folder, load_tensors, store_tensors
from alkahest.lora.write import Pair


class Parts:
    """The parts of one extraction, by name; with no name there are none."""

    def __init__(self, name: str | None) -> None:
        self.folder: Path | None = None if name is None else cache_folder() / "extractions" / name

    def load(self, key: str) -> tuple[dict[str, Any], Pair] | None:
        """The row of the report and the factors of a tensor that was finished before; numbers stay on disk until
        used.
        """
        found = None if self.folder is None else load_tensors(self.folder / f"{key}.safetensors")
        if found is None:
            return None
        tensors, row = found
        shape = tuple(row["shape"])
        pair = Pair(tensors["up"], tensors["down"], row.pop("scale"))
        fits = len(shape) == 2 and pair.up.shape == (shape[0], pair.rank) and pair.down.shape[1] == shape[1]
        return ({**row, "shape": shape}, pair) if fits else None

    def store(self, key: str, row: Mapping[str, Any], pair: Pair) -> None:
        """Keep a finished tensor. A cache that cannot be written costs time, nothing else."""
        if self.folder is not None:
            about = {"scale": pair.scale, **row, "shape": list(row["shape"])}
            with contextlib.suppress(OSError):
                store_tensors(self.folder / f"{key}.safetensors", {"up": pair.up, "down": pair.down}, about)

    def remove(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

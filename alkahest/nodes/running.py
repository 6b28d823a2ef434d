"""What the nodes that measure and save share: packages, progress with Cancel, files that are numbered, reports."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alkahest.errors import UnsupportedError

CATEGORY = "alkahest"
GRAPH = {"prompt": "PROMPT", "unique_id": "UNIQUE_ID"}  # hidden inputs: the graph that runs, and which node this is
NEEDED = ("pandas", "blake3")  # beside what ComfyUI itself needs


class SavingNode:
    """A node that writes a file into ComfyUI's output folder and reports on it."""

    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    CATEGORY = CATEGORY
    OUTPUT_NODE = True

    def __init__(self) -> None:
        import folder_paths

        self.output_dir = folder_paths.get_output_directory()

    def path(self, filename_prefix: str) -> Path:
        """The next free name under a prefix, as ComfyUI numbers its own."""
        import folder_paths

        folder, name, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, self.output_dir)
        return Path(folder) / f"{name}_{counter:05}_.safetensors"


def report_of(report: str, *before: Any) -> dict[str, Any]:
    """What a node gives back: its results, the report last, which the editor shows too."""
    return {"ui": {"text": [report]}, "result": (*before, report)}


def with_progress(events: Iterator[Any]) -> Any:
    """Run a generator of events behind ComfyUI's progress bar, where its Cancel is heard; the result."""
    from comfy.model_management import throw_exception_if_processing_interrupted
    from comfy.utils import ProgressBar

    bar, event = None, None
    for event in events:
        bar = bar or ProgressBar(event.total)
        bar.update_absolute(event.done, event.total)
        throw_exception_if_processing_interrupted()
    return event.result if event is not None else None


def require_packages(operation: str) -> None:
    """Raise UnsupportedError if ComfyUI's Python lacks what measuring and saving need."""
    try:
        for name in NEEDED:
            importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedError(
            operation,
            "ComfyUI's Python lacks a package",
            found=str(error),
            fix=f"with that Python: -m pip install {' '.join(NEEDED)}",
        ) from None

"""Where the model files that a workflow names lie: in the folders of a ComfyUI, or in any one folder."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from alkahest.errors import FileFormatError, RecipeError, nearest
from alkahest.files.paths import expanded

# Loader's kind of file -> ComfyUI's folders for it (folder_paths.py); "unet" is the older name.
FOLDERS = {"diffusion_models": ("diffusion_models", "unet"), "checkpoints": ("checkpoints",), "loras": ("loras",)}
_MOST = 5_000  # names looked at for a suggestion


@dataclass(frozen=True)
class ModelFile:
    """A file as a loader node names it."""

    folder: str
    name: str
    node: str

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"


def find_model(file: ModelFile, models: str | os.PathLike[str], workflow: object = None) -> Path:
    """The path of a model file in ``models``: ComfyUI's own folder, its ``models``, or a flat folder.

    Raises RecipeError for a name that leads out of the folder, FileFormatError with the nearest name if the file is
    not there.
    """
    root = expanded(models, "open")
    if not root.is_dir():
        raise FileFormatError(
            "workflow",
            "the folder of models does not exist",
            file=root,
            fix="name ComfyUI's models folder, or one that holds the files",
        )
    relative = _inside(file, workflow)
    bases = [base for base in (root / "models", root) if base.is_dir()]
    places = [base / folder for base in bases for folder in FOLDERS[file.folder]] + bases
    for place in places:
        with contextlib.suppress(OSError):  # a name too long for any file
            if (place / relative).is_file():
                return place / relative
    known = [name for place in [*places[:-1], root] if place.is_dir() for name in islice(_names(place), _MOST)]
    raise FileFormatError(
        "workflow",
        f"{file.node} loads a file that is not here",
        file=root,
        expected=str(file),
        fix=f"{nearest(file.name, known)}. Put it there, or give its path by name",
    )


def _inside(file: ModelFile, workflow: object) -> Path:
    # Names come from strangers, and from Windows: C:\x, \\server\x, /x and a/../../x are no names below a folder.
    parts = re.split(r"[\\/]", file.name)
    if not file.name.strip() or "\0" in file.name or ":" in parts[0] or any(part in ("", ".", "..") for part in parts):
        raise RecipeError(
            "workflow",
            f"{file.node} names a file outside the models folder",
            file=workflow,
            expected="a name below the folder, such as z-image/base.safetensors",
            found=repr(file.name)[:300],
            fix="put the file into the folder, and choose it there",
        )
    return Path(*parts)


def _names(place: Path) -> Iterator[str]:
    for folder, _, files in os.walk(place):
        yield from (
            os.path.relpath(os.path.join(folder, name), place).replace(os.sep, "/")
            for name in sorted(files)
            if name.endswith(".safetensors")
        )

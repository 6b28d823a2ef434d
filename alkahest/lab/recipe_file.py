"""An expression as a recipe file, which ``alkahest merge --recipe`` runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from alkahest.algebra.weights import Weights
from alkahest.engine.events import Event
from alkahest.engine.options import Options
from alkahest.engine.record import readers_of, recipe_of, stream_hashes
from alkahest.errors import OutputError
from alkahest.files.paths import expanded
from alkahest.files.whole import replaced, write_text


class RecipeFile(NamedTuple):
    """Where a recipe was written, and what was told of it."""

    path: Path
    notes: list[str]


def stream_recipe(expression: Weights, file: str) -> Iterator[Event]:
    """Hash the files behind an expression and write its recipe; the last event has a `RecipeFile`.

    Raises OutputError if the file is no .json.
    """
    path = expanded(file, "save")
    if path.suffix != ".json":
        raise OutputError("save recipe", "a recipe is a .json file", file=path, fix=str(path.with_suffix(".json")))
    before = replaced(path)
    readers = readers_of(expression)
    total = sum(reader.size for reader in readers)
    hashes = yield from stream_hashes(readers, total)
    write_text(path, recipe_of(expression, Options(), hashes).to_json() + "\n")
    yield Event(total, total, path.name, RecipeFile(path, before))

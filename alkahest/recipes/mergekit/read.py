"""A mergekit config as a recipe that runs."""

from __future__ import annotations

import keyword
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from alkahest.algebra.methods import REGISTRY, RESERVED
from alkahest.engine.record import Recipe
from alkahest.errors import RecipeError, UnknownNameError
from alkahest.model.dtypes import storage_name
from alkahest.recipes.mergekit.config import Config, read_config
from alkahest.recipes.mergekit.methods import text_of_config


@dataclass(frozen=True)
class MergekitRecipe(Recipe):
    """The recipe of a mergekit config: text, the path behind each name, and where mergekit's result differs."""

    files: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    source: Path | None = None

    def locate(self, given: Collection[str] = ()) -> dict[str, str]:
        """Where each of its models lies: as its path says from the working folder, or from the config's; not of those
        that are ``given`` otherwise. Raises RecipeError where both have one and the two are not the same.
        """
        return {name: self._located(name, path) for name, path in self.files.items() if name not in given}

    def _located(self, name: str, path: str) -> str:
        near = (self.source.parent if self.source else Path()) / path
        if not near.exists() or not os.path.exists(path):
            return str(near) if near.exists() else path
        if not os.path.samefile(near, path):
            raise RecipeError(
                "mergekit",
                "the working folder and the folder of the config both have this model",
                file=self.source,
                found=f"{os.path.abspath(path)} and {near}",
                fix=f"say which: --{name} PATH",
            )
        return path


def read_mergekit(text: str, source: Path) -> MergekitRecipe:
    """The recipe that does what mergekit's YAML says; RecipeError for what Alkahest cannot do as mergekit does."""
    config = read_config(text, source)
    names = _names(config)
    made = text_of_config(config, names)
    files = {name: path for path, name in names.items()}
    return MergekitRecipe(
        made, output=_output(config), files=files, notes=list(dict.fromkeys(config.notes)), source=source
    )


def is_mergekit(text: str) -> bool:
    """Whether text is such a config rather than an expression."""
    return re.search(r"^\s*merge_method\s*:", text, re.MULTILINE) is not None


def _output(config: Config) -> dict[str, str]:
    if config.dtype is None:
        return {}
    try:
        return {"dtype": storage_name(config.dtype)}
    except UnknownNameError as error:
        raise config.refusal("no file is written in this dtype", found=config.dtype, fix=error.fix) from None


def _names(config: Config) -> dict[str, str]:
    """A name for the model behind each path, after its file."""
    names: dict[str, str] = {}
    for model in config.models:
        stem = Path(model.path).name
        stem = stem.removesuffix(".safetensors") or "model"
        name = re.sub(r"\W+", "_", stem, flags=re.ASCII).strip("_") or "model"
        if not name.isidentifier() or keyword.iskeyword(name) or name in REGISTRY or name in (*RESERVED, "ak"):
            name = f"model_{name}"
        number, first = 2, name
        while name in names.values():
            name, number = f"{first}_{number}", number + 1
        names[model.path] = name
    return names

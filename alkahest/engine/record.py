"""What an output file says of itself: its recipe, the hashes of its inputs, its header."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any

from alkahest.engine.events import Event
from alkahest.engine.options import Options
from alkahest.engine.plan import Plan, make_plan
from alkahest.engine.readable import Readable
from alkahest.engine.scalars import Rules
from alkahest.engine.terms import Computable, name_leaves
from alkahest.errors import RecipeError
from alkahest.files.hashes import blake3_of
from alkahest.files.header import build_header
from alkahest.files.reader import Reader
from alkahest.version import __version__

METADATA_KEY = "alkahest"
MAX_TEXT = 100_000
_LISTEN = 0.25  # seconds between events


@dataclass(frozen=True)
class Recipe:
    """Recipe text, what its names stand for, and how the output was written.

    ``inputs`` maps a name to its files, each with ``file`` (its name), ``bytes`` and ``blake3``;
    ``output`` holds the options of `Weights.save` that change the bytes. Where no recipe can repeat what was done, as
    with training, ``text`` is empty and ``made`` says it to people.
    """

    text: str  # the expression
    inputs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # name -> its files
    output: dict[str, Any] = field(default_factory=dict)  # options of `save`
    version: str = ""  # of Alkahest, which wrote it
    made: str = ""  # what no expression says, for people

    def to_json(self) -> str:
        value: dict[str, Any] = {
            "version": self.version,
            "recipe": self.text,
            "inputs": self.inputs,
            "output": self.output,
        }
        if self.made:
            value["made"] = self.made
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, file: object = None) -> Recipe:
        """Parse what `to_json` wrote; RecipeError if it is anything else."""
        problem = RecipeError("recipe", "the recorded recipe is damaged", file=file, fix="write the recipe by hand")
        try:
            value = json.loads(text)
            json.dumps(value, ensure_ascii=False).encode()  # a ValueError for half a character, which no file can hold
            text, made = value["recipe"], value.get("made", "")
            if str(text).startswith("finetuned("):  # as an earlier version recorded what no recipe repeats
                text, made = "", text
            recipe = cls(text, value["inputs"], value["output"], str(value.get("version", "")), made)
            for name, files in recipe.inputs.items():
                if not isinstance(files, list) or not files:
                    raise problem
                for entry in files:
                    if not (
                        isinstance(name, str) and isinstance(entry["file"], str) and isinstance(entry["bytes"], int)
                    ):
                        raise problem
                    if len(bytes.fromhex(entry["blake3"])) != 32:
                        raise problem
            if not all(isinstance(one, str) for one in (text, made)) or not isinstance(recipe.output, dict):
                raise problem
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise problem from None
        return recipe


def plan_of(expression: Computable, options: Options) -> Plan:
    """The output's tensors under these options."""
    rules = Rules(comfy_compatible=options.comfy_compatible)
    plan = make_plan(expression, rules, options.dtype, options.layout, options.shard_bytes(), options.drop)
    return replace(plan, metadata={**(options.metadata or {}), **plan.metadata})


def readers_of(expression: Computable) -> list[Reader]:
    """Every file that an expression reads."""
    return [reader for leaf in expression.leaves() for reader in leaf.files]


def recipe_of(expression: Computable, options: Options, hashes: Mapping[Reader, str]) -> Recipe:
    """What the output's metadata says about itself; no text if it reads weights that no recipe can name."""
    names = name_leaves(expression)
    if not all(leaf.is_reproducible for leaf in names):
        inputs = inputs_of(names, hashes)
        return Recipe("", inputs, options.record(), __version__, expression.text(names)) if inputs else Recipe("")
    return Recipe(expression.text(names), inputs_of(names, hashes), options.record(), __version__)


def hashed_recipe(expression: Computable, options: Options) -> Recipe:
    """`recipe_of`, with its inputs hashed now."""
    readers = readers_of(expression)
    return recipe_of(expression, options, dict(zip(readers, blake3_of(readers), strict=True)))


def stream_hashes(readers: list[Reader], total: int) -> Generator[Event, None, dict[Reader, str]]:
    """The files' BLAKE3, with an event now and then, so that whoever waits can stop."""
    cancelled = threading.Event()
    with ThreadPoolExecutor(1, "alkahest-hash") as pool:
        hashing = pool.submit(blake3_of, readers, cancelled)
        try:
            while not hashing.done():
                wait([hashing], _LISTEN)
                yield Event(0, total, "reading the inputs")
            return dict(zip(readers, hashing.result(), strict=True))
        finally:
            cancelled.set()


def inputs_of(names: Mapping[Readable, str], hashes: Mapping[Reader, str]) -> dict[str, list[dict[str, Any]]]:
    """What a recipe records of the files that it was made from."""
    return {
        name: [{"file": leaf.file_names[r], "bytes": r.size, "blake3": hashes[r]} for r in leaf.files]
        for leaf, name in names.items()
        if leaf.files
    }


def headers_of(plan: Plan, recipe: Recipe) -> list[bytes]:
    """The header of every output file."""
    own = {METADATA_KEY: recipe.to_json()} if recipe.text or recipe.made else {}
    metadata = {"format": "pt", **plan.metadata, **own}
    return [build_header(((item.name, item.tag, item.shape) for item in items), metadata) for items in plan.files]

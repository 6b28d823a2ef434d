"""What an output file says of itself: its recipe, the hashes of its inputs, its header."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

from alkahest import __version__
from alkahest.algebra import Weights
from alkahest.expr import Names, name_leaves
from alkahest.files import Reader
from alkahest.hashes import blake3_of
from alkahest.header import build_header
from alkahest.leaf import Leaf
from alkahest.options import Options
from alkahest.output import Plan, make_plan
from alkahest.recipe import METADATA_KEY, Recipe
from alkahest.scalar import Rules
from alkahest.work import Event

_LISTEN = 0.25  # seconds between events


def plan_of(expression: Weights, options: Options) -> Plan:
    """The output's tensors under these options."""
    rules = Rules(comfy_compatible=options.comfy_compatible)
    plan = make_plan(expression, rules, options.dtype, options.layout, options.shard_bytes())
    return replace(plan, metadata={**(options.metadata or {}), **plan.metadata})


def readers_of(expression: Weights) -> list[Reader]:
    """Every file that an expression reads."""
    return [reader for leaf in expression.leaves() for reader in leaf.files]


def recipe_of(expression: Weights, options: Options, hashes: Mapping[Reader, str]) -> Recipe:
    """What the output's metadata says about itself; no text if it reads weights that no recipe can name."""
    names = name_leaves(expression)
    if not all(leaf.is_reproducible for leaf in names if isinstance(leaf, Leaf)):
        return Recipe("")
    return Recipe(expression.text(names), inputs_of(names, hashes), options.record(), __version__)


def hashed_recipe(expression: Weights, options: Options) -> Recipe:
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


def inputs_of(names: Names, hashes: Mapping[Reader, str]) -> dict[str, list[dict[str, Any]]]:
    """What a recipe records of the files that it was made from."""
    return {
        name: [{"file": leaf.file_names[r], "bytes": r.size, "blake3": hashes[r]} for r in leaf.files]
        for leaf, name in names.items()
        if leaf.files
    }


def headers_of(plan: Plan, recipe: Recipe) -> list[bytes]:
    """The header of every output file."""
    own = {METADATA_KEY: recipe.to_json()} if recipe.text else {}
    metadata = {"format": "pt", **plan.metadata, **own}
    return [build_header(((item.name, item.tag, item.shape) for item in items), metadata) for items in plan.files]

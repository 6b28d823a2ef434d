"""Inputs that an experiment makes on the spot: LoRAs, other dtypes, gradient signs, shuffled deltas, trained models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from alkahest.engine.readable import Workspace
from alkahest.engine.scalars import Rules
from alkahest.errors import FileFormatError
from alkahest.lora.extract import extract_lora
from alkahest.measure.spectrum import matrix_of
from alkahest.mini.scenes import held_out_prompts
from alkahest.model import seeded
from alkahest.pictures.gradients import gradient_signs
from alkahest.recipes.text import parse
from alkahest.sources.signs import Signs
from alkahest.training.config import read_config
from alkahest.training.loop import finetune

_SCENES = 300  # a seed of scenes apart from those that are judged


def make_input(name: str, what: Mapping[str, Any], inputs: Any, place: Path) -> None:
    """Make one input and write it to ``place``; FileFormatError for a table that says no kind.

    ``inputs`` gives the others by name, ``inputs.folder`` where the experiment lies, ``inputs.family`` the family.
    """
    options = dict(what)
    for kind, make in _KINDS.items():
        if kind in options:
            make(options.pop(kind), options, inputs, place)
            return
    raise FileFormatError(
        "experiment", f"an input is a file, or has of, {', '.join(_KINDS)}", found=f"{name} = {what!r}"
    )


def _extract(text: str, options: dict[str, Any], inputs: Any, place: Path) -> None:
    extract_lora(parse(text, inputs), **options).save(place)


def _signs(text: str, options: dict[str, Any], inputs: Any, place: Path) -> None:
    """``{ signs = "tb1", drawn_by = "cyan", ask = { colour = "cyan" } }``: by pictures of the new thing."""
    ask = options.get("ask", {})
    scenes = held_out_prompts(options.get("count", 24), seed=_SCENES)
    prompts = [replace(scene, **ask).caption() for scene in scenes]
    variant = parse(options["drawn_by"], inputs)
    seed = options.get("seed", 0)
    signs = gradient_signs(
        parse(text, inputs),
        prompts=prompts,
        variant=variant,
        components=inputs.components,
        count=len(prompts),
        cfg=3.0,
        seed=seed,
    )
    signs.save(place)


def _random_signs(text: str, options: dict[str, Any], inputs: Any, place: Path) -> None:
    """``{ random_signs = "tb1", seed = 1 }``: half of everything."""
    packed = {
        key: torch.from_numpy(
            (seeded.bits(options.get("seed", 0), "random signs", key, 0, -(-int(np.prod(shape)) // 8)) & 255).astype(
                np.uint8
            )
        )
        for key, shape in parse(text, inputs).shapes.items()
    }
    Signs(parse(text, inputs).shapes, packed, about={"random": True}).save(place)


def _shuffled(text: str, options: dict[str, Any], inputs: Any, place: Path) -> None:
    """``{ shuffled = "cyan - base", on = "base", seed = 1 }``: the base plus the delta, each tensor's entries mixed."""
    delta, base = parse(text, inputs), parse(options["on"], inputs)
    workspace, rules = Workspace(torch.device("cpu")), Rules()
    tensors = {}
    for key, shape in base.shapes.items():
        term, weight = delta.at(key, rules), base.at(key, rules)
        values = matrix_of(weight, shape, workspace)
        if term is not None:
            rng = seeded.generator(options.get("seed", 0), "shuffled", key, 0)
            mixed = rng.permutation(matrix_of(term, shape, workspace).flatten().numpy())
            values = values + torch.from_numpy(mixed).view(shape)
        tensors[key] = values.contiguous()
    save_file(tensors, place)


def _trained(config: str, options: dict[str, Any], inputs: Any, place: Path) -> None:
    """``{ trained = "replay.toml" }``: what a short run of that configuration makes."""
    result = finetune(read_config(inputs.folder / config), place.with_suffix(""))
    result.weights.save(place, dtype="fp32")


Make = Callable[[Any, dict[str, Any], Any, Path], None]
_KINDS: dict[str, Make] = {
    "extract": _extract,
    "signs": _signs,
    "random_signs": _random_signs,
    "shuffled": _shuffled,
    "trained": _trained,
}

"""Loss curves that were measured before, remembered by the content of everything they depend on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from alkahest.algebra.deltas import Delta
from alkahest.algebra.weights import Weights
from alkahest.files import cache
from alkahest.files.hashes import identity
from alkahest.files.reader import Reader
from alkahest.measure.remembered import content_key
from alkahest.pictures.components import default_components
from alkahest.pictures.dataset import from_folder
from alkahest.pictures.evidence import PictureOptions, ordinary_prompts
from alkahest.pictures.loss_curve import LossCurve


def key_of(delta: Delta, on: Weights, base: Weights, options: PictureOptions) -> str | None:
    """A name for the curve of this delta on this model by these pictures; None if some of it is no file."""
    components = _components(options.components, on)
    pictures = _pictures(options.pictures)
    if components is None or pictures is None:
        return None
    settings = [
        cache.KINDS["curves"].format(),
        components,
        pictures,
        list(options.prompts or ()),
        list(ordinary_prompts(on, options)),
        [getattr(options, name) for name in ("count", "seed", "dtype", "storage")],
        sorted(options.sampling.items()),
    ]
    return content_key("curve", [delta, on, base], settings)


def load_curve(key: str | None) -> tuple[LossCurve, tuple[str, ...]] | None:
    """The curve of this name and what was odd about its pictures, if there is one that can be read."""
    known = None if key is None else cache.load("curves", key)
    names = [field.name for field in fields(LossCurve) if field.name != "seed"]
    if not isinstance(known, dict) or any(name not in known for name in names):
        return None
    try:
        arrays = {name: np.array(known[name], np.float64) for name in names}
        count = len(arrays["ks"])
        if arrays["new"].ndim != 2 or any(len(arrays[name]) != count for name in ("new", "rest", "along")):
            return None
        return LossCurve(**arrays, seed=int(known["seed"])), tuple(map(str, known["notes"]))
    except (TypeError, ValueError, KeyError):
        return None


def store_curve(key: str | None, curve: LossCurve, notes: tuple[str, ...]) -> None:
    """Remember a curve, and what was odd about its pictures."""
    if key is not None:
        found = {name: value.tolist() for name, value in vars(curve).items() if isinstance(value, np.ndarray)}
        cache.store("curves", key, {**found, "seed": curve.seed, "notes": list(notes)})


def _components(given: Any, on: Weights) -> Any:
    """What tells text encoders and VAEs apart: their files, or a hub id; None for parts that are loaded already."""
    given = default_components(on) if given is None else given
    if isinstance(given, (str, os.PathLike)):
        path = Path(given)
        return _files(path) if path.exists() else str(given)
    if isinstance(given, Mapping) and all(isinstance(one, (str, os.PathLike)) for one in given.values()):
        found = {name: _files(Path(one)) for name, one in sorted(given.items())}
        return None if None in found.values() else found
    return None


def _files(path: Path) -> list[Any] | None:
    every = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    found = [[one.name, identity(Reader(one))] for one in every]
    return None if any(content is None for _, content in found) else found


def _pictures(given: Any) -> Any:
    """The content of pictures that were given."""
    if given is None:
        return []
    if isinstance(given, (str, Path)):
        return [[one.identity, one.caption] for one in from_folder(given).examples]
    try:
        return [hashlib.blake2b(image.tobytes() + repr(image.size).encode()).hexdigest() for image in given]
    except AttributeError:  # no pictures: said where they are read
        return None

"""A ComfyUI MODEL as weights in an expression, so that it can be measured, extracted from and streamed to disk."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any

import torch

from alkahest.algebra.expression import ATOM, Names
from alkahest.algebra.leaves import Leaf
from alkahest.engine.readable import Workspace
from alkahest.model.dtypes import FORMATS
from alkahest.model.families import recognise
from alkahest.nodes.patches import PREFIX, as_it_is, key_patches

_STORAGE = {form.torch: name for name, form in FORMATS.items()}
_KEPT = 2  # computed tensors in memory: the one at hand, and the one before, which a slower worker may still read


class ModelWeights(Leaf):
    """The weights of a MODEL with its patches, computed tensor by tensor in float32 as ComfyUI does on a CPU."""

    is_reproducible = False

    def __init__(self, model: Any, name: str) -> None:
        self.name = name
        patches = key_patches(model)
        state = {key: value for key, value in model.model.state_dict().items() if key.startswith(PREFIX)}
        self.family, _ = recognise([key.removeprefix(PREFIX) for key in (*patches, *state)], name)
        pads = [PREFIX + pad for pad in self.family.pads if PREFIX + pad in state]  # which ComfyUI never patches
        self._patches = {**{key: [(state[key], None)] for key in pads}, **patches}
        self._rows: dict[str, tuple[str, int]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        storage: dict[str, str] = {}
        for key, [(weight, _), *_rest] in self._patches.items():
            names, shape = self.family.canonical(key.removeprefix(PREFIX)), tuple(weight.shape)
            start = 0
            for canonical, rows in zip(names, self.family.rows(names, shape[0]) or (), strict=True):
                shapes[canonical] = (rows, *shape[1:])
                # Quantised weights give the dtype that they stand for.
                storage[canonical] = _STORAGE.get(weight.dtype, "fp32")
                self._rows[canonical] = (key, start)
                start += math.prod(shapes[canonical])
        self._shapes, self._storage = shapes, storage
        self.architecture = self.family.infer(shapes, name)
        self._known: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    @property
    def storage(self) -> Mapping[str, str]:
        return self._storage

    def read(self, key: str, start: int, stop: int, out: torch.Tensor, workspace: Workspace) -> None:
        stored, offset = self._rows[key]
        (weight, convert), *patches = self._patches[stored]
        # Most models that are measured are as they were loaded: a block of such a weight needs no copy of the whole.
        plain = not patches and convert in (None, as_it_is) and weight.dtype in _STORAGE
        values = weight.detach().view(-1) if plain and weight.is_contiguous() else self._compute(stored)
        out.copy_(values[offset + start : offset + stop])

    def _compute(self, key: str) -> torch.Tensor:
        """One whole weight with its patches, flat; two are kept, because its blocks are asked for in turn."""
        from comfy.lora import calculate_weight
        from comfy.model_management import cast_to_device

        with self._lock:
            if key not in self._known:
                (weight, convert), *patches = self._patches[key]
                # A copy, because ComfyUI computes in place; a quantised weight is decoded by ``convert``.
                values = cast_to_device(weight, torch.device("cpu"), torch.float32, copy=True)
                values = convert(values, inplace=True) if convert is not None else values
                values = calculate_weight(patches, values, key)
                while len(self._known) >= _KEPT:
                    self._known.pop(next(iter(self._known)))
                self._known[key] = values.flatten()
            return self._known[key]

    def _text(self, names: Names) -> tuple[str, int]:
        return names[self], ATOM

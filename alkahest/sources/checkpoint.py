"""Checkpoint: the weights of one Z-Image transformer in whatever files people have.

Opening reads headers only. Tensors are read block by block when an expression is streamed.
"""

from __future__ import annotations

import html
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from alkahest.algebra.expression import identifier
from alkahest.algebra.leaves import Leaf
from alkahest.errors import (
    FileFormatError,
    UnknownNameError,
    UnsupportedError,
    nearest,
    printable,
    refuse_unknown_options,
)
from alkahest.files.header import Entry
from alkahest.files.locate import locate
from alkahest.files.paths import recorded_name
from alkahest.files.reader import Reader, size_text
from alkahest.files.shards import Located
from alkahest.model.families import recognise
from alkahest.model.families.family import AS_A_PART
from alkahest.model.keys import Pattern
from alkahest.model.stored import MARKER, resolve
from alkahest.sources.signs import holds_signs
from alkahest.sources.stored_tensors import StoredTensors


class Checkpoint(StoredTensors, Leaf):
    """An opened checkpoint, which is also a lazy mapping from canonical name to tensor, names in model order.

    Keys are diffusers' names whatever the file's layout; q, k and v are rows of a fused tensor. `open` makes them.

    Examples
    --------
    >>> base = ak.open("mini:base")
    >>> query = base["layers.0.attention.to_q.weight"]
    >>> names = [key for key in base if "norm" in key]
    """

    def __init__(self, located: Located, name: str | None = None, prefix: str | None = None) -> None:
        self.path = located.path
        self.files = located.files
        self.metadata = located.metadata
        self.config = located.config
        self.file_names = {reader: recorded_name(reader.path) for reader in self.files}  # as recipes record them
        self.family, self.prefix = recognise(located.tensors.keys(), located.path, prefix)
        self.name = identifier(name or located.path)
        mine = {n: place for n, place in located.tensors.items() if n.startswith(self.prefix)}
        self.companions: dict[str, tuple[Reader, Entry]] = {
            n: place for n, place in located.tensors.items() if self.prefix and n not in mine
        }
        marker = mine.get(self.prefix + MARKER)
        self.full_precision = marker is not None and math.prod(marker[1].shape) == 2
        found = resolve(mine, located.metadata, self.prefix, self.family.has, fp8_block(located.config))
        self.extras = found.extras
        self._take(found.weights)
        self.architecture = self.family.infer(self._shapes, located.path)
        self._require_complete()
        self.oddities = [*located.beside, *self.architecture.oddities()]
        self.layout = self.family.layout_of(name.removeprefix(self.prefix) for name in mine)

    def _require_complete(self) -> None:
        if lacking := self.architecture.lacks(self.config):
            raise FileFormatError(
                "open",
                f"the {self.family.title} model is incomplete",
                file=self.path,
                expected="a complete transformer",
                found="; ".join(lacking),
                fix=AS_A_PART,
            )

    def part(self, pattern: str) -> Part:
        """The tensors that a pattern selects.

        Parameters
        ----------
        pattern : str
            As in ``protect``.

        Returns
        -------
        Part
            A mapping from names to tensors, which shows what it holds.

        Raises
        ------
        UnknownNameError
            If an item selects no tensor.

        Examples
        --------
        >>> refiner = base.part("refiner")
        >>> block = base.part("layers.0")
        """
        chosen = Pattern(pattern, self.family).require_match(self._shapes, "part")
        return Part(self, pattern, [key for key in self._shapes if chosen.matches(key)])

    def summary(self) -> dict[str, Any]:
        """What `inspect --json` prints: layout, storage, sizes and parts, from the headers alone.

        Returns
        -------
        dict

        Examples
        --------
        >>> base.summary()["layout"]
        'native'
        """
        whole = [piece.stored for piece in self.slices.values() if piece.start == 0]
        return {
            "path": str(self.path),
            "files": len(self.files),
            "layout": self.layout,
            "prefix": self.prefix,
            "storage": dict(Counter(stored.storage for stored in whole).most_common()),
            "tensors": len(whole),
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "layers": self.architecture.layers,
            "width": self.architecture.width,
            "parts": self._parts(),
            "companions": dict(Counter(n.split(".")[0] for n in self.companions)),
            "unknown": list(self.extras),
            "oddities": list(self.oddities),
            "recipe": "alkahest" in self.metadata,
        }

    def _parts(self) -> dict[str, dict[str, Any]]:
        parts: dict[str, dict[str, Any]] = {}
        for key, piece in self.slices.items():
            name = self.family.part_of(key).split(".")[0]
            row = parts.setdefault(name, {"tensors": 0, "parameters": 0, "bytes": 0, "storage": []})
            row["tensors"] += piece.start == 0
            row["parameters"] += piece.elements
            row["bytes"] += piece.nbytes
            if piece.stored.storage not in row["storage"]:
                row["storage"].append(piece.stored.storage)
        return parts

    def __repr__(self) -> str:
        about = self.summary()
        lines = [f"{self.name}: Checkpoint {self.path.name}", *(f"  {name:9} {text}" for name, text in _facts(about))]
        lines.append(f"  {'part':16} {'tensors':>8} {'parameters':>14} {'size':>10}  storage")
        for name, row in about["parts"].items():
            lines.append(
                f"  {name:16} {row['tensors']:>8} {row['parameters']:>14,} {size_text(row['bytes']):>10}  "
                + ", ".join(row["storage"])
            )
        return printable("\n".join(lines))

    def _repr_html_(self) -> str:
        about = self.summary()
        facts = "".join(f"<tr><th>{n}</th><td>{html.escape(t)}</td></tr>" for n, t in _facts(about))
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{row['tensors']}</td><td>{row['parameters']:,}</td>"
            f"<td>{size_text(row['bytes'])}</td><td>{', '.join(row['storage'])}</td></tr>"
            for name, row in about["parts"].items()
        )
        head = "<tr><th>part</th><th>tensors</th><th>parameters</th><th>size</th><th>storage</th></tr>"
        title = html.escape(f"{self.name}: Checkpoint {self.path.name}")
        return f"<div><b>{title}</b><table>{facts}</table><table>{head}{rows}</table></div>"


@dataclass(frozen=True, repr=False)
class Part(Mapping[str, torch.Tensor]):
    """Some tensors of a checkpoint, read when asked for: a mapping from canonical name to tensor."""

    checkpoint: Checkpoint  # which it is part of
    pattern: str  # that names match
    names: list[str]  # canonical

    def _ipython_key_completions_(self) -> list[str]:
        return self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self.names:
            raise UnknownNameError("read", f"not in part {self.pattern!r}", key=key, fix=nearest(key, self.names))
        return self.checkpoint[key]

    @property
    def parameters(self) -> int:
        return sum(self.checkpoint.slices[key].elements for key in self.names)

    def __repr__(self) -> str:
        lines = [f"{self.checkpoint.name}.part({self.pattern!r}): {len(self)} tensors, {self.parameters:,} parameters"]
        shapes, storage = self.checkpoint.shapes, self.checkpoint.storage
        lines += [f"  {key:52} {shapes[key]!s:16} {storage[key]}" for key in self.names[:20]]
        return printable("\n".join(lines + ([f"  ... and {len(self) - 20} more"] if len(self) > 20 else [])))


@refuse_unknown_options
def open(source: str | os.PathLike[str], *, name: str | None = None, prefix: str | None = None) -> Checkpoint:
    """Open a Z-Image checkpoint by reading its headers.

    Parameters
    ----------
    source : str or path
        A single file with any published prefix, an all-in-one file, a diffusers or pipeline folder, a sharded
        checkpoint, a hub id, or a member of the miniature family (``mini:base``); fp32, fp16, bf16, fp8 plain and
        scaled, and with comfy-kitchen nvfp4, mxfp8 and int8.
    name : str, optional
        What recipes call it, by default from the file's name.
    prefix : str, optional
        Which of several models in one file is meant, by default the one under a published prefix, or the only one.

    Returns
    -------
    Checkpoint
        Weights that are read when they are needed. Tensors that are no part of the model are carried along: ``extras``.

    Raises
    ------
    FileFormatError
        For a file that is damaged or incomplete, or whose header is not true of it.
    UnsupportedError
        For other models, other quantised forms, GGUF and pickles.

    Examples
    --------
    >>> base = ak.open("mini:base")
    >>> saved = base.save("base.safetensors", dtype="bf16")
    >>> again = ak.open("base.safetensors", name="base")
    >>> len(again) == len(base)
    True
    """
    located = locate(source)
    if holds_signs(located):
        raise UnsupportedError(
            "open", "these are gradient signs, not a checkpoint", file=located.path, fix="ak.open_signs(path)"
        )
    return Checkpoint(located, name, prefix)


def fp8_block(config: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """The sides of the blocks that a configuration says fp8 weights are scaled by."""
    quantisation = (config or {}).get("quantization_config")
    sides = quantisation.get("weight_block_size") if isinstance(quantisation, dict) else None
    if isinstance(sides, list) and len(sides) == 2 and all(type(side) is int and side > 0 for side in sides):
        return sides[0], sides[1]
    return None


def _facts(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    storage = ", ".join(f"{form} ({count})" for form, count in about["storage"].items())
    prefix = f", prefix {about['prefix']!r}" if about["prefix"] else ""
    files = f" in {about['files']} files" if about["files"] > 1 else ""
    facts = [
        ("layout", about["layout"] + prefix + files),
        ("storage", storage),
        ("size", f"{size_text(about['bytes'])}, {about['parameters']:,} parameters, {about['tensors']} tensors"),
        ("depth", f"{about['layers']} layers, width {about['width']}"),
    ]
    if about["companions"]:
        facts.append(("also", ", ".join(f"{n} ({count} tensors)" for n, count in about["companions"].items())))
    if about["unknown"]:
        more = f", ... ({len(about['unknown'])} tensors)" if len(about["unknown"]) > 5 else ""
        facts.append(("beside", f"{', '.join(about['unknown'][:5])}{more}: no part of the model, carried along"))
    facts += [("odd", text) for text in about["oddities"]]
    if about["recipe"]:
        facts.append(("recipe", "recorded in the file"))
    return facts

"""Open a LoRA of any flavour as a delta: ``bridge + 0.1 * ak.open_lora("supplement.safetensors")``."""

from __future__ import annotations

import functools
import html
import math
import os
import threading
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from alkahest.algebra.expression import identifier
from alkahest.algebra.leaves import DeltaLeaf
from alkahest.engine.readable import Workspace
from alkahest.errors import (
    AlgebraError,
    NonFiniteError,
    UnsupportedError,
    printable,
    refuse_unknown_options,
    unknown,
)
from alkahest.files.header import Entry
from alkahest.files.locate import locate
from alkahest.files.paths import recorded_name
from alkahest.files.reader import size_text
from alkahest.files.shards import Located
from alkahest.model.dtypes import BY_TAG, decode
from alkahest.model.families import holds_model
from alkahest.sources.checkpoint import Checkpoint
from alkahest.sources.checkpoint import open as open_checkpoint
from alkahest.sources.factors import NAMES, Update
from alkahest.sources.lora_modules import find_updates, one_copy
from alkahest.sources.lora_names import family_of, is_lora
from alkahest.sources.lora_settings import settings_of
from alkahest.sources.signs import Signs, holds_signs, signs_of

_ROWS = 32  # computed at a time, whatever is asked for, so that no bit depends on where a block ends
_KEPT = 8  # factors kept in memory: those of the tensor at hand, for every worker


class Lora(DeltaLeaf):
    """A LoRA file as a delta on the weights it names; see `open_lora`."""

    def __init__(self, located: Located, name: str | None = None, only: str | None = None) -> None:
        if only not in (None, "transformer"):
            raise unknown("open_lora", "only='transformer' is the part that can be taken", only, ("transformer",))
        self.path = located.path
        self.files = located.files
        self.metadata = located.metadata
        self.file_names = {reader: recorded_name(reader.path) for reader in self.files}
        self.name = name or identifier(located.path)
        self.settings = settings_of(located)
        self.family = family_of(located.tensors)
        self._places = {entry: reader for reader, entry in located.tensors.values()}
        self._kept: dict[Entry, torch.Tensor] = {}
        self._lock = threading.Lock()
        found = find_updates(located, self.family, self.settings, only)
        chosen = one_copy(found, located, self._is_same)
        self.updates: dict[str, Update] = {key: chosen[key] for key in self.family.in_model_order(chosen)}
        self.flavours, self.left = found.flavours, found.left
        self.notes = [*self.settings.notes, *found.notes]
        if not self.updates:
            raise UnsupportedError(
                "open_lora", "nothing in this file is for the transformer", file=located.path, found=_left(self.left)
            )

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        if self.needs_weights:
            raise AlgebraError(
                "open_lora",
                f"{self.dependent_kinds} depends on the weights that it meets, so it is no delta",
                file=self.path,
                fix="ak.apply_lora(weights, lora, strength)",
            )
        return self.targets

    @cached_property
    def targets(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every weight that it changes."""
        return {key: update.shape for key, update in self.updates.items()}

    @property
    def is_dora(self) -> bool:
        """Whether it normalises the weights that it meets (Liu et al. 2024, arXiv:2402.09353)."""
        return any(update.dora for update in self.updates.values())

    @property
    def needs_weights(self) -> bool:
        """Whether what it does depends on the weights that it meets, so that only `ak.apply_lora` can add it."""
        return any(update.needs_weights for update in self.updates.values())

    @property
    def dependent_kinds(self) -> str:
        """The kinds in it that depend on the weights, in words."""
        kinds = ("DoRA" if one.dora else NAMES[one.kind] for one in self.updates.values() if one.needs_weights)
        return " and ".join(dict.fromkeys(kinds))

    @property
    def factor_dtype(self) -> str:
        """The dtype of its first factor, as safetensors names it."""
        return next(
            entry.dtype
            for update in self.updates.values()
            for role, entry in update.entries.items()
            if role not in ("alpha", "scalar", "reshape")
        )

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._places)

    def read(self, key: str, start: int, stop: int, out: torch.Tensor, workspace: Workspace) -> None:
        update = self.updates[key]
        width = math.prod(update.shape[1:])
        height = update.shape[0]

        def factor(role: str) -> torch.Tensor:
            return self.factor(update, role).to(out.device)

        step = _ROWS if update.kind != "diff" else height
        for top in range(start // width // step * step, -(-stop // width), step):
            values = update.rows(top, min(top + step, height), factor).flatten()
            first, last = max(start, top * width), min(stop, (top + step) * width)
            out[first - start : last - start] = values[first - top * width : last - top * width]

    def factor(self, update: Update, role: str) -> torch.Tensor:
        """One stored factor, float32, as a matrix."""
        entry = update.entries[role] if role in update.entries else update.entries["bias"]
        with self._lock:
            known = self._kept.get(entry)
        if known is None:
            raw = torch.empty(entry.nbytes, dtype=torch.uint8)
            self._places[entry].read_into(raw.numpy().data, entry.offset)
            known = torch.empty(math.prod(entry.shape))
            decode(raw, BY_TAG[entry.dtype], known)
            known = known.view(entry.shape).flatten(1) if len(entry.shape) > 1 else known
            with self._lock:
                if len(self._kept) >= _KEPT:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[entry] = known
        return known

    def check_finite(self, key: str, operation: str) -> None:
        """Raise NonFiniteError if a factor of this weight holds NaN or infinity."""
        update = self.updates[key]
        for role, name in update.names.items():
            if role not in ("alpha", "scalar", "reshape") and (
                bad := int((~torch.isfinite(self.factor(update, role))).sum())
            ):
                raise NonFiniteError(
                    operation,
                    "a LoRA holds NaN or infinity",
                    file=self.path,
                    key=name,
                    expected="finite numbers",
                    found=f"{bad:,} of them in this tensor",
                    fix="get the file again",
                )

    def _is_same(self, one: Update, other: Update) -> bool:
        """Whether two updates of one weight have equal numbers, by what they make."""
        if one.shape != other.shape or one.needs_weights or other.needs_weights:
            return False
        left, right = (
            update.rows(0, update.shape[0], functools.partial(self.factor, update)) for update in (one, other)
        )
        return bool((left - right).abs().max() <= 1e-6 * left.abs().max())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Lora) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @cached_property
    def _identity(self) -> tuple[Any, ...]:
        return tuple((os.path.realpath(f.path), f.stamp) for f in self.files)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_lock": None}  # another process reads for itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def summary(self) -> dict[str, Any]:
        """What `lora inspect --json` prints, from the header alone."""
        kinds = Counter(NAMES[update.kind] for update in self.updates.values())
        ranks = [update.rank for update in self.updates.values() if update.rank is not None]
        return {
            "path": str(self.path),
            "names": dict(self.flavours.most_common()),
            "kinds": dict(kinds.most_common()),
            "dora": self.is_dora,
            "targets": len(self.updates),
            "bytes": self.nbytes,
            "ranks": [min(ranks), max(ranks)] if ranks else None,
            "scales": sorted({round(update.scale, 6) for update in self.updates.values()}),
            "without_alpha": sum("alpha" not in u.entries and u.kind in ("lora", "hada") for u in self.updates.values())
            if self.settings.source is None
            else 0,
            "settings": self.settings.source,
            "notes": self.notes,
            "left": {why: len(names) for why, names in self.left.items()},
            "parts": dict(Counter(self.family.part_of(key).split(".")[0] for key in self.updates)),
            "recipe": "alkahest" in self.metadata,
        }

    def __repr__(self) -> str:
        return printable(
            "\n".join(
                [f"{self.name}: LoRA {self.path.name}", *(f"  {n:8} {text}" for n, text in _facts(self.summary()))]
            )
        )

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{n}</th><td>{html.escape(text)}</td></tr>" for n, text in _facts(self.summary()))
        return f"<div><b>{html.escape(self.name)}</b>: LoRA {html.escape(self.path.name)}<table>{rows}</table></div>"


@refuse_unknown_options
def open_lora(source: str | os.PathLike[str], *, name: str | None = None, only: str | None = None) -> Lora:
    """Open a LoRA by reading its header: a delta on the weights that it names.

    Parameters
    ----------
    source : str or path
        LoRA, LoHa, LoKr, DoRA and full differences, fused or split qkv, with the names of ComfyUI, diffusers, PEFT
        (with its folder's adapter_config.json), kohya, musubi, OneTrainer and LyCORIS. OFT, BOFT, IA3 and whole
        tensors, which depend on the weights that they meet, are for `apply_lora`.
    name : str, optional
        What recipes call it, by default from the file's name.
    only : str, optional
        ``"transformer"`` leaves out what is for other models; ``left`` says what.

    Returns
    -------
    Lora
        Strength 1 is alpha / rank.

    Raises
    ------
    FileFormatError
        For incomplete, ambiguous or damaged files.
    UnknownNameError
        For a tensor that fits nothing.
    UnsupportedError
        For checkpoints, other adapters, and settings that are not understood.

    Examples
    --------
    >>> made = ak.extract_lora(variant - base, rank=4).save("variant-lora.safetensors")
    >>> merged = bridge.protect("refiner") + 0.8 * ak.open_lora("variant-lora.safetensors")
    """
    located = locate(source)
    if not any(map(is_lora, located.tensors)):
        checkpoint = holds_model(located.tensors.keys())
        raise UnsupportedError(
            "open_lora",
            "this is a checkpoint, not a LoRA" if checkpoint else "this is not a LoRA",
            file=located.path,
            found=", ".join(list(located.tensors)[:3]) or "nothing",
            fix="ak.open(path); a LoRA of it is ak.extract_lora(variant - base)" if checkpoint else "name a LoRA file",
        )
    return Lora(located, name, only)


def open_input(source: str | os.PathLike[str], name: str | None = None) -> Checkpoint | Lora | Signs:
    """A checkpoint, a LoRA or gradient signs, whichever the file is."""
    located = locate(source)
    if holds_signs(located):
        return signs_of(located, name)
    if any(map(is_lora, located.tensors)) and not holds_model(located.tensors):
        return Lora(located, name)
    return open_checkpoint(source, name=name)


def _facts(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    def counted(of: Mapping[str, int]) -> str:
        return ", ".join(f"{name} ({count})" for name, count in of.items())

    ranks = about["ranks"]
    facts = [
        ("kind", counted(about["kinds"]) + (", weights normalised (DoRA)" if about["dora"] else "")),
        ("names", ", ".join(about["names"])),
        ("targets", f"{about['targets']} tensors: {counted(about['parts'])}"),
        ("rank", "-" if ranks is None else f"{ranks[0]}" if ranks[0] == ranks[1] else f"{ranks[0]} to {ranks[1]}"),
        (
            "scale",
            ", ".join(f"{scale:g}" for scale in about["scales"][:4]) + (", ..." if len(about["scales"]) > 4 else ""),
        ),
        *(("note", note) for note in about["notes"]),
        *(("left", f"{count} tensors {why} are left out") for why, count in about["left"].items()),
        ("size", size_text(about["bytes"])),
    ]
    if about["without_alpha"]:
        facts.append(
            ("alpha", f"missing in {about['without_alpha']} targets: taken to be the rank, as ComfyUI and diffusers do")
        )
    return facts


def _left(left: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{len(names)} tensors {why}" for why, names in left.items()) or "nothing"

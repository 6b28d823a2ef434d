"""Open a LoRA of any flavour as a delta: ``bridge + 0.1 * ak.open_lora("supplement.safetensors")``."""

from __future__ import annotations

import html
import json
import math
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from alkahest.algebra.expression import identifier
from alkahest.algebra.leaves import DeltaLeaf
from alkahest.engine.readable import Workspace
from alkahest.errors import (
    AlgebraError,
    FileFormatError,
    NonFiniteError,
    UnknownNameError,
    UnsupportedError,
    refuse_unknown_options,
)
from alkahest.files.header import Entry
from alkahest.files.locate import locate
from alkahest.files.reader import Reader, size_text
from alkahest.files.shards import Located
from alkahest.model.dtypes import BY_TAG, decode
from alkahest.model.families import Family, holds_model
from alkahest.sources.checkpoint import Checkpoint
from alkahest.sources.checkpoint import open as open_checkpoint
from alkahest.sources.factors import NAMES, Update, scale_of, shape_of
from alkahest.sources.lora_names import Name, family_of, is_lora, parse_name
from alkahest.sources.signs import Signs, holds_signs, signs_of

_ROWS = 32  # computed at a time, whatever is asked for, so that no bit depends on where a block ends
_KEPT = 8  # factors kept in memory: those of the tensor at hand, for every worker
_NUMBERS = {"F64": torch.float64, "I64": torch.int64, "I32": torch.int32}  # that an alpha may be besides
ADAPTER = "lora_adapter_metadata"  # where diffusers writes PEFT's settings


class Lora(DeltaLeaf):
    """A LoRA file as a delta on the weights it names; see `open_lora`."""

    def __init__(self, located: Located, name: str | None = None) -> None:
        self.path = located.path
        self.files = located.files
        self.metadata = located.metadata
        self.file_names = {reader: reader.path.name for reader in self.files}
        self.name = name or identifier(located.path)
        self.settings = _settings(located)
        self.flavours: Counter[str] = Counter()
        self.family = family_of(located.tensors)
        found = dict(_updates(located, self.family, self.settings, self.flavours))
        self.updates: dict[str, Update] = {key: found[key] for key in self.family.in_model_order(found)}
        self._places = {entry: reader for reader, entry in located.tensors.values()}
        self._kept: dict[Entry, torch.Tensor] = {}
        self._lock = threading.Lock()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        if self.is_dora:
            raise AlgebraError(
                "open_lora",
                "a DoRA depends on the weights that it meets, so it is no delta",
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
    def factor_dtype(self) -> str:
        """The dtype of its first factor, as safetensors names it."""
        return next(
            entry.dtype for update in self.updates.values() for role, entry in update.entries.items() if role != "alpha"
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
        entry = update.entries.get(role) or update.entries["bias"]
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
            if role != "alpha" and (bad := int((~torch.isfinite(self.factor(update, role))).sum())):
                raise NonFiniteError(
                    operation,
                    "a LoRA holds NaN or infinity",
                    file=self.path,
                    key=name,
                    expected="finite numbers",
                    found=f"{bad:,} of them in this tensor",
                    fix="get the file again",
                )

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
            if not self.settings["known"]
            else 0,
            "parts": dict(Counter(self.family.part_of(key).split(".")[0] for key in self.updates)),
            "recipe": "alkahest" in self.metadata,
        }

    def __repr__(self) -> str:
        return "\n".join(
            [f"{self.name}: LoRA {self.path.name}", *(f"  {n:8} {text}" for n, text in _facts(self.summary()))]
        )

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{n}</th><td>{html.escape(text)}</td></tr>" for n, text in _facts(self.summary()))
        return f"<div><b>{html.escape(self.name)}</b>: LoRA {html.escape(self.path.name)}<table>{rows}</table></div>"


@refuse_unknown_options
def open_lora(source: str | os.PathLike[str], *, name: str | None = None) -> Lora:
    """Open a LoRA by reading its header: a delta on the weights that it names.

    >>> bridge.protect("refiner") + 0.1 * ak.open_lora("supplement.safetensors")

    Takes LoRA, LoHa, LoKr, DoRA and full differences, fused or split qkv, with the names of ComfyUI,
    diffusers, PEFT (with its folder's adapter_config.json), kohya, musubi, OneTrainer and LyCORIS. Strength 1 is
    alpha / rank. ``name`` is what recipes call it. Raises FileFormatError for incomplete, ambiguous or damaged
    files, UnknownNameError for a tensor that fits nothing, UnsupportedError for checkpoints and other adapters.
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
    return Lora(located, name)


def open_input(source: str | os.PathLike[str], name: str | None = None) -> Checkpoint | Lora | Signs:
    """A checkpoint, a LoRA or gradient signs, whichever the file is."""
    located = locate(source)
    if holds_signs(located):
        return signs_of(located, name)
    if any(map(is_lora, located.tensors)) and not holds_model(located.tensors):
        return Lora(located, name)
    return open_checkpoint(source, name=name)


def _updates(
    located: Located, family: Family, settings: Mapping[str, Any], flavours: Counter[str]
) -> Iterator[tuple[str, Update]]:
    modules: dict[tuple[tuple[str, ...], str], dict[str, tuple[str, Entry, Name]]] = {}
    for stored, (_, entry) in located.tensors.items():
        name = _parse_name(stored, family, located.path)
        # A bias's difference is a target of its own; everything else of a module belongs together.
        module = modules.setdefault((name.keys, "bias" if name.role == "bias" else ""), {})
        if name.role in module:
            raise _twice(name.keys[0], module[name.role][0], stored, located.path)
        module[name.role] = (stored, entry, name)
    seen: dict[str, str] = {}
    for (keys, _), found in modules.items():
        for key, update in _of_module(keys, found, located, family, settings):
            stored = next(iter(update.names.values()))
            if key in seen:
                raise _twice(key, seen[key], stored, located.path)
            seen[key] = stored
            yield key, update
        flavours.update({next(iter(found.values()))[2].flavour})


def _of_module(
    keys: tuple[str, ...],
    found: dict[str, tuple[str, Entry, Name]],
    located: Located,
    family: Family,
    settings: Mapping[str, Any],
) -> Iterator[tuple[str, Update]]:
    names = {role: stored for role, (stored, _, _) in found.items()}
    entries = {role: entry for role, (_, entry, _) in found.items()}
    kinds = sorted({name.kind for _, _, name in found.values()} - {""})
    if len(kinds) != 1:
        raise FileFormatError(
            "open_lora",
            "a module has two kinds of update" if kinds else "an alpha without its LoRA",
            file=located.path,
            key=", ".join(names.values()),
            found=" and ".join(NAMES[kind] for kind in kinds) or None,
            fix="the file is damaged or was put together wrongly; get it again",
        )
    for role, entry in entries.items():
        if entry.dtype not in BY_TAG and not (role == "alpha" and entry.dtype in _NUMBERS):
            raise UnsupportedError(
                "open_lora",
                "this number format is not handled",
                file=located.path,
                key=names[role],
                expected=", ".join(BY_TAG),
                found=entry.dtype,
            )
    (kind,) = kinds
    rows, *rest = shape_of(kind, entries, names, located.path)
    heights = family.rows(keys, rows)
    if heights is None:
        raise FileFormatError(
            "open_lora",
            "a fused qkv whose rows cannot be split into its parts",
            file=located.path,
            key=next(iter(names.values())),
            found=f"{rows} rows",
            fix="the file is damaged; get it again",
        )
    scale = scale_of(kind, entries, _alpha(located, entries, names, keys[0], settings))
    if settings["use_rslora"] and "alpha" not in entries and kind == "lora":
        scale *= math.sqrt(entries["down"].shape[0])
    first = 0
    for key, height in zip(keys, heights, strict=True):
        yield key, Update(kind, entries, names, (height, *rest), scale, first, "magnitude" in entries)
        first += height


def _alpha(
    located: Located, entries: Mapping[str, Entry], names: Mapping[str, str], key: str, settings: Mapping[str, Any]
) -> float | None:
    if "alpha" not in entries:
        module = key.removesuffix(".weight")
        patterns = {name: value for name, value in settings["alpha_pattern"].items() if module.endswith(name)}
        chosen = next(iter(patterns.values()), settings["lora_alpha"])
        return None if chosen is None else float(chosen)
    entry = entries["alpha"]
    if math.prod(entry.shape) != 1:
        raise FileFormatError(
            "open_lora", "alpha must be one number", file=located.path, key=names["alpha"], found=f"shape {entry.shape}"
        )
    raw = torch.empty(entry.nbytes, dtype=torch.uint8)
    reader = next(reader for reader, one in located.tensors.values() if one is entry)
    reader.read_into(raw.numpy().data, entry.offset)
    if entry.dtype in _NUMBERS:
        value = raw.view(_NUMBERS[entry.dtype]).double()
    else:
        value = torch.empty(1)
        decode(raw, BY_TAG[entry.dtype], value)
    if not math.isfinite(float(value)):
        raise FileFormatError(
            "open_lora", "alpha is not a finite number", file=located.path, key=names["alpha"], found=float(value)
        )
    return float(value)


def _settings(located: Located) -> dict[str, Any]:
    """PEFT's own settings, which hold alpha: in the metadata as diffusers writes them, or beside the file as PEFT
    does.
    """
    found: Any = None
    try:
        if ADAPTER in located.metadata:
            found = json.loads(located.metadata[ADAPTER])
        elif (beside := located.files[0].path.parent / "adapter_config.json").is_file() and located.files[
            0
        ].path.name.startswith("adapter_model"):
            reader = Reader(beside)
            found = json.loads(reader.read(0, min(reader.size, 1 << 20)))
    except (ValueError, RecursionError):
        raise FileFormatError(
            "open_lora",
            "the adapter's settings cannot be read",
            file=located.path,
            expected="JSON",
            fix="get the file again",
        ) from None
    given = (
        {str(name).removeprefix("transformer."): value for name, value in found.items()}
        if isinstance(found, dict)
        else {}
    )
    patterns = given.get("alpha_pattern") or {}
    numbers = [given.get("lora_alpha"), *(patterns.values() if isinstance(patterns, dict) else [math.nan])]
    if not all(one is None or (isinstance(one, (int, float)) and math.isfinite(one)) for one in numbers):
        raise FileFormatError(
            "open_lora",
            "the adapter's settings make no sense",
            file=located.path,
            key="lora_alpha, alpha_pattern",
            expected="finite numbers",
            found=str(numbers)[:80],
            fix="get the file again",
        )
    return {
        "lora_alpha": given.get("lora_alpha"),
        "use_rslora": bool(given.get("use_rslora")),
        "known": bool(given),
        "alpha_pattern": {str(name): value for name, value in patterns.items() if value is not None},
    }


def _parse_name(stored: str, family: Family, file: Path) -> Name:
    try:
        return parse_name(stored, family)
    except (UnknownNameError, UnsupportedError) as error:
        raise type(error)(
            error.operation, error.problem, file=file, key=error.key, found=error.found, fix=error.fix
        ) from None


def _twice(key: str, first: str, second: str, file: Path) -> FileFormatError:
    return FileFormatError(
        "open_lora",
        "two tensors of the file mean the same thing",
        file=file,
        key=key,
        found=f"{first} and {second}",
        fix="two LoRAs were put into one file; add them up instead: a + b",
    )


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
        ("size", size_text(about["bytes"])),
    ]
    if about["without_alpha"]:
        facts.append(
            ("alpha", f"missing in {about['without_alpha']} targets: taken to be the rank, as ComfyUI and diffusers do")
        )
    return facts

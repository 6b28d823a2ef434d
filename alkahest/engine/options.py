"""How an expression is written: the options of ``save``, checked before anything is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from alkahest.errors import OutputError, UnsupportedError, require_known, unknown
from alkahest.model.dtypes import storage_name

DEVICES = ("cpu", "cuda", "mps", "xpu")
ROUNDINGS = ("nearest", "stochastic")
_MAX_THREADS = 8
_RECORDED = (
    "dtype",
    "layout",
    "rounding",
    "seed",
    "device",
    "comfy_compatible",
    "max_shard_size",
    "allow_nonfinite",
    "metadata",
    "drop",
)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Options:
    """How an expression is written, as `Weights.save` explains; measuring takes ``device`` and ``threads`` of it."""

    dtype: str | torch.dtype | None = None
    layout: str | None = None
    rounding: str = "nearest"
    seed: int = 0
    device: str = "cpu"
    comfy_compatible: bool = False
    max_shard_size: int | str | None = None
    allow_nonfinite: bool = False
    threads: int | None = None
    metadata: Mapping[str, str] | None = None
    drop: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], operation: str = "save") -> Options:
        """Options by name, as a recipe records them; UnknownNameError for a name that is none."""
        require_known(operation, given, [item.name for item in fields(cls)])
        return cls(**given)._require_values(operation)

    def require(self, operation: str) -> Options:
        """These options, if each has a value that it can have; errors name the ``operation`` that was called."""
        self._require_values(operation)
        # Not of what a recipe records: earlier versions took such a seed and wrote it down.
        if self.seed and self.rounding != "stochastic":
            raise OutputError(
                operation,
                "the seed is that of stochastic rounding, and this rounds to nearest",
                found=f"seed={self.seed}",
                fix="add rounding='stochastic', or leave the seed out",
            )
        return self

    def _require_values(self, operation: str) -> Options:
        if self.dtype is not None:
            storage_name(self.dtype)
        if self.rounding not in ROUNDINGS:
            raise unknown(operation, "unknown rounding", self.rounding, ROUNDINGS)
        for name in ("seed", "threads"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or (name == "threads" and value < 1)):
                least = ", 1 or more" if name == "threads" else ""
                raise OutputError(operation, f"{name} must be a whole number{least}", found=repr(value))
        for name in ("comfy_compatible", "allow_nonfinite"):
            if type(value := getattr(self, name)) is not bool:
                raise OutputError(operation, f"{name} is yes or no", expected="True or False", found=repr(value)[:80])
        self.shard_bytes()
        existing_device(self.device, operation)
        _require_metadata(self.metadata)
        return self

    def record(self) -> dict[str, Any]:
        """The options that change the bytes, where they are not the default, for the recipe."""
        changed = {name: getattr(self, name) for name in _RECORDED if getattr(self, name) != getattr(Options(), name)}
        if self.dtype is not None:
            changed["dtype"] = storage_name(self.dtype)
        return changed

    def worker_count(self) -> int:
        if self.threads is not None:
            return self.threads
        affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
        return max(1, min(len(affinity(0)) if affinity else os.cpu_count() or 1, _MAX_THREADS))

    def torch_device(self) -> torch.device:
        return existing_device(self.device, "save")

    def shard_bytes(self) -> int | None:
        return None if self.max_shard_size is None else byte_count(self.max_shard_size, "shard size")

    def makes_folder(self, target: Path) -> bool:
        return self.max_shard_size is not None or (self.layout == "diffusers" and not names_file(target))


def _require_metadata(metadata: object) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, Mapping) or not all(
        isinstance(text, str) for item in metadata.items() for text in item
    ):
        raise OutputError(
            "save", "metadata is text under names", found=repr(metadata)[:200], fix="metadata={'title': '...'}"
        )
    if odd := [name for name, value in metadata.items() if not _is_text(name + value)]:
        raise OutputError("save", "metadata holds half a character", key=odd[0], fix="give text that UTF-8 can hold")
    if taken := [name for name in metadata if name in ("format", "alkahest", "__metadata__")]:
        raise OutputError("save", f"{taken[0]!r} in a file's metadata is not free", fix="choose another name")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def existing_device(name: str, operation: str) -> torch.device:
    """A torch device by name; UnsupportedError if this machine or this torch does not have it."""
    try:
        device = torch.device(name)
        if device.type not in DEVICES:
            raise TypeError(f"one of {', '.join(DEVICES)} is needed")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0][:80]
        raise UnsupportedError(
            operation, "the device is not there", found=f"{name!r}: {reason}", fix="use device='cpu'"
        ) from None
    return device


def byte_count(size: int | str, what: str) -> int:
    """Bytes from a whole number or text; ``what`` names it in an error.

    >>> byte_count("2GB", "memory")
    2000000000
    """
    if type(size) is int and size > 0:
        return size
    text = str(size).strip()
    number, unit = text[:-2].strip(), text[-2:].upper()
    if unit not in _UNITS or not number.replace(".", "", 1).isdigit() or float(number) <= 0:
        raise OutputError("size", f"the {what} cannot be read", found=repr(size), fix="write it like '5GB'")
    return int(float(number) * _UNITS[unit])


def names_file(target: Path) -> bool:
    """Whether an output under this name is one file, rather than a folder."""
    return target.suffix.lower() == ".safetensors"

"""The user's cache folder: things that can be computed again, listed, sized and cleared."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alkahest.errors import refuse_unknown_options, unknown

if TYPE_CHECKING:
    import pandas
    from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """Something that is remembered, and the number of the code that makes it: raised whenever it would come out
    otherwise.
    """

    what: str
    number: int
    packages: tuple[str, ...] = ()  # whose versions decide some of the bits

    def format(self) -> str:
        """What belongs into the name of everything of this kind, so that other code's results are not taken for its
        own.
        """
        return ", ".join([str(self.number), *(f"{name} {_version(name)}" for name in self.packages)])


KINDS = {
    "blake3": Kind("hashes of files that were read from end to end", 1),
    "tables": Kind("measured deltas", 1),  # as they are written; each table's own arithmetic has a number beside it
    "sweeps": Kind("pictures of sweeps", 1, ("torch", "diffusers")),
    "latents": Kind("encoded training pictures", 1, ("torch", "diffusers")),
    "embeddings": Kind("encoded training captions", 1, ("torch", "transformers")),
    "curves": Kind("losses over k, for multipliers by pictures", 1, ("torch", "diffusers", "transformers")),
    "scores": Kind("losses that a search measured", 1, ("torch", "diffusers", "transformers")),
    "extractions": Kind("LoRAs that are extracted but not saved yet, tensor by tensor", 1, ("torch",)),
}


def cache_folder() -> Path:
    """Where things that can be recomputed are kept: ``$ALKAHEST_CACHE`` or the system's cache folder."""
    if override := os.environ.get("ALKAHEST_CACHE"):
        return Path(override)
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "alkahest"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alkahest"


@refuse_unknown_options
def cached() -> pandas.DataFrame:
    """What the cache folder holds, newest first.

    Returns
    -------
    pandas.DataFrame
        Kind, file, bytes and time of each entry.

    Examples
    --------
    >>> sizes = ak.cached().groupby("kind")["bytes"].agg(["count", "sum"])
    """
    import pandas as pd

    rows = []
    for kind in KINDS:
        for path in _files_in(cache_folder() / kind):
            with contextlib.suppress(OSError):  # another process may be clearing it
                status = path.stat()
                time = datetime.fromtimestamp(status.st_mtime)
                rows.append({"kind": kind, "file": str(path), "bytes": status.st_size, "time": time})
    found = pd.DataFrame(rows, columns=["kind", "file", "bytes", "time"])
    return found.sort_values("time", ascending=False, ignore_index=True)


@refuse_unknown_options
def clear_cache(kind: str | None = None) -> int:
    """Delete what the cache folder holds, or one kind of it.

    Touches nothing but the folders named after `alkahest.files.cache.KINDS`.

    Parameters
    ----------
    kind : str, optional
        By default all.

    Returns
    -------
    int
        How many bytes that were.

    Raises
    ------
    UnknownNameError
        For any other kind.

    Examples
    --------
    >>> freed = ak.clear_cache("tables")
    """
    if kind is not None and kind not in KINDS:
        raise unknown("clear_cache", "no such kind", kind, KINDS)
    entries = cached()
    freed = int(entries[entries.kind == kind].bytes.sum() if kind else entries.bytes.sum())
    for name in KINDS if kind is None else (kind,):
        shutil.rmtree(cache_folder() / name, ignore_errors=True)
    return freed


def load(kind: str, name: str) -> Any:
    """A stored JSON value; None if there is none, or none that is whole: others may write, clear and damage it."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        found = json.loads((cache_folder() / kind / f"{name}.json").read_bytes())
        if found["sum"] == _sum_of(kind, name, found["value"]):
            return found["value"]
    return None


def store(kind: str, name: str, value: Any) -> None:
    """Store a JSON value, in one step. A cache that cannot be written costs time, nothing else."""
    text = json.dumps({"value": value, "sum": _sum_of(kind, name, value)})
    with contextlib.suppress(OSError):
        write_entry(cache_folder() / kind / f"{name}.json", text.encode())


def write_entry(entry: Path, data: bytes) -> None:
    """Write a file of the cache in one step; nothing of it stays if that fails. OSError, as the system has it."""
    for tried in range(3):
        entry.parent.mkdir(parents=True, exist_ok=True)
        scratch = entry.with_name(f".{entry.name[:100]}.{uuid.uuid4().hex[:8]}")
        try:
            scratch.write_bytes(data)
            os.replace(scratch, entry)
            return
        except FileNotFoundError:  # another process cleared the folder meanwhile
            if tried == 2:
                raise
        finally:
            scratch.unlink(missing_ok=True)


def store_tensors(entry: Path, tensors: Mapping[str, Tensor], about: Any = None) -> None:
    """Keep tensors and a JSON value with a checksum, in one step. OSError if that cannot be written."""
    from safetensors.torch import save

    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    told = json.dumps(about, sort_keys=True)
    metadata = {"about": told, "sum": _tensor_sum(entry.stem, plain, told)}
    write_entry(entry, save(plain, metadata))


def load_tensors(entry: Path) -> tuple[dict[str, Tensor], Any] | None:
    """What `store_tensors` kept; None if it is not there, or not whole.

    Numbers stay in the file until they are used: clone what has to outlive what others do to it.
    """
    from safetensors import SafetensorError, safe_open

    # RuntimeError is torch's, for a file that is cleared between two looks at it.
    gone = (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError, RuntimeError)
    with contextlib.suppress(*gone):
        with safe_open(entry, "pt") as stored:
            metadata = stored.metadata() or {}
            found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        if metadata["sum"] == _tensor_sum(entry.stem, found, metadata["about"]):
            return found, json.loads(metadata["about"])
    return None


def _sum_of(kind: str, name: str, value: Any) -> str:
    """A checksum of a value and of where it stands, so that no entry is taken for another."""
    text = json.dumps([kind, name, value], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _tensor_sum(name: str, tensors: Mapping[str, Tensor], about: str) -> str:
    import torch

    digest = hashlib.blake2b(f"{name} {about}".encode(), digest_size=16)
    for key, value in sorted(tensors.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _files_in(folder: Path) -> Iterator[Path]:
    """Every file below a folder; what is cleared meanwhile is passed over, as `os.walk` does."""
    yield from (Path(place, name) for place, _, names in os.walk(folder) for name in names)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # it may come with another program
        return "unknown"

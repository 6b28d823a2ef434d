"""The user's cache folder: things that can be computed again, listed, sized and cleared."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alkahest.errors import UnknownNameError, nearest

if TYPE_CHECKING:
    import pandas

KINDS = {
    "blake3": "hashes of files that were read from end to end",
    "tables": "measured deltas",
    "sweeps": "pictures of sweeps",
    "latents": "encoded training pictures",
    "embeddings": "encoded training captions",
    "extractions": "LoRAs that are extracted but not saved yet, tensor by tensor",
}


def cache_folder() -> Path:
    """Where things that can be recomputed are kept: ``$ALKAHEST_CACHE`` or the system's cache folder."""
    if override := os.environ.get("ALKAHEST_CACHE"):
        return Path(override)
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "alkahest"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alkahest"


def cached() -> pandas.DataFrame:
    """What the cache folder holds: a DataFrame with kind, file, bytes and time of each entry, newest first.

    >>> ak.cached().groupby("kind")["bytes"].agg(["count", "sum"])
    """
    import pandas as pd

    rows = []
    for kind in KINDS:
        for path in (cache_folder() / kind).glob("**/*"):
            with contextlib.suppress(OSError):  # another process may be clearing it
                if path.is_file():
                    status = path.stat()
                    rows.append({"kind": kind, "file": str(path), "bytes": status.st_size, "time": datetime.fromtimestamp(status.st_mtime)})  # fmt: skip
    found = pd.DataFrame(rows, columns=["kind", "file", "bytes", "time"])
    return found.sort_values("time", ascending=False, ignore_index=True)


def clear_cache(kind: str | None = None) -> int:
    """Delete what the cache folder holds, or one kind of it; returns how many bytes that were.

    >>> ak.clear_cache("tables")

    Touches nothing but the folders named after `alkahest.files.cache.KINDS`. UnknownNameError for any other kind.
    """
    if kind is not None and kind not in KINDS:
        raise UnknownNameError("clear_cache", "no such kind", found=repr(kind), fix=nearest(kind, KINDS))
    entries = cached()
    freed = int(entries[entries.kind == kind].bytes.sum() if kind else entries.bytes.sum())
    for name in KINDS if kind is None else (kind,):
        shutil.rmtree(cache_folder() / name, ignore_errors=True)
    return freed


def load(kind: str, name: str) -> Any:
    """A stored JSON value; None if there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((cache_folder() / kind / f"{name}.json").read_text())
    return None


def store(kind: str, name: str, value: Any) -> None:
    """Store a JSON value, in one step. A cache that cannot be written costs time, nothing else."""
    with contextlib.suppress(OSError):
        entry = cache_folder() / kind / f"{name}.json"
        entry.parent.mkdir(parents=True, exist_ok=True)
        scratch = entry.with_suffix(f".{uuid.uuid4().hex[:8]}")
        scratch.write_text(json.dumps(value))
        os.replace(scratch, entry)

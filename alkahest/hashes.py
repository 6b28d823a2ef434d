"""Content hashes of files, remembered between runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from alkahest.errors import AlkahestError
from alkahest.files import Reader

_RACY_SECONDS = 2.0
_HASH_CHUNK = 4 << 20


def blake3_of(readers: Sequence[Reader], cancelled: threading.Event | None = None) -> list[str]:
    """BLAKE3 of each file as 64 hex digits, remembered in the user's cache folder by size and time.

    Several files are read side by side, so that a merge that reads them too finds the same pages in
    memory. Setting ``cancelled`` makes it return early, with empty strings for what is not known.
    """
    from blake3 import blake3

    digests = [_remembered(reader) for reader in readers]
    todo = {index: blake3(max_threads=1) for index, digest in enumerate(digests) if not digest}
    # A page-aligned buffer: the kernel copies to it six times as fast as to a bytearray's odd address.
    buffer = memoryview(mmap.mmap(-1, _HASH_CHUNK))
    for offset in range(0, max((readers[i].size for i in todo), default=0), len(buffer)):
        if cancelled is not None and cancelled.is_set():
            return digests
        for index, hasher in todo.items():
            view = buffer[: max(0, min(len(buffer), readers[index].size - offset))]
            if len(view):
                readers[index].read_into(view, offset)
                hasher.update(view)
    for index, hasher in todo.items():
        digests[index] = hasher.hexdigest()
        _remember(readers[index], digests[index])
    return digests


def known_paths(digest: str) -> list[Path]:
    """Paths at which a file with this BLAKE3 was seen before and still stands unchanged."""
    found = []
    for entry in (cache_folder() / "blake3").glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AlkahestError):
            known = json.loads(entry.read_text())
            if known["blake3"] == digest and list(Reader(known["path"]).stamp) == known["stamp"]:
                found.append(Path(known["path"]))
    return sorted(found)


def cache_folder() -> Path:
    """Where things that can be recomputed are kept: ``$ALKAHEST_CACHE`` or the system's cache folder."""
    if override := os.environ.get("ALKAHEST_CACHE"):
        return Path(override)
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "alkahest"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alkahest"


def _hash_entry(reader: Reader) -> Path:
    name = hashlib.blake2b(os.fsencode(reader.path.resolve()), digest_size=16).hexdigest()
    return cache_folder() / "blake3" / f"{name}.json"


def _remembered(reader: Reader) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(_hash_entry(reader).read_text())
        if known["stamp"] == list(reader.stamp):
            return str(known["blake3"])
    return ""


def _remember(reader: Reader, digest: str) -> None:
    reader.check_unchanged()
    # A file younger than the clock's grain could still change without changing its time.
    if time.time() - reader.stamp[1] / 1e9 < _RACY_SECONDS:
        return
    value = {"path": str(reader.path.resolve()), "stamp": list(reader.stamp), "blake3": digest}
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        entry = _hash_entry(reader)
        entry.parent.mkdir(parents=True, exist_ok=True)
        scratch = entry.with_suffix(f".{uuid.uuid4().hex[:8]}")
        scratch.write_text(json.dumps(value))
        os.replace(scratch, entry)

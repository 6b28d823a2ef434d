"""Content hashes of files, remembered between runs."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from alkahest.errors import AlkahestError
from alkahest.files import cache
from alkahest.files.reader import Reader

_HASH = re.compile(r"[0-9a-f]{64}")
_RACY_SECONDS = 2.0
_HASH_CHUNK = 4 << 20
_QUICKLY_HASHED = 256 << 20  # bytes: a quarter of a second


def blake3_of(readers: Sequence[Reader], cancelled: threading.Event | None = None, *, anew: bool = False) -> list[str]:
    """BLAKE3 of each file as 64 hex digits, remembered in the user's cache folder by size, times and place.

    With ``anew`` every byte is read, whatever is remembered: rot of a disk changes no times.

    Several files are read side by side, so that a merge that reads them too finds the same pages in
    memory. Setting ``cancelled`` makes it return early, with empty strings for what is not known.
    """
    from blake3 import blake3

    digests = ["" if anew else _recall(reader) for reader in readers]
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
        _keep(readers[index], digests[index])
    return digests


def known_paths(digest: str) -> list[Path]:
    """Paths at which a file with this BLAKE3 was seen before and still stands unchanged."""
    found = []
    for entry in (cache.cache_folder() / "blake3").glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AlkahestError):
            known = cache.load("blake3", entry.stem)
            ours = known["format"] == cache.KINDS["blake3"].format()
            if ours and known["blake3"] == digest and list(Reader(known["path"]).full_stamp) == known["stamp"]:
                found.append(Path(known["path"]))
    return sorted(found)


def identity(reader: Reader) -> str | None:
    """What stands for a file's content: its BLAKE3 where known or quick to find, else its path, size and time.

    None for a file so young that it could still change without changing its time.
    """
    if reader.size <= _QUICKLY_HASHED or _recall(reader):
        return blake3_of([reader])[0]
    return None if _is_young(reader) else f"{reader.path.resolve()} {reader.full_stamp}"


def _entry(reader: Reader) -> str:
    return hashlib.blake2b(os.fsencode(reader.path.resolve()), digest_size=16).hexdigest()


def _recall(reader: Reader) -> str:
    with contextlib.suppress(KeyError, TypeError):
        known = cache.load("blake3", _entry(reader))
        same = known["stamp"] == list(reader.full_stamp) and known["format"] == cache.KINDS["blake3"].format()
        if same and _HASH.fullmatch(known["blake3"]):
            return str(known["blake3"])
    return ""


def _keep(reader: Reader, digest: str) -> None:
    reader.check_unchanged()
    if not _is_young(reader):
        value = {
            "path": str(reader.path.resolve()),
            "stamp": list(reader.full_stamp),
            "blake3": digest,
            "format": cache.KINDS["blake3"].format(),
        }
        cache.store("blake3", _entry(reader), value)


def _is_young(reader: Reader) -> bool:
    """Whether the file is younger than the clock's grain: it could still change without changing its time."""
    return time.time() - max(reader.full_stamp[1], reader.full_stamp[3]) / 1e9 < _RACY_SECONDS

"""Files on disk, read by position from any thread.

What depends on the operating system is here and in `atomic`, each with a fallback.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import weakref
from pathlib import Path
from typing import Any

from alkahest.errors import FileFormatError, reason

HAS_POSITIONAL = hasattr(os, "preadv") and hasattr(os, "pwrite")
_AHEAD = 16 << 20  # bytes that are asked for beforehand
_LONG = 1 << 18  # a read of so many bytes may be one of many
# Bytes that a processor's cache takes and gives together. Measured: a copy from or to the page cache is up to six times
# as fast where buffer and file lie alike in them.
LINE = 64


class Reader:
    """Reads byte ranges of one file from any thread.

    The file is opened on first use and stays the same file even if its name is reused.

    >>> reader = Reader("a.safetensors"); reader.read(0, 8)
    b'...'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise FileFormatError("open", reason(error), file=path, fix="check the path") from None
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise FileFormatError("open", "this is not a regular file", file=path, fix="name a file")
        self.size = status.st_size
        self.stamp = _stamp(status)
        self.full_stamp = (*self.stamp, status.st_ctime_ns)  # which nobody can put back
        self._descriptor: int | None = None
        self._lock = threading.Lock()
        self._asked = threading.local()

    def read(self, offset: int, count: int) -> bytes:
        buffer = bytearray(count)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` with the bytes at ``offset``; FileFormatError if the file has shrunk."""
        descriptor = self._open()
        if len(view) >= _LONG:
            self._read_ahead(descriptor, offset + len(view))
        done = 0
        while done < len(view):
            try:
                if HAS_POSITIONAL:
                    count = os.preadv(descriptor, [view[done:]], offset + done)
                else:
                    with self._lock:
                        os.lseek(descriptor, offset + done, os.SEEK_SET)
                        chunk = os.read(descriptor, len(view) - done)
                    count = len(chunk)
                    view[done : done + count] = chunk
            except OSError as error:
                raise FileFormatError("read", reason(error), file=self.path, fix="check the disk") from None
            if count == 0:
                raise FileFormatError(
                    "read",
                    "the file ended early",
                    file=self.path,
                    expected=f"{offset + len(view):,} bytes",
                    found=f"{offset + done:,} bytes",
                    fix="another program shortened it; restore it and open it again",
                )
            done += count

    def _read_ahead(self, descriptor: int, end: int) -> None:
        """Have the system read what comes next, if this thread has read what comes before.

        It does so by itself for one thread; where several read one file in turns it takes them for random
        and reads piece by piece. Measured: three times as fast from a disk, with a quarter of the processor.
        """
        asked = getattr(self._asked, "end", None)
        if asked is None or not asked - 2 * _AHEAD <= end <= asked + _AHEAD:
            self._asked.end = end  # another place: what follows will show
        elif end > asked - _AHEAD // 2 and hasattr(os, "posix_fadvise"):
            self._asked.end = end + _AHEAD
            with contextlib.suppress(OSError):
                os.posix_fadvise(descriptor, asked, self._asked.end - asked, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        """Raise FileFormatError if the file was written to since it was opened."""
        now = os.fstat(self._descriptor) if self._descriptor is not None else _stat_or_none(self.path)
        if now is None or (*_stamp(now), now.st_ctime_ns) != self.full_stamp:
            fix = "open it again; a file that is moved or linked while it is read counts as changed too"
            raise FileFormatError("read", "the file changed after it was opened", file=self.path, fix=fix)

    def _open(self) -> int:
        if self._descriptor is None:
            with self._lock:
                if self._descriptor is None:
                    try:
                        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
                        descriptor = os.open(self.path, flags)
                    except OSError as error:
                        raise FileFormatError("open", reason(error), file=self.path) from None
                    weakref.finalize(self, os.close, descriptor)
                    self._descriptor = descriptor
                    self.check_unchanged()
        return self._descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "size": self.size, "stamp": self.stamp, "full_stamp": self.full_stamp}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _descriptor=None, _lock=threading.Lock(), _asked=threading.local())


def same_file(a: Path, b: Path) -> bool:
    """Whether two paths are one file, also through symbolic and hard links."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False


def size_text(nbytes: int) -> str:
    """A size as people read it: ``12.31 GB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes} bytes"


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return (status.st_size, status.st_mtime_ns, status.st_ino)


def _stat_or_none(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None

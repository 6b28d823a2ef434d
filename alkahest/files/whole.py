"""Output that appears whole or not at all: a file or folder written beside its place and moved there at the end."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from alkahest.errors import AlkahestError, OutputError, reason
from alkahest.files.reader import HAS_POSITIONAL

PARTIAL = ".alkahest-partial"
_GUARD = f".guard{PARTIAL}"
_SYNC_EVERY = 256 << 20
_TRIES = 20


class Writer:
    """Writes byte ranges of one new file from any thread, and hands them to the disk as it goes."""

    def __init__(self, path: Path, size: int, target: Path | None = None) -> None:
        self.target = target or path  # the name that errors show
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        self.path = path
        self._descriptor = os.open(path, flags, 0o666)
        self._lock = threading.Lock()
        self._unsynced = 0
        self._syncing = threading.Lock()
        self._failure: OSError | None = None
        try:
            _reserve(self._descriptor, size)
        except OSError:
            self.close()
            raise

    def lock(self) -> bool:
        """Mark the file as being written, until it is closed, for `remove_leftovers`."""
        return _lock_file(self._descriptor) and self.path.exists()

    def write(self, data: memoryview | bytes, offset: int) -> None:
        view = memoryview(data)
        total = len(view)
        with as_output_error(self.target):
            while len(view):
                if HAS_POSITIONAL:
                    count = os.pwrite(self._descriptor, view, offset)
                else:
                    with self._lock:
                        os.lseek(self._descriptor, offset, os.SEEK_SET)
                        count = os.write(self._descriptor, view)
                view, offset = view[count:], offset + count
        self._write_back(total)

    def _write_back(self, count: int) -> None:
        # Without this the kernel keeps gigabytes of dirty pages and the whole wait comes at the end.
        with self._lock:
            self._unsynced += count
            due = self._unsynced >= _SYNC_EVERY
            if due:
                self._unsynced = 0
        if due and self._syncing.acquire(blocking=False):
            threading.Thread(target=self._sync_once, daemon=True).start()

    def _sync_once(self) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError as error:  # the kernel reports a failed write-back once only
            self._failure = error
        finally:
            self._syncing.release()

    def sync(self) -> None:
        """Wait until every byte is on disk; OSError if any write-back failed."""
        with self._syncing:
            os.fsync(self._descriptor)
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        with self._syncing:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1


@contextlib.contextmanager
def whole_file(target: Path, size: int) -> Iterator[Writer]:
    """Write a file beside ``target`` and move it there once every byte is on disk.

    On any exception, Ctrl-C included, ``target`` is as it was and the partial file is gone.
    Partial files that a killed run left in the folder are removed first.
    Raises OutputError if the folder is missing, read-only or has less than ``size`` bytes free.
    """
    with as_output_error(target):
        target = _checked_target(target, size)
        is_folder = target.is_dir()
    if is_folder:
        raise OutputError("save", "the output is an existing folder", file=target, fix="name a file")
    if target.exists() and not target.is_file():
        raise OutputError(
            "save", "the output is not a regular file", file=target, found=_kind_of(target), fix="name another file"
        )
    partial = _partial_name(target)
    writer: Writer | None = None
    try:
        with as_output_error(target):
            for tried in range(_TRIES):
                writer = Writer(partial, size, target)
                if writer.lock():
                    break
                writer.close()  # another save took it for a leftover, before it was locked
                partial = _partial_name(target)
                if tried == _TRIES - 1:
                    raise OutputError("save", "other runs remove the partial file", file=target, fix="run it again")
        assert writer is not None
        yield writer
        with as_output_error(target):
            writer.sync()
            if os.name == "nt":  # which renames no open file; elsewhere the lock holds until the file has its name
                writer.close()
            os.replace(partial, target)
            _sync_folder(target.parent)
    finally:
        if writer is not None:
            writer.close()
        partial.unlink(missing_ok=True)


def write_file(target: Path, data: bytes) -> None:
    """Write a small file by `whole_file`: all of it or nothing."""
    with whole_file(target, len(data)) as writer:
        writer.write(data, 0)


def write_text(target: Path, text: str) -> None:
    """Write text as UTF-8 by `whole_file`, with what UTF-8 cannot hold, of strangers' names, spelled out."""
    write_file(target, text.encode(errors="backslashreplace"))


@contextlib.contextmanager
def whole_folder(target: Path, size: int) -> Iterator[Path]:
    """Fill a new folder beside ``target`` and rename it to ``target`` at the end.

    ``target`` must not exist yet, or be an empty folder: a full one cannot be swapped in one step.
    """
    with as_output_error(target):
        target = _checked_target(target, size)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError("save", "the output folder exists and is not empty", file=target, fix="name a new folder")
    partial = _partial_name(target)
    guard: Writer | None = None
    try:
        with as_output_error(target):
            partial.mkdir()
            guard = Writer(partial / _GUARD, 0)
            guard.lock()
        yield partial
        with as_output_error(target):
            guard.close()
            guard.path.unlink()
            _sync_folder(partial)
            if target.exists():
                target.rmdir()
            os.replace(partial, target)
            _sync_folder(target.parent)
    finally:
        if guard is not None:
            guard.close()
        shutil.rmtree(partial, ignore_errors=True)


def replaced(target: Path) -> list[str]:
    """That an output takes the place of a file, in words; asked before it is written.

    A file is replaced and not refused: scripts and notebooks run again, the old one stays until the new one is
    whole, and the recipe in what Alkahest wrote makes it again. A folder that is not empty is refused: nobody can tell
    whose the other files in it are.
    """
    try:
        size = target.stat().st_size
    except OSError:
        return []
    if target.is_dir():  # refused if there is anything in it
        return []
    return [f"replaced the file of that name ({size:,} bytes): {target}"]


def require_free(folder: Path, size: int, target: Path) -> None:
    """Raise OutputError unless ``folder``'s disk has ``size`` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OutputError(
            "save",
            "the disk is too small",
            file=target,
            expected=f"{size:,} bytes free",
            found=f"{free:,} bytes free",
            fix="free some space, save elsewhere, or use a smaller dtype",
        )


def remove_leftovers(folder: Path) -> None:
    """Delete partial outputs in ``folder`` whose writer is no longer running."""
    for path in folder.glob(f".*{PARTIAL}"):
        with contextlib.suppress(OSError):  # another save may be clearing up too
            if path.is_symlink():  # none of ours
                continue
            guard = path / _GUARD if path.is_dir() else path
            # A folder just made or about to be renamed has no guard yet, or no longer.
            young = not guard.exists() and time.time() - path.stat().st_mtime < 60
            if young:
                continue
            with _held_if_abandoned(guard) as abandoned:  # while it is removed nobody can take it for their own
                if abandoned and path.is_dir():
                    shutil.rmtree(path)
                elif abandoned:
                    path.unlink()


@contextlib.contextmanager
def as_output_error(target: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into an OutputError that says what to do."""
    fixes = {
        errno.ENOSPC: "free some space and run it again",
        errno.EACCES: "choose a folder you may write to",
        errno.EPERM: "choose a folder you may write to",
        errno.EROFS: "choose a folder you may write to",
        errno.EDQUOT: "free some of your quota",
        errno.EISDIR: "name a file, not a folder",
        errno.ENAMETOOLONG: "use a shorter name",
    }
    try:
        yield
    except OSError as error:
        fix = fixes.get(error.errno or 0, "check the disk")
        raise OutputError("save", reason(error), file=target, fix=fix) from None


def _checked_target(target: Path, size: int) -> Path:
    # Through a symbolic link the file it names is replaced, not the link.
    target = Path(os.path.realpath(target))
    if target.parent.exists() and not target.parent.is_dir():
        raise OutputError("save", "the output's folder is a file", file=target.parent, fix="name a folder")
    if not target.parent.is_dir():
        raise OutputError("save", "the output folder does not exist", file=target.parent, fix="create it first")
    remove_leftovers(target.parent)
    require_free(target.parent, size, target)
    return target


def _kind_of(path: Path) -> str:
    """What a path is that is no regular file, in words."""
    mode = path.stat().st_mode
    kinds = {"a pipe": stat.S_ISFIFO, "a device": stat.S_ISCHR, "a disk": stat.S_ISBLK, "a socket": stat.S_ISSOCK}
    return next((name for name, is_it in kinds.items() if is_it(mode)), "something else")


@contextlib.contextmanager
def only_one(folder: Path, operation: str) -> Iterator[None]:
    """Hold a folder for one process at a time; AlkahestError if another is at work in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        if not _lock_file(file.fileno()):
            raise AlkahestError(
                operation,
                "another process is at work in this folder",
                file=folder,
                fix="wait until it has ended, or name another folder",
            )
        yield


def _partial_name(target: Path) -> Path:
    # 255 bytes is the longest name that common file systems take.
    stem = os.fsencode(target.name)[:200].decode(errors="ignore")
    return target.with_name(f".{stem}.{uuid.uuid4().hex[:8]}{PARTIAL}")


def _reserve(descriptor: int, size: int) -> None:
    """Give an empty file its size, with its place on the disk where the file system can reserve it.

    Measured on ext4: writes from several threads then take a third of the time and a quarter of the processor, because
    nothing is allocated under the file's lock. Not `os.posix_fallocate`, which elsewhere writes into every block.
    """
    reserve = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None) if sys.platform == "linux" else None
    if reserve is not None and size and reserve(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(code, os.strerror(code))
    os.ftruncate(descriptor, size)


@contextlib.contextmanager
def _held_if_abandoned(path: Path) -> Iterator[bool]:
    """Whether nobody holds the lock that a running writer keeps on its partial file; held meanwhile if so."""
    try:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        yield True
        return
    except OSError:
        yield False
        return
    try:
        yield _lock_file(descriptor)
    finally:
        os.close(descriptor)


def _lock_file(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: an open file cannot be deleted, which protects it as well
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems do not sync folders
    finally:
        os.close(descriptor)

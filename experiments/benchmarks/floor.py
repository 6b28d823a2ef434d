"""The floor of each job: the same bytes through the same chunks, threads and fsync, with nothing in between."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from measured import run_job

from alkahest.engine.readable import Workspace
from alkahest.engine.workers import BLOCK
from alkahest.files.reader import LINE, Reader
from alkahest.files.whole import Writer

CHUNK = 2 * BLOCK  # bytes: a block of a bf16 file, as ours reads it


def prepare() -> None:
    """Everything is imported."""


def merge(folder: Path, threads: int) -> None:
    """Read bridge, variant and base side by side, and write as many bytes as the bridge has."""
    readers = [Reader(folder / f"{name}.safetensors") for name in ("bridge", "variant", "base")]
    first = 8 + int.from_bytes(readers[0].read(0, 8), "little")
    size = min(reader.size for reader in readers) - first
    (folder / "out.safetensors").unlink(missing_ok=True)
    writer = Writer(folder / "out.safetensors", LINE + size)
    local = threading.local()

    def copy(start: int) -> None:
        if not hasattr(local, "workspace"):
            local.workspace = Workspace(torch.device("cpu"))
        count = min(CHUNK, size - start)
        for reader in readers:
            with local.workspace.raw(count, first + start) as raw:
                reader.read_into(raw.numpy().data, first + start)
        with local.workspace.raw(count, LINE + start) as raw:
            writer.write(raw.numpy().data, LINE + start)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(copy, range(0, size, CHUNK)))
    writer.sync()
    writer.close()


def read(folder: Path, threads: int) -> None:
    """Read variant and base from end to end, the same part of each at the same time, as delta_table does."""
    readers = [Reader(folder / f"{name}.safetensors") for name in ("variant", "base")]
    size = min(reader.size for reader in readers)
    step = -(-size // (64 * threads))

    def part(start: int) -> None:
        workspace, end = Workspace(torch.device("cpu")), min(start + step, size)
        for offset in range(start, end, CHUNK):
            for reader in readers:
                with workspace.raw(min(CHUNK, end - offset), offset) as raw:
                    reader.read_into(raw.numpy().data, offset)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, range(0, size, step)))


def one_pass(folder: Path, threads: int) -> None:
    """Copy one set of parameters over another in memory: those that LiveModel.set rewrites."""
    for parameter, value in _PARAMETERS:
        parameter.copy_(value)


_PARAMETERS: list[tuple[object, object]] = []


def prepare_pass() -> None:
    import alkahest as ak

    torch.set_num_threads(int(sys.argv[3]))
    base = ak.open(Path(sys.argv[2]) / "base.safetensors")
    for key in base.part("layers"):
        value = base[key]
        _PARAMETERS.append((torch.zeros_like(value).fill_(1), value))


if __name__ == "__main__":
    run_job({"merge": (prepare, merge), "read": (prepare, read), "pass": (prepare_pass, one_pass)})

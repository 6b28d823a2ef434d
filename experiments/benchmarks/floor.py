"""The floor of each job: the same bytes through the same chunks, threads and fsync, with nothing in between."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from measured import run_job

CHUNK = 2 << 20  # bytes: a block of a bf16 file, as ours reads it


def prepare() -> None:
    import torch  # noqa: F401

    import alkahest.files  # noqa: F401


def merge(folder: Path, threads: int) -> None:
    """Read bridge, variant and base side by side, and write as many bytes as the bridge has."""
    import torch

    from alkahest.files import Reader, Writer

    readers = [Reader(folder / f"{name}.safetensors") for name in ("bridge", "variant", "base")]
    size = min(reader.size for reader in readers)
    (folder / "out.safetensors").unlink(missing_ok=True)
    writer = Writer(folder / "out.safetensors", size)
    local = threading.local()

    def copy(start: int) -> None:
        if not hasattr(local, "buffer"):
            # Aligned as ours is: copying to a bytearray takes six times as long on some processors.
            local.buffer = memoryview(torch.empty(CHUNK, dtype=torch.uint8).numpy())
        view = local.buffer[: min(CHUNK, size - start)]
        for reader in readers:
            reader.read_into(view, start)
        writer.write(view, start)

    # From the first tensor on, as ours does: writes at multiples of 2 MB are several times slower on some kernels.
    header = 8 + int.from_bytes(readers[0].read(0, 8), "little")
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(copy, range(header, size, CHUNK)))
    writer.sync()
    writer.close()


def read(folder: Path, threads: int) -> None:
    """Read variant and base from end to end, the same part of each at the same time, as delta_table does."""
    files = [os.open(folder / f"{name}.safetensors", os.O_RDONLY) for name in ("variant", "base")]
    size = os.fstat(files[0]).st_size
    step = -(-size // (64 * threads))

    def part(start: int) -> None:
        buffer = bytearray(CHUNK)
        for offset in range(start, min(start + step, size), CHUNK):
            for file in files:
                os.preadv(file, [memoryview(buffer)[: min(CHUNK, size - offset)]], offset)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, range(0, size, step)))


def one_pass(folder: Path, threads: int) -> None:
    """Copy one set of parameters over another in memory: those that LiveModel.set rewrites."""
    for parameter, value in _PARAMETERS:
        parameter.copy_(value)


_PARAMETERS: list[tuple[object, object]] = []


def prepare_pass() -> None:
    import sys

    import torch

    import alkahest as ak

    torch.set_num_threads(int(sys.argv[3]))
    base = ak.open(Path(sys.argv[2]) / "base.safetensors")
    for key in base.part("layers"):
        value = base[key]
        _PARAMETERS.append((torch.zeros_like(value).fill_(1), value))


if __name__ == "__main__":
    run_job({"merge": (prepare, merge), "read": (prepare, read), "pass": (prepare_pass, one_pass)})

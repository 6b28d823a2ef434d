"""Time and memory of ``delta_table`` on made-up files of real width, beside reading both files.

    python experiments/benchmarks/diff.py --layers 30 --rounds 1
    python experiments/benchmarks/diff.py --layers 30 --folder /a/folder/with/base.safetensors/and/variant.safetensors

Ours and the floor run in turns, each in a fresh process, with the same threads and chunk size; what
counts is their ratio. The floor reads every byte of both files, side by side, and does nothing with
them. Two files of 12.3 GB do not fit a 24 GB machine's memory, so that both read from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from merge import measure

import alkahest as ak

CHUNK = 2 << 20  # bytes: as many as a block of delta_table reads of a bf16 file


def read_both(folder: Path, threads: int) -> None:
    """Both files from end to end, the same part of each at the same time, as delta_table reads them."""
    files = [os.open(folder / f"{name}.safetensors", os.O_RDONLY) for name in ("variant", "base")]
    size = os.fstat(files[0]).st_size
    step = -(-size // (64 * threads))

    def read(start: int) -> None:
        buffer = bytearray(CHUNK)
        for offset in range(start, min(start + step, size), CHUNK):
            for file in files:
                os.preadv(file, [memoryview(buffer)[: min(CHUNK, size - offset)]], offset)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(0, size, step)))


def ours(folder: Path, threads: int) -> None:
    variant, base = (ak.open(folder / f"{name}.safetensors") for name in ("variant", "base"))
    ak.delta_table(variant - base, threads=threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the two files are, or shall be made and kept")
    parser.add_argument("--only", choices=("ours", "floor"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        if options.only == "ours":
            import pandas  # noqa: F401 - starting Python is not what is measured
            import torch  # noqa: F401

        work = ours if options.only == "ours" else read_both
        print(json.dumps(measure(lambda: work(options.folder, options.threads))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        for name, delta in (("base", 0.0), ("variant", 0.02)):
            if not (folder / f"{name}.safetensors").exists():
                ak.made_up(layers=options.layers, delta=delta).save(folder / f"{name}.safetensors")
        size = (folder / "base.safetensors").stat().st_size
        print(f"{platform.processor() or platform.machine()}, {options.threads} threads, 2 x {size / 1e9:.2f} GB")
        found: dict[str, list[dict[str, float]]] = {"floor": [], "ours": []}
        with tempfile.TemporaryDirectory() as cache:
            for number in range(options.rounds):
                for name in found:
                    # A cache of its own for each run: a remembered table would be no measurement.
                    environment = {**os.environ, "ALKAHEST_CACHE": f"{cache}/{number}", "OMP_NUM_THREADS": "1"}
                    command = [sys.executable, __file__, "--only", name, "--folder", str(folder), "--threads", str(options.threads)]  # fmt: skip
                    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                    found[name].append(json.loads(done.stdout))
                    print(f"{name:6}", {key: round(value, 2) for key, value in found[name][-1].items()}, flush=True)
        ratios = [a["wall"] / b["wall"] for a, b in zip(found["ours"], found["floor"], strict=True)]
        print(f"ours / floor: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()

"""Time and memory of ``a + k*(b - c)`` on made-up files of real width, beside the floor.

    python experiments/benchmarks/merge.py --layers 1 --rounds 5
    python experiments/benchmarks/merge.py --layers 30 --rounds 1 --mixed

The floor reads the same inputs and writes the same number of bytes with the same chunk size,
threads and fsync, and does nothing in between. Ours and the floor run in turns, each in a fresh
process, so that both meet the same machine; what counts is their ratio. ``--mixed`` makes the
variant a sharded diffusers folder and the base scaled fp8, as real collections are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

K = 171.1


def anonymous_mb() -> float:
    """VmRSS less file-backed pages, of this process, in MB (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit("RssAnon needs Linux")


def measure(work) -> dict[str, float]:
    """Wall seconds, CPU seconds and peak anonymous memory of a call."""
    peak, stop = [anonymous_mb()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    result = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    stop.set()
    watcher.join()
    return result | {"peak_mb": peak[0]}


def inputs(folder: Path, mixed: bool) -> list[Path]:
    names = ["bridge.safetensors", "variant" if mixed else "variant.safetensors", "base.safetensors"]
    return [folder / name for name in names]


def make(folder: Path, layers: int, mixed: bool) -> None:
    import alkahest as ak

    bridge, variant, base = inputs(folder, mixed)
    ak.made_up(layers=layers, seed=1).save(bridge)
    shards = {"layout": "diffusers", "max_shard_size": "5GB"} if mixed else {}
    ak.made_up(layers=layers, delta=0.02).save(variant, **shards)
    ak.made_up(layers=layers).save(base, dtype="comfy_quant" if mixed else None)


def ours(folder: Path, mixed: bool) -> None:
    import alkahest as ak

    bridge, variant, base = (ak.open(path) for path in inputs(folder, mixed))
    merged = bridge.protect("refiner") + K * (variant - base)
    merged.save(folder / "out.safetensors", dtype="bf16")


def floor(folder: Path, mixed: bool) -> None:
    """Read the inputs side by side and write one output of the bridge's size."""
    import torch

    from alkahest.files import Reader, Writer
    from alkahest.options import Options
    from alkahest.work import BLOCK

    files = [
        [Reader(p) for p in (sorted(path.glob("*.safetensors")) if path.is_dir() else [path])]
        for path in inputs(folder, mixed)
    ]
    target = folder / "out.safetensors"
    target.unlink(missing_ok=True)
    size, chunk = files[0][0].size, BLOCK * 2
    writer = Writer(target, size)
    local = threading.local()

    def copy(start: int) -> None:
        if not hasattr(local, "buffer"):
            # Aligned as ours is: copying to a bytearray takes six times as long on some processors.
            local.buffer = memoryview(torch.empty(2 * chunk, dtype=torch.uint8).numpy())
        for readers in files:
            total = sum(reader.size for reader in readers)
            begin, end = start * total // size, min(start + chunk, size) * total // size
            for reader in readers:
                count = min(end, reader.size) - begin
                if begin >= 0 and count > 0:
                    reader.read_into(local.buffer[:count], begin)
                begin, end = max(begin - reader.size, 0), end - reader.size
        writer.write(local.buffer[: min(chunk, size - start)], start)

    # From the first tensor on, as ours does: writes at multiples of 2 MB are several times slower on some kernels.
    header = 8 + int.from_bytes(files[0][0].read(0, 8), "little")
    with ThreadPoolExecutor(Options().worker_count()) as pool:
        list(pool.map(copy, range(header, size, chunk)))
    writer.sync()
    writer.close()


def in_fresh_process(what: str, folder: Path, mixed: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--run", what, "--folder", str(folder), *(["--mixed"] if mixed else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    (folder / "out.safetensors").unlink()
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mixed", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    parser.add_argument("--run", choices=["ours", "floor"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        import torch  # noqa: F401  (its import is not part of the job)

        import alkahest.stream  # noqa: F401

        work = {"ours": ours, "floor": floor}[options.run]
        print(json.dumps(measure(lambda: work(options.folder, options.mixed))))
        return
    folder = options.folder or Path(tempfile.mkdtemp(prefix="alkahest-benchmark-"))
    folder.mkdir(exist_ok=True, parents=True)
    try:
        need = 4 * 2 * (727_598_656 + options.layers * 180_910_336)
        free = shutil.disk_usage(folder).free
        if free < need * 1.05:
            raise SystemExit(f"{need / 1e9:.1f} GB needed in {folder}, {free / 1e9:.1f} GB free: use fewer --layers")
        if not all(path.exists() for path in inputs(folder, options.mixed)):
            make(folder, options.layers, options.mixed)
        report(folder, options.rounds, options.mixed)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)


def report(folder: Path, rounds: int, mixed: bool) -> None:
    size = inputs(folder, mixed)[0].stat().st_size / 1e9
    first = in_fresh_process("ours", folder, mixed)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {size:.2f} GB a file, {rounds} round(s)"
    )
    print("first run, hashing the inputs too: wall {wall:.1f} s, CPU {cpu:.1f} s, {peak_mb:.0f} MB".format(**first))
    rows: dict[str, list[dict[str, float]]] = {"floor": [], "ours": []}
    for number in range(rounds):
        for what in ("floor", "ours") if number % 2 == 0 else ("ours", "floor"):
            rows[what].append(in_fresh_process(what, folder, mixed))
    for what, runs in rows.items():
        wall, cpu = (min(run[name] for run in runs) for name in ("wall", "cpu"))
        walls = " ".join(f"{run['wall']:.1f}" for run in runs)
        peak = max(run["peak_mb"] for run in runs)
        print(f"{what:6} wall {wall:6.2f} s (all: {walls})  CPU {cpu / size:5.2f} s/GB  peak {peak:.0f} MB anonymous")
    best = {what: min(run["wall"] for run in runs) for what, runs in rows.items()}
    print(f"ours / floor, wall: {best['ours'] / best['floor']:.2f} of the best rounds")
    ratios = [a["wall"] / b["wall"] for a, b in zip(rows["ours"], rows["floor"], strict=True)]
    print(f"round by round: median {statistics.median(ratios):.2f} ({' '.join(f'{r:.2f}' for r in ratios)})")


if __name__ == "__main__":
    main()

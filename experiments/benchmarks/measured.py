"""What a piece of work costs: wall and processor seconds, and peak memory of the process, anonymous and mapped.

Nothing but the standard library, so that every tool's own Python can use it (Linux only: it reads /proc).
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path


def resident_mb() -> tuple[float, float]:
    """Anonymous and file-backed resident memory of this process, in MB."""
    found = {"RssAnon": 0.0, "RssFile": 0.0}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in found:
            found[name] = int(value.split()[0]) * 1024 / 1e6
    return found["RssAnon"], found["RssFile"]


def cpu_seconds() -> float:
    """Processor time of this process and of those that it started and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(work: Callable[[], object]) -> dict[str, float]:
    """Run ``work`` once: ``wall`` and ``cpu`` seconds, peak ``anon`` and ``mapped`` memory in MB."""
    peak, stop = list(resident_mb()), threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            for number, value in enumerate(resident_mb()):
                peak[number] = max(peak[number], value)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    wall, cpu = time.perf_counter(), cpu_seconds()
    work()
    found = {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}
    stop.set()
    watcher.join()
    return {**found, "anon": peak[0], "mapped": peak[1]}


def forget(folder: Path) -> None:
    """Have the system drop a folder's files from its page cache, as after a fresh start."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_job(jobs: dict[str, tuple[Callable[[], object], Callable[[Path, int], object]]]) -> None:
    """The command line of a process that runs one job: NAME FOLDER THREADS; prints what it cost as JSON.

    A job is what it imports and prepares, which is not measured, and its work.
    """
    name, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    prepare, work = jobs[name]
    prepare()
    print(json.dumps(measure(lambda: work(folder, threads))))

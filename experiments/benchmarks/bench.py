"""Every claim of speed, measured beside the other tools and the floor: `make bench`.

    python experiments/benchmarks/bench.py                    # all sizes but the full one; an hour on two cores
    python experiments/benchmarks/bench.py --full             # and 12.3 GB a file, for ours and the floor; 50 GB of
    disk python experiments/benchmarks/bench.py --layers 1 --rounds 1 --only merge

Made-up files of true shapes. Each run is a fresh process; the tools take turns, round by round, so that all meet the
same machine, with warm page cache and (merges) with cold. The other tools are installed into a venv of their own. What
comes out is results/bench.csv, one row a run, the table in README.md, and results/bench.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from measured import forget

import alkahest as ak

HERE = Path(__file__).resolve().parent
PEERS = ("mergekit==0.1.5", "sd-mecha==1.1.8", "peft==0.21.2")
SIZES = {"0.4 GB": (1, 1792), "1.8 GB": (1, 3840), "2.9 GB": (4, 3840), "12.3 GB": (30, 3840)}  # layers and width


@dataclass(frozen=True)
class Tool:
    """A job of a script, by its name there; the other tools' run in their own Python."""

    name: str
    script: str
    job: str


TOOLS = {
    "merge": [
        Tool("floor", "floor.py", "merge"),
        Tool("alkahest", "ours.py", "merge"),
        Tool("torch", "peers.py", "torch"),
        Tool("mergekit", "peers.py", "mergekit"),
        Tool("sd-mecha", "peers.py", "sd-mecha"),
    ],
    "table": [Tool("floor", "floor.py", "read"), Tool("alkahest", "ours.py", "table")],
    "lora": [
        Tool("alkahest", "ours.py", "lora"),
        Tool("torch.linalg.svd", "peers.py", "svd"),
        Tool("peft", "peers.py", "peft"),
    ],
    "open": [Tool("alkahest", "ours.py", "open")],
    "live": [Tool("floor", "floor.py", "pass"), Tool("alkahest", "ours.py", "live")],
    "import": [Tool("torch", "ours.py", "import torch"), Tool("alkahest", "ours.py", "import")],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also 12.3 GB a file, for ours and the floor")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "alkahest-bench", help="for the files"
    )
    parser.add_argument("--peers", type=Path, help="a Python that has the other tools; a venv is made without it")
    parser.add_argument("--only", choices=list(TOOLS), nargs="*", default=list(TOOLS))
    parser.add_argument("--sizes", choices=list(SIZES), nargs="*", default=list(SIZES)[:3])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--keep", action="store_true", help="keep the files")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    python = options.peers or peers_python(options.folder)
    rows: list[dict[str, object]] = []
    try:
        for size in [*options.sizes, *(["12.3 GB"] if options.full else [])]:
            rows += measured_at(size, options, python)
            if not options.keep:
                shutil.rmtree(place(options.folder, size))
    finally:
        if rows:
            from report import write

            write(pd.DataFrame(rows), machine(options.threads), options.results)


def place(folder: Path, size: str) -> Path:
    return folder / size.replace(" ", "")  # mergekit cannot read a path with a space in it


def measured_at(size: str, options: argparse.Namespace, python: Path) -> list[dict[str, object]]:
    folder = place(options.folder, size)
    layers, width = SIZES[size]
    make(folder, layers, width)
    stored = (folder / "bridge.safetensors").stat().st_size / 1e9
    rows = []
    for what in options.only:
        if what in ("open", "import") and size != options.sizes[-1]:
            continue
        tools = [tool for tool in TOOLS[what] if size != "12.3 GB" or tool.script != "peers.py"]
        rounds = options.rounds
        if what == "lora" and size == "12.3 GB":
            tools, rounds = [Tool("alkahest, all layers", "ours.py", "whole lora")], 1
        elif what in ("lora", "live") and size != "2.9 GB":
            continue
        for cache in caches(what, stored):
            # What is read is in the page cache from here on, and ours has hashed its inputs, which it does once.
            for tool in tools[:2]:
                cost = run(tool, folder, options.threads, python)
                if what == "merge" and cache != "warm" and tool.name == "alkahest":
                    rows.append(
                        {
                            "what": what,
                            "size": size,
                            "GB": stored,
                            "cache": "first time",
                            "round": 0,
                            "tool": tool.name,
                            **cost,
                        }
                    )
            for number in range(rounds):
                for tool in turns(tools, number):
                    if cache == "cold":
                        forget(folder)
                    cost = run(tool, folder, options.threads, python)
                    rows.append(
                        {
                            "what": what,
                            "size": size,
                            "GB": stored,
                            "cache": cache,
                            "round": number,
                            "tool": tool.name,
                            **cost,
                        }
                    )
                    print(
                        f"{size} {what} {cache} {tool.name:17}",
                        {name: round(value, 2) for name, value in cost.items()},
                        flush=True,
                    )
    return rows


def caches(what: str, size: float) -> list[str]:
    """With what in the page cache a job is measured: its inputs, nothing, or nothing because they do not fit there."""
    if what not in ("merge", "table"):
        return ["warm"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return ["cold", "warm"] if 4 * size < memory else ["cold"]


def turns(tools: list[Tool], number: int) -> list[Tool]:
    """One round: floor and ours, which are quick, before each of the others, and every second time the other way
    round.
    """
    first, others = tools[:2], tools[2:] or [None]
    order = []
    for turn, other in enumerate(others, number):
        order += [*(first if turn % 2 == 0 else first[::-1]), *([other] if other else [])]
    return order


def run(tool: Tool, folder: Path, threads: int, python: Path) -> dict[str, float]:
    """What one run costs, in a process of its own whose caches are empty but for the hashes of the inputs."""
    environment = {
        **os.environ,
        "ALKAHEST_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": str(threads),
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent)]),
    }
    shutil.rmtree(folder / "cache/tables", ignore_errors=True)  # a remembered table is no measurement
    command = [
        str(python if tool.script == "peers.py" else sys.executable),
        str(HERE / tool.script),
        tool.job,
        str(folder),
        str(threads),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tool.name}: {done.stderr[-3000:]}{done.stdout[-1000:]}")
    for out in ("out.safetensors", "mergekit-out", "lora.safetensors"):
        path = folder / out
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def make(folder: Path, layers: int, width: int) -> None:
    """bridge, variant and base, unless they are there; the variant differs by 32 directions in each matrix and by
    noise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = {"bridge": {"seed": 1}, "variant": {"delta": 0.02}, "base": {}}
    free, needed = shutil.disk_usage(folder).free, 4.3e9 * layers * (width / 3840) ** 2 * 0.36 + 6e9
    if free < needed:
        raise SystemExit(f"{needed / 1e9:.0f} GB needed in {folder}, {free / 1e9:.0f} GB free: use fewer --sizes")
    for name, settings in names.items():
        path = folder / f"{name}.safetensors"
        if not path.exists():
            ak.made_up(layers=layers, width=width, **settings).save(path)
            os.utime(path, (time.time() - 100, time.time() - 100))  # old enough for its hash to be remembered


def peers_python(folder: Path) -> Path:
    """The Python of a venv with the other tools in it, made at first."""
    venv = folder / "peers"
    python = venv / "bin/python"
    if not (venv / "ready").exists():
        print("installing the other tools into", venv, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        pins = ["-c", str(HERE.parent.parent / "constraints.txt")]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *pins, "torch"], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "torch", *PEERS], check=True)
        (venv / "ready").touch()
    return python


def machine(threads: int) -> dict[str, object]:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    import torch

    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "memory": f"{memory:.0f} GB",
        "system": platform.platform(),
        "torch": torch.__version__,
        "alkahest": ak.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()

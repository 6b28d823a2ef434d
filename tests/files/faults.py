"""Saves in children that die, or lose their disk, halfway through a step of the writing: `test_faults.py` reads them.

    python tests/files/faults.py INPUTS WORK KIND kill|fill [POINTS]       # all of them unless told how many

Each child stops at one step of those that touch the disk: half of a write, the wait for the disk, the move to the final
name, before and after. So every kill hits the writing, however soon tiny models finish, and needs no clock.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch  # once, not in each child
from blake3 import blake3

import alkahest as ak
from alkahest.errors import AlkahestError
from alkahest.files import whole

Step = Callable[[str], None]


def merge(folder: Path) -> ak.Weights:
    bridge, base, variant = (ak.open(folder / f"{name}.safetensors") for name in ("bridge", "base", "variant"))
    return bridge.protect("refiner") + 2.5 * (variant - base)


def to_file(folder: Path, out: Path) -> str:
    merge(folder).save(out / "one.safetensors", threads=1)
    return ""


def to_folder(folder: Path, out: Path) -> str:
    merge(folder).save(out / "many", layout="diffusers", max_shard_size="300KB", threads=1)
    return ""


def to_lora(folder: Path, out: Path) -> str:
    base, variant = ak.open(folder / "base.safetensors"), ak.open(folder / "variant.safetensors")
    ak.extract_lora((variant - base).only("layers.0"), rank=2).save(out / "adapter.safetensors")
    return ""


def to_table(folder: Path, out: Path) -> str:
    """A table, which is kept in the cache on the same disk, and can be had without."""
    base, variant = ak.open(folder / "base.safetensors"), ak.open(folder / "variant.safetensors")
    return blake3(ak.delta_table((variant - base).only("layers.0")).to_csv().encode()).hexdigest()


KINDS: dict[str, Callable[[Path, Path], str]] = {
    "file": to_file,
    "folder": to_folder,
    "LoRA": to_lora,
    "table": to_table,
}
TARGETS = {"file": "one.safetensors", "LoRA": "adapter.safetensors"}  # where an older file is replaced


def watch(step: Step) -> None:
    """Have every step of writing announced in its middle."""
    write, sync, replace = whole.Writer.write, whole.Writer.sync, os.replace

    def half(self: whole.Writer, data: Any, offset: int) -> None:
        view = memoryview(data).cast("B")
        write(self, view[: len(view) // 2], offset)
        step("write")
        write(self, view[len(view) // 2 :], offset + len(view) // 2)

    def waited(self: whole.Writer) -> None:
        step("sync")
        sync(self)

    def moved(source: Any, target: Any) -> None:
        step("before the move")
        replace(source, target)
        step("after the move")

    def unreserved(descriptor: int, size: int) -> None:
        step("open")
        os.ftruncate(descriptor, size)  # as where nothing is reserved: what is free now may not be later

    whole.Writer.write, whole.Writer.sync, whole._reserve = half, waited, unreserved  # type: ignore[method-assign]
    os.replace = moved


def run(kind: str, inputs: Path, work: Path, action: str, point: int) -> dict[str, Any]:
    """What a child says that is killed, or finds its disk full from then on, at the step of that number."""
    told: list[str] = []

    def step(name: str) -> None:
        told.append(name)
        if len(told) - 1 == point and action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif len(told) - 1 == point:
            fill(work / "ballast")

    def child() -> dict[str, Any]:
        watch(step)
        try:
            return {"ended": "done", "text": KINDS[kind](inputs, work / "out"), "steps": told}
        except AlkahestError as error:
            return {"ended": error.problem, "fix": error.fix}

    return in_child(child)


def fill(path: Path) -> None:
    """Leave not one byte free."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


def in_child(what: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a forked child returns, and how it ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            with os.fdopen(writing, "wb") as file:
                file.write(json.dumps(what()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        said = file.read()
    status = os.waitpid(child, 0)[1]
    return {"status": status, **(json.loads(said) if said else {})}


def content(folder: Path) -> dict[str, str]:
    """Every file in a folder by its BLAKE3."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): blake3(path.read_bytes()).hexdigest() for path in files}


def prepare(kind: str, work: Path) -> None:
    """An empty cache, and an output folder with the file that is to be replaced."""
    for name in ("out", "cache"):
        shutil.rmtree(work / name, ignore_errors=True)
        (work / name).mkdir()
    if kind in TARGETS:
        (work / "out" / TARGETS[kind]).write_bytes(b"old")


def reports(inputs: Path, work: Path, kind: str, action: str, wanted: int) -> Iterator[dict[str, Any]]:
    """The whole run, then for each point what stopped, what lay there, and what a second run made."""
    before = content(inputs)
    prepare(kind, work)
    old = content(work / "out")
    first = run(kind, inputs, work, "nothing", -1)
    assert "steps" in first, first
    steps = first["steps"]
    good = content(work / "out")
    yield {"steps": steps, "good": good, "old": old, "text": first["text"]}
    points = range(len(steps)) if not wanted else sorted({n * (len(steps) - 1) // (wanted - 1) for n in range(wanted)})
    for point in points:
        prepare(kind, work)
        stopped = run(kind, inputs, work, action, point)
        left = content(work / "out")
        (work / "ballast").unlink(missing_ok=True)
        for path in (work / "out").glob(".*"):  # a minute passes: a folder may have been about to get its name
            os.utime(path, (time.time() - 100,) * 2)
        shutil.rmtree(work / "out" / "many", ignore_errors=True)  # a full folder is not replaced
        again = run(kind, inputs, work, "nothing", -1)
        yield {
            "step": steps[point],
            "stopped": {name: value for name, value in stopped.items() if name != "steps"},
            "left": left,
            "again": again.get("text"),
            "made": content(work / "out"),
            "inputs": content(inputs) == before,
        }


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["ALKAHEST_CACHE"] = str(Path(sys.argv[2]) / "cache")
    for report in reports(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:5], int((*sys.argv, 0)[5])):
        print(json.dumps(report), flush=True)

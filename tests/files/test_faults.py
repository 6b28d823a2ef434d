"""Kills and full disks that hit the writing itself: the old output or the new one, never a part, and the next run mends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from faults import KINDS, TARGETS

DRIVER = Path(__file__).parent / "faults.py"
POINTS = int(os.environ.get("ALKAHEST_FAULT_POINTS", "4"))  # 0: every step
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def reports(trio: dict[str, Path], work: Path, kind: str, action: str, before: list[str]) -> list[dict[str, Any]]:
    """What the driver says, run by the command ``before``."""
    for path in trio.values():
        os.utime(path, (1e9, 1e9))  # old enough for the hash cache, so that each run takes the same steps
    call = [*before, sys.executable, str(DRIVER), str(trio["base"].parent), str(work), kind, action, str(POINTS)]
    done = subprocess.run(
        call, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    first, *rest = (json.loads(line) for line in done.stdout.splitlines())
    assert len(rest) >= min(POINTS or 99, len(first["steps"])) > 1
    for one in rest:
        assert one["inputs"], one
        assert one["made"] == first["good"], one
        assert one["again"] == first["text"], one
    return [first, *rest]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_at_any_step_of_writing(kind: str, trio: dict[str, Path], tmp_path: Path) -> None:
    first, *rest = reports(trio, tmp_path, kind, "kill", [])
    assert {"before the move", *(["write", "sync"] if kind in TARGETS else [])} <= set(first["steps"])
    for one in rest:
        assert one["stopped"]["status"] == 9, one
        seen = {name: digest for name, digest in one["left"].items() if not name.startswith(".")}
        assert seen in ((first["good"], first["old"]) if one["step"] == "after the move" else (first["old"],)), one


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("unshare") is None, reason="needs a small disk of its own")
@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fills_at_any_step_of_writing(kind: str, trio: dict[str, Path], tmp_path: Path) -> None:
    mount = f'mount -t tmpfs -o size=24m none {tmp_path} && exec "$@"'
    before = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*before, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a disk")
    first, *rest = reports(trio, tmp_path, kind, "fill", before)
    failed = [one for one in rest if one["stopped"]["ended"] != "done"]
    for one in rest:
        assert one["stopped"]["status"] == 0, one
        assert one["left"] == (first["good"] if one not in failed else first["old"]), one
    for one in failed:
        assert one["stopped"]["ended"] in ("no space left on device", "the disk is too small"), one
        assert "free some space" in one["stopped"]["fix"], one
    assert bool(failed) == (kind != "table"), "a table needs no cache" if failed else "the disk never was full"
    assert (kind in TARGETS) == bool(first["old"])

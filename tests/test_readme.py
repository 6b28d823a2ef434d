"""The README's code runs, and it leaves out no command."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer

import alkahest as ak
from alkahest.cli import app

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_tour_runs_on_its_own_files(
    trio: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tour = BLOCKS[0]
    assert len([line for line in tour.splitlines() if line.strip()]) <= 11  # the import, and ten lines
    for name, path in trio.items():
        (tmp_path / f"{name}.safetensors").write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(compile(tour, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "protected: refiner" in printed
    assert printed.count("bridge.protect('refiner') + 171.1 * (variant - base)") == 2
    assert (tmp_path / "both.safetensors").exists()


def test_work_is_shared_out_as_it_says(
    trio: dict[str, Path], parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bridge, variant, base = (ak.open(trio[name]) for name in ("bridge", "variant", "base"))
    live = ak.LiveModel(bridge + ak.param("k", 1.0) * (variant - base), parts)
    names: dict[str, Any] = {
        "ak": ak,
        "bridge": bridge,
        "variant": variant,
        "base": base,
        "live": live,
        "prompts": ["a tree"],
    }
    monkeypatch.setattr(ak, "sweep", partial(ak.sweep, steps=1, width=32, height=32))
    with ThreadPoolExecutor(1) as names["executor"]:
        exec(compile(BLOCKS[1], "README.md", "exec"), names)
    assert len(names["table"]) == 3
    assert ak.open("merged").shapes == bridge.shapes
    for cluster in BLOCKS[2:]:
        compile(cluster, "README.md", "exec")


def test_every_command_is_named() -> None:
    for name in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert f"alkahest {name}" in README


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target

"""The README's code runs, and it leaves out no command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from alkahest.cli import app

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_tour_runs_on_its_own_files(
    trio: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tour,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in tour.splitlines() if line.strip()]) <= 11  # the import, and ten lines
    for name, path in trio.items():
        (tmp_path / f"{name}.safetensors").write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(compile(tour, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "protected: refiner" in printed
    assert printed.count("bridge.protect('refiner') + 171.1 * (variant - base)") == 2
    assert (tmp_path / "both.safetensors").exists()


def test_every_command_is_named() -> None:
    for name in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert f"alkahest {name}" in README


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target

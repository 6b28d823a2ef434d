"""The README is short, its code runs, and what it points at is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alkahest.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_it_is_a_screen_and_a_half() -> None:
    without_tables = re.sub(r"^\|.*\n", "", README, flags=re.MULTILINE)
    assert len(without_tables.split()) < 600


def test_its_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (python,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (terminal,) = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert len([line for line in python.splitlines() if line.strip()]) == 4
    exec(compile(python, "README.md", "exec"), {})
    assert (tmp_path / "merged.safetensors").exists()
    (tmp_path / "merged.safetensors").unlink()
    lines = terminal.splitlines()
    assert len(lines) == 4
    for line in lines:
        done = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
        assert done.exit_code == 0, (line, done.output)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^    |`)make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_what_it_points_at_is_there() -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target

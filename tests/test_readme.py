"""The README is short, its code runs, and what it points at is there."""

from __future__ import annotations

import html
import re
import shlex
import tomllib
import urllib.parse
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


def test_the_walk_shows_these_lines() -> None:
    """`python .make/front.py` draws it anew."""
    drawn = html.unescape(re.sub(r"<[^>]*>", "", (ROOT / "docs/walk.svg").read_text())).replace("\xa0", " ")
    drawn = re.sub(r"\s+", "", drawn)
    (terminal,) = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in terminal.splitlines():
        assert "$" + re.sub(r"\s+", "", line.split("  #")[0]) in drawn, line
    assert "http" not in re.sub(r"http://www.w3.org/2000/svg|<!--.*?-->", "", (ROOT / "docs/walk.svg").read_text())


def test_badges_are_true() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    shown = [urllib.parse.unquote(one) for one in re.findall(r"img\.shields\.io/badge/([^)]+)", README)]
    assert f"python-≥ {project['requires-python'].removeprefix('>=')}-blue" in shown
    assert f"licence-{project['license'].replace('-', '--')}-blue" in shown
    assert len(shown) == 3


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^    |`)make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_what_it_points_at_is_there() -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target

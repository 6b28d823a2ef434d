"""What the pages of docs say one can type, typed."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import alkahest as ak
from alkahest.algebra.expression import Expression
from alkahest.cli import app
from alkahest.recipes.text import parse

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
_CALL = re.compile(r"\w+\(\[?\w+|\w+ \+ ")


def blocks(page: str, language: str) -> list[str]:
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in found]


def commands(page: str) -> list[str]:
    return [line for block in blocks(page, "sh") for line in block.splitlines() if line.startswith("alkahest ")]


def expressions(page: str) -> list[str]:
    """Code in the column ``here`` of tables that is an expression over models."""
    found, column = [], None
    for line in (DOCS / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        if "here" in cells:
            column = cells.index("here")
        elif cells and column is not None and column < len(cells):
            spans = re.findall(r"`([^`]+)`", cells[column])
            found += [span for span in spans if _CALL.match(span) or span.startswith("bridge.")]
        elif not cells:
            column = None
    return [one for one in found if not one.startswith(("ak.", "alkahest", "merged.", "panels.", "weights "))]


@pytest.fixture(scope="module")
def names() -> dict[str, Expression]:
    files = {
        "a": "base-variant",
        "b": "base-weak",
        "c": "tb0",
        "base": "base",
        "bridge": "tb1",
        "variant": "base-variant",
    }
    found: dict[str, Expression] = {name: ak.open(f"mini:{mini}", name=name) for name, mini in files.items()}
    return {**found, "lora": found["a"] - found["base"]}


@pytest.mark.parametrize("page", PAGES)
def test_expressions_in_tables_mean_something(page: str, names: dict[str, Expression]) -> None:
    for text in expressions(page):
        assert isinstance(parse(text, names), Expression), text


def test_the_tables_are_read() -> None:
    found = expressions("coming-from.md")
    assert len(found) > 34
    assert 'lerp(a, b, {"*": 0.1, "*attention*": 0.7})' in found


@pytest.mark.parametrize("page", PAGES)
def test_commands_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ComfyUI/custom_nodes").mkdir(parents=True)
    (tmp_path / "ComfyUI/main.py").touch()
    for line in commands(page):
        done = CliRunner().invoke(app, shlex.split(line)[1:])
        assert done.exit_code == 0, (line, done.output)


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_live(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", (DOCS / page).read_text()):
        assert (DOCS / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), known)  # what we wrote ourselves

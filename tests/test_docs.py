"""What the pages of docs say one can type, typed."""

from __future__ import annotations

import re
import shlex
import textwrap
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import alkahest as ak
from alkahest.algebra.expression import Expression
from alkahest.cli import app
from alkahest.lab import plots
from alkahest.recipes.text import parse

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
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
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ComfyUI/custom_nodes").mkdir(parents=True)
    (tmp_path / "ComfyUI/main.py").touch()
    for line in commands(page):
        done = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
        assert done.exit_code == 0, (line, done.output)


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_live(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", (DOCS / page).read_text()):
        made = target.removeprefix("../").startswith("reference/")  # with the site, which is strict about them
        assert made or (DOCS / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in ("guide/machines.md", "guide/merging.md", "gallery.md")]
)
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), known)  # what we wrote ourselves


def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tour,) = blocks("guide/merging.md", "python")
    assert len([line for line in tour.splitlines() if line.strip()]) <= 11  # the import, and ten lines
    monkeypatch.chdir(tmp_path)
    exec(compile(tour, "merging.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "protected: refiner" in printed
    assert printed.count("tb1.protect('refiner') + 4.4 * (base_variant - base)") == 2
    assert (tmp_path / "both.safetensors").exists()


def test_work_is_shared_out_as_it_says(
    trio: dict[str, Path], parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bridge, variant, base = (ak.open(trio[name]) for name in ("bridge", "variant", "base"))
    live = ak.LiveModel(bridge + ak.param("k", 1.0) * (variant - base), parts)
    models: dict[str, Any] = {"ak": ak, "bridge": bridge, "variant": variant, "base": base, "live": live}
    models["prompts"] = ["a tree"]
    monkeypatch.setattr(ak, "sweep", partial(ak.sweep, steps=1, width=32, height=32))
    shared, *clusters = blocks("guide/machines.md", "python")
    with ThreadPoolExecutor(1) as models["executor"]:
        exec(compile(shared, "machines.md", "exec"), models)
    assert len(models["table"]) == 3
    assert ak.open("merged").shapes == bridge.shapes
    assert len(clusters) == 2
    for cluster in clusters:
        compile(cluster, "machines.md", "exec")


def test_the_gallery_has_every_plot() -> None:
    """`make docs` runs it."""
    page = (DOCS / "gallery.md").read_text()
    for name in plots.__all__:
        assert not callable(getattr(plots, name)) or f"plots.{name}(" in page, name


def test_every_command_is_named() -> None:
    text = (DOCS / "guide/command-line.md").read_text()
    for name in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert f"alkahest {name}" in text


def test_every_page_is_in_the_sites_order() -> None:
    listed = (DOCS.parent / ".make" / "docs_pages.py").read_text()
    for page in PAGES:
        assert Path(page).stem in listed, page

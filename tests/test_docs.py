"""What is written for those who come next names files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import alkahest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "alkahest"
TEXTS = ["docs/architecture.md", "CONTRIBUTING.md", "CHANGELOG.md"]


@pytest.mark.parametrize("text", TEXTS)
def test_every_path_is_there(text: str) -> None:
    said = re.sub(r"^    .*$", "", (ROOT / text).read_text(), flags=re.M)
    paths = re.findall(r"`((?:alkahest|tests|docs|notebooks|experiments)/[\w/.-]*)`", said)
    paths += [str((ROOT / text).parent.relative_to(ROOT) / one) for one in re.findall(r"\]\(([\w/.-]+)\)", said)]
    assert not [path for path in paths if "NN" not in path and not (ROOT / path).exists()]


def test_the_architecture_s_modules_and_folders_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    listed = set(re.findall(r"^\| (.*?) \|", text, flags=re.M))
    named = {name.rstrip("/") for cell in listed for name in re.findall(r"`([\w/]+)`", cell)}
    assert folders <= named
    assert not {name for name in named if not (PACKAGE / name).exists() and not (PACKAGE / f"{name}.py").exists()}
    for module in re.findall(r"`([a-z]+/[a-z_]+(?:/[a-z_]+)?)(?:\.py|\.[A-Za-z_.]+)?`", text):
        if not module.startswith("tests/"):
            assert (PACKAGE / f"{module}.py").exists() or (PACKAGE / module).is_dir(), module


def test_it_is_short() -> None:
    assert len((ROOT / "docs" / "architecture.md").read_text().splitlines()) <= 60


def test_the_version_has_its_place_in_the_changelog() -> None:
    assert f"## {alkahest.__version__}" in (ROOT / "CHANGELOG.md").read_text()

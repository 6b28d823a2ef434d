"""environment.yml, pyproject.toml, constraints.txt and the Makefile say the same thing."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in requirements}  # type: ignore[index]


def pinned() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+]+", line) for line in lines)
    return {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}


def test_every_dependency_is_pinned() -> None:
    extras = PROJECT["optional-dependencies"]
    for group in (PROJECT["dependencies"], *extras.values()):
        assert requirement_names(group) <= set(pinned())
    assert pinned()["torch"] == "2.13.0"
    assert "+" not in "".join(pinned().values()), "a local build was pinned"


def test_pins_are_what_is_installed() -> None:
    from importlib.metadata import version

    for name in requirement_names([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["lab"]]):
        assert version(name).split("+")[0] == pinned()[name]


def test_conda_environment_agrees() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "alkahest"
    assert PROJECT["name"] == "alkahest-merge"  # alkahest is a stranger's on the package index
    conda = [line for line in environment["dependencies"] if isinstance(line, str)]
    (pip,) = (line["pip"] for line in environment["dependencies"] if isinstance(line, dict))
    (python,) = (line.split("=")[1] for line in conda if line.startswith("python="))
    least = PROJECT["requires-python"].removeprefix(">=")
    assert tuple(map(int, python.split("."))) >= tuple(map(int, least.split(".")))
    assert pip == ["-c constraints.txt", "-e .[lab,sample,search,fast]"]
    assert {"lab", "sample"} <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize(
    "card", ["torch", "safetensors", "diffusers", "jupyterlab", "ipywidgets", "matplotlib", "pandas"]
)
def test_the_cards_packages_are_dependencies(card: str) -> None:
    everything = requirement_names(PROJECT["dependencies"]) | requirement_names(
        [line for extra in ("lab", "sample") for line in PROJECT["optional-dependencies"][extra]]
    )
    assert card in everything


def test_make_installs_through_the_constraints() -> None:
    text = (ROOT / "Makefile").read_text()
    (install,) = (line for line in text.splitlines() if line.startswith("INSTALL :="))
    assert "-c constraints.txt" in install
    recipes = [line for line in text.splitlines() if line.startswith("\t") and "-e '.[" in line]
    assert len(recipes) == 3
    assert all(line.startswith("\t$(INSTALL) ") for line in recipes)
    assert "pip install" not in text
    assert {"make test", "make docs"} <= set((ROOT / ".ci" / "run").read_text().splitlines())


@pytest.mark.parametrize(("target", "program"), [("notebooks", "notebook_runs.py"), ("reproduce", "experiment run")])
def test_what_is_published_starts_from_an_empty_cache(target: str, program: str) -> None:
    """The command as make gives it to the shell, which is asked what cache it would have, and whether it is there after."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    start = lines.index(next(line for line in lines if line.startswith(f"{target}:")))
    (command,) = [line.strip() for line in lines[start + 1 : start + 3] if program in line]
    (given,) = [line.partition(":= ")[2] for line in lines if line.startswith("EMPTY_CACHE")]
    assert command.startswith("$(EMPTY_CACHE) ")
    shell = given.replace("$$", "$") + " sh -c 'ls -A \"$ALKAHEST_CACHE\" | wc -l; echo $ALKAHEST_CACHE'"
    said = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout.split()
    assert said[0] == "0"
    assert not Path(said[1]).exists()

"""Docstrings of public names: NumPy's sections agree with the signature, and their examples run."""

from __future__ import annotations

import doctest
import functools
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import alkahest as ak
from alkahest.lab import panels

SECTION = re.compile(r"^(\w[\w ]*)\n-+$", re.MULTILINE)
TOML = """
start = "lerp(turbo, base, 0.5)"
inputs = { turbo = "mini:turbo", base = "mini:base" }
data.scenes.scenes = { count = 12, seed = 1 }
held_out = 4
save_every = 1
measure_every = 1

[[stage]]
name = "short"
mix = { scenes = 1.0 }
steps = 1
batch = 2
resolution = 64
lr = 1e-3
"""


# What people call on expressions and live models; the rest of these classes is for the engine.
METHODS = {
    "Weights": "bind text protect with_parts_of load_into save stream",
    "Delta": "bind text only without everywhere scaled agreeing",
    "Checkpoint": "part summary",
    "LiveModel": "set become",
}
CLASSES = ("Checkpoint", "LiveModel", "Multiplier")


def functions() -> list[str]:
    plain = [name for name in ak.__all__ if inspect.isfunction(getattr(ak, name))]
    return plain + [f"{kind}.{name}" for kind, names in METHODS.items() for name in names.split()]


def public(name: str) -> Any:
    return functools.reduce(getattr, name.split("."), ak)


def sections(text: str) -> dict[str, str]:
    pieces = SECTION.split(text)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def parameters(body: str) -> set[str]:
    heads = re.findall(r"^(\w[\w, ]*?)(?: :.*)?$", body, re.MULTILINE)
    return {name.strip() for head in heads for name in head.split(",")} - {""}


@pytest.mark.parametrize("name", functions())
def test_every_parameter_is_described(name: str) -> None:
    function = public(name)
    found = sections(inspect.getdoc(function) or "")
    own = {one.name for one in inspect.signature(function).parameters.values()} - {"self"}
    body = found.get("Parameters", "")
    assert parameters(body) == own
    assert not re.findall(r"^\w.*$(?!\n    )", body, re.MULTILINE), "without a word of what it is"
    assert {"Returns", "Examples"} <= set(found)
    assert "Raises" in found or not own or name.endswith(".text")


@pytest.mark.parametrize("name", panels.__all__)
def test_every_control_of_a_panel_is_described(name: str) -> None:
    function = getattr(panels, name)
    found = sections(inspect.getdoc(function) or "")
    body = found["Parameters"]
    assert parameters(body) == set(inspect.signature(function).parameters)
    assert not re.findall(r"^\w.*$(?!\n    )", body, re.MULTILINE), "without a word of what it is"
    assert {"Returns", "Examples"} <= set(found)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the examples take as given: models of the miniature family, prompts, and what is drawn with them."""
    minis = {"base": "base", "variant": "base-variant", "other": "base-weak", "bridge": "tb1", "turbo": "turbo"}
    found: dict[str, Any] = {name: ak.open(f"mini:{mini}", name=name) for name, mini in minis.items()}
    delta = found["variant"] - found["base"]
    live = ak.LiveModel(found["bridge"].protect("refiner") + ak.param("k", 1.0) * delta)
    prompts = ["a red ball on a beach", "a blue box at night", "a green ball at night"]
    pictures = ak.sample(live, prompts, steps=2, cfg=1).images
    given = {"live": live, "pipe": live.pipe, "prompts": prompts, "pictures": pictures}
    return {"__name__": "examples", "ak": ak, **found, **given}


@pytest.mark.parametrize("name", [*functions(), *CLASSES])
def test_examples_run(name: str, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tb1.toml").write_text(TOML)
    function = public(name)
    examples = doctest.DocTestParser().get_doctest(inspect.getdoc(function) or "", dict(names), name, name, 0)
    assert examples.examples
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(examples)
    assert result.failed == 0

"""Docstrings of public names: NumPy's sections agree with the signature, and their examples run."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import alkahest as ak

SECTION = re.compile(r"^(\w[\w ]*)\n-+$", re.MULTILINE)
# Functions whose docstrings are not in sections yet.
PROSE = {
    "alignment",
    "apply_lora",
    "convert_lora",
    "delta_spectra",
    "effect",
    "extract_lora",
    "finetune",
    "fit_factors",
    "flow_loss",
    "gradient_signs",
    "lora_ranks",
    "made_up",
    "matching_units",
    "memory_plan",
    "method",
    "nearest_base",
    "needed_multiplier",
    "open",
    "open_lora",
    "open_part",
    "open_signs",
    "picture_measures",
    "pipeline",
    "read_config",
    "read_history",
    "read_workflow",
    "sample",
    "search",
    "sweep",
    "write_workflow",
}


def functions() -> list[str]:
    return [name for name in ak.__all__ if inspect.isfunction(getattr(ak, name)) and name not in PROSE]


def sections(text: str) -> dict[str, str]:
    pieces = SECTION.split(text)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def parameters(body: str) -> set[str]:
    heads = re.findall(r"^([\w, *]+?)(?: :.*)?$", body, re.MULTILINE)
    return {name.strip() for head in heads for name in head.split(",")} - {""}


@pytest.mark.parametrize("name", functions())
def test_every_parameter_is_described(name: str) -> None:
    function = getattr(ak, name)
    found = sections(inspect.getdoc(function) or "")
    own = {one.name for one in inspect.signature(function).parameters.values()}
    assert parameters(found.get("Parameters", "")) == own
    assert {"Returns", "Examples"} <= set(found)
    assert "Raises" in found or not own


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    minis = {"base": "base", "variant": "base-variant", "other": "base-weak", "bridge": "tb1", "turbo": "turbo"}
    return {"ak": ak, **{name: ak.open(f"mini:{mini}", name=name) for name, mini in minis.items()}}


@pytest.mark.parametrize("name", functions())
def test_examples_run(name: str, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    function = getattr(ak, name)
    examples = doctest.DocTestParser().get_doctest(inspect.getdoc(function) or "", dict(names), name, name, 0)
    assert examples.examples
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(examples)
    assert result.failed == 0

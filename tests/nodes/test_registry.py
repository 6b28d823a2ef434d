from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import alkahest as ak
from alkahest.cli import app
from alkahest.errors import OutputError, UnsupportedError
from alkahest.nodes import NODE_CLASS_MAPPINGS
from alkahest.nodes.registry import write_package

ADDRESS = "https://github.com/somebody/alkahest"


def test_the_folder_has_what_the_registry_asks_for(tmp_path: Path) -> None:
    """By docs.comfy.org/registry/specifications; comfy-cli 1.23's own `node validate` passes it too."""
    words = ["nodes", "package", str(tmp_path / "new"), "--publisher", "somebody", "--repository", ADDRESS]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    read = tomllib.loads((tmp_path / "new/pyproject.toml").read_text())
    project, comfy = read["project"], read["tool"]["comfy"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["version"] == ak.__version__
    assert project["dependencies"] == [f"alkahest-merge=={ak.__version__}"]
    assert (tmp_path / "new/requirements.txt").read_text().split() == project["dependencies"]  # what the Manager reads
    assert "comfyui" not in project["name"]
    assert set(project["license"]) == {"text"}
    assert project["urls"]["Repository"] == ADDRESS
    assert comfy["PublisherId"] == "somebody"
    assert len(list((tmp_path / "new/example_workflows").glob("*.json"))) == 2


@pytest.mark.parametrize("ours", [True, False])
def test_comfyui_finds_the_nodes_or_hears_what_is_missing(tmp_path: Path, ours: bool) -> None:
    folder = write_package(tmp_path / "alkahest", publisher="somebody", repository=ADDRESS)
    code = f"""
import importlib.util, sys, types
if not {ours}:
    sys.modules["alkahest"] = types.ModuleType("alkahest")  # the algebra system of that name
spec = importlib.util.spec_from_file_location("custom_nodes_alkahest", {str(folder / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(*module.NODE_CLASS_MAPPINGS)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == (list(NODE_CLASS_MAPPINGS) if ours else [])
    assert ours or "pip uninstall alkahest" in done.stderr


def test_what_is_no_publisher_address_or_new_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/theirs").write_text("kept")
    with pytest.raises(OutputError, match="not empty"):
        write_package(tmp_path / "full", publisher="somebody", repository=ADDRESS)
    for publisher, address in [("@somebody", ADDRESS), ("", ADDRESS), ('a"b', ADDRESS), ("a", "github.com/a/b")]:
        with pytest.raises(UnsupportedError, match="this is no"):
            write_package(tmp_path / "new", publisher=publisher, repository=address)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "theirs"]

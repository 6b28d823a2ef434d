from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import alkahest as ak
from alkahest.cli import app
from alkahest.errors import OutputError
from alkahest.nodes.install import find_lacking, install, uninstall


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    (tmp_path / "ComfyUI/custom_nodes/other").mkdir(parents=True)
    return tmp_path / "ComfyUI"


def test_install_and_uninstall(comfyui: Path) -> None:
    folder = install(comfyui)
    assert folder == comfyui / "custom_nodes/alkahest"
    assert install(comfyui.parent) == folder  # the portable edition, and once more
    examples = sorted((folder / "example_workflows").glob("*.json"))  # where ComfyUI looks for templates
    assert [path.stem for path in examples] == ["merge_two_imports_alkahest", "merge_two_imports_core"]
    assert all(ak.read_workflow(path) for path in examples)
    done = CliRunner().invoke(app, ["nodes", "uninstall", str(comfyui)])
    assert done.exit_code == 0
    assert not folder.exists()
    assert (comfyui / "custom_nodes/other").is_dir()
    with pytest.raises(OutputError, match="not installed here"):
        uninstall(comfyui)
    done = CliRunner().invoke(app, ["nodes", "install", str(comfyui)])
    assert done.exit_code == 0
    assert "restart ComfyUI" in done.output
    assert "-m pip install pandas blake3" in done.output  # ComfyUI's Python is not to be found here


def test_what_is_not_ours_stays(comfyui: Path, tmp_path: Path) -> None:
    theirs = comfyui / "custom_nodes/alkahest"
    theirs.mkdir()
    (theirs / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}")
    for act in (install, uninstall):
        with pytest.raises(OutputError, match="another alkahest"):
            act(comfyui)
    assert (theirs / "__init__.py").read_text() == "NODE_CLASS_MAPPINGS = {}"
    with pytest.raises(OutputError, match="not a ComfyUI folder"):
        install(tmp_path / "nowhere")


def test_a_link_is_not_followed(comfyui: Path, tmp_path: Path) -> None:
    install(comfyui)
    elsewhere = tmp_path / "elsewhere"
    (comfyui / "custom_nodes/alkahest").rename(elsewhere)
    (comfyui / "custom_nodes/alkahest").symlink_to(elsewhere)
    with pytest.raises(OutputError, match="another alkahest"):
        uninstall(comfyui)
    assert (elsewhere / "__init__.py").exists()


def test_what_comfyuis_python_lacks(comfyui: Path) -> None:
    (comfyui / "venv/bin").mkdir(parents=True)
    (comfyui / "venv/bin/python").symlink_to(sys.executable)
    python, missing = find_lacking(comfyui)
    assert python == str(comfyui / "venv/bin/python")
    assert set(missing) <= {"pandas", "blake3"}


def test_a_python_that_does_not_start_and_a_file_in_the_way(comfyui: Path) -> None:
    (comfyui / "venv/bin").mkdir(parents=True)
    (comfyui / "venv/bin/python").write_text("no program")
    assert find_lacking(comfyui)[1] == ["pandas", "blake3"]
    (comfyui / "custom_nodes/alkahest").write_text("a file")
    with pytest.raises(OutputError, match="another alkahest"):
        install(comfyui)


@pytest.mark.parametrize("hidden", [False, True], ids=["installed", "not installed there"])
def test_the_file_that_is_written_registers_the_nodes(comfyui: Path, hidden: bool) -> None:
    """As ComfyUI's ``nodes.py`` loads it; hidden as in a Python in which alkahest is not installed."""
    folder = install(comfyui)
    code = f"""
import importlib.util, sys
found = importlib.util.find_spec
if {hidden}:
    importlib.util.find_spec = lambda name, *rest: None if name == "alkahest" else found(name, *rest)
spec = importlib.util.spec_from_file_location("custom_nodes_x_alkahest", {str(folder / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert not {{"pandas", "blake3", "diffusers", "matplotlib"}} & set(sys.modules), "brings too much"
print(*module.NODE_CLASS_MAPPINGS)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "AlkahestMerge",
        "AlkahestSubtract",
        "AlkahestAdd",
        "AlkahestMultiplier",
        "AlkahestSupplement",
        "AlkahestSave",
    ]

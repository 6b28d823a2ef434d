"""House shape, runs clean, and the committed outputs are what the code gives today."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import nbformat
import pytest
import tiny
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from notebook_runs import FOLDER, NOTEBOOKS, executed

import alkahest as ak


def source_lines(cell: NotebookNode) -> list[str]:
    return [line for line in cell.source.splitlines() if line.strip()]


def texts(notebook: NotebookNode) -> list[str]:
    """Every text output, in order; pictures and HTML are not compared."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            found.append(output.get("text") or output.get("data", {}).get("text/plain", ""))
    return found


def test_there_are_notebooks() -> None:
    assert "00-start-here.ipynb" in {path.name for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_house_shape(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = notebook.cells
    assert 15 <= len(cells) <= 30
    assert cells[0].cell_type == cells[-1].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    assert all(word in cells[0].source for word in ("seconds", "MB"))
    assert [tag for cell in cells for tag in cell.metadata.get("tags", [])] == ["parameters"]
    assert cells[2].metadata["tags"] == ["parameters"]
    for node in ast.parse(cells[2].source).body:
        assert isinstance(node, ast.Assign)
        ast.literal_eval(node.value)
    for cell in cells:
        if cell.cell_type == "code":
            assert len(source_lines(cell)) <= 12
            assert not any(
                isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in ast.walk(ast.parse(cell.source))
            )
            assert "execution" not in cell.metadata
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata


OWN = {
    "01-two-lineages": {"base": "base", "turbo": "turbo", "deturbo": "deturbo", "variant": "base-variant"},
    "02-the-naive-merge": {"base": "base", "turbo": "turbo"},
    "04-delta-magnitudes": {
        "base": "base",
        "strong": "base-variant",
        "weak": "base-weak",
        "weak_bf16": "base-weak-bf16",
    },
    "06-importing-a-model": {"bridge": "tb1", "base": "deturbo", "variant": "turbo-variant"},
    "08-merging-across-lineages": {
        "bridge": "tb1",
        "base": "base",
        "of_base": "base-variant",
        "deturbo": "deturbo",
        "of_turbo": "turbo-variant",
    },
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_runs_clean_and_its_outputs_are_fresh(path: Path, tmp_path: Path) -> None:
    """Once for two questions: those that take files of one's own are given the miniatures as such files."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (tmp_path / "experiments").symlink_to(FOLDER.parent / "experiments")  # where recorded results are read from
    committed = nbformat.read(path, as_version=4)
    fresh = executed(with_own_files(path, tmp_path, OWN[path.stem]) if path.stem in OWN else path, folder)
    for cell in fresh.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.get("text")
    own = path.stem in OWN  # titles say so of files that lie in the package
    found, expected = (
        [text.replace(" (miniatures)", "") if own else text for text in texts(one)] for one in (fresh, committed)
    )
    assert found == expected, "run `make notebooks`"


def with_own_files(path: Path, folder: Path, own: dict[str, str]) -> Path:
    """The notebook with files where it takes the miniatures; they have the miniatures' names, and lie elsewhere."""
    given = {key: str(folder / f"{member}.safetensors") for key, member in own.items()}
    for key, member in own.items():
        shutil.copy(ak.mini.load(member).path, given[key])
    notebook = nbformat.read(path, as_version=4)
    assert "CHECKPOINTS = None" in notebook.cells[2].source
    notebook.cells[2].source = notebook.cells[2].source.replace("CHECKPOINTS = None", f"CHECKPOINTS = {given}")
    nbformat.write(notebook, folder / "own.ipynb")
    return folder / "own.ipynb"


def test_the_notebook_for_files_of_ones_own_runs_on_them(tmp_path: Path) -> None:
    (tmp_path / "notebooks").mkdir()
    own = {"bridge": "tb1", "variant": "base-variant", "base": "base", "other_base": "turbo"}  # by default it has more
    path = with_own_files(FOLDER / "09-your-own-files.ipynb", tmp_path, own)
    assert any("fits on the disk: True" in text for text in texts(executed(path, tmp_path / "notebooks")))


@pytest.mark.parametrize("name", OWN)
def test_without_files_of_ones_own_it_takes_the_same_miniatures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)
    loaded = []
    monkeypatch.setattr(ak.mini, "load", lambda member, load=ak.mini.load: loaded.append(member) or load(member))
    space: dict[str, object] = {}
    for cell in nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells[:5]:
        if cell.cell_type == "code":
            exec(cell.source, space)
    assert set(loaded) >= set(OWN[name].values())


def test_the_switch_to_real_files_works(trio: dict[str, Path], tmp_path: Path) -> None:
    notebook = nbformat.read(FOLDER / "00-start-here.ipynb", as_version=4)
    cell = notebook.cells[2]
    assert "CHECKPOINTS = None" in cell.source
    cell.source = cell.source.replace(
        "CHECKPOINTS = None", f"CHECKPOINTS = { {name: str(path) for name, path in trio.items()} }"
    )
    nbformat.write(notebook, tmp_path / "real.ipynb")
    fresh = executed(tmp_path / "real.ipynb", tmp_path)
    assert any("2 layers, width 96" in text for text in texts(fresh))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("09-your-own-files", '{"bridge": "brige.safetensors"}', "did you mean"),
        (
            "06-importing-a-model",
            '{"bridge": "text.safetensors", "base": "base.safetensors", "variant": "base.safetensors"}',
            "not a safetensors file|safetensors",
        ),
        (
            "00-start-here",
            '{"bridge": "bridge.safetensors", "variant": "other.safetensors", "base": "base.safetensors"}',
            "shape|tensors",
        ),
    ],
)
def test_a_missing_or_wrong_file_is_said(
    name: str, given: str, message: str, trio: dict[str, Path], tmp_path: Path
) -> None:
    for each, path in trio.items():
        (tmp_path / f"{each}.safetensors").write_bytes(path.read_bytes())
    (tmp_path / "text.safetensors").write_text("I am no model")
    tiny.write(tmp_path / "other.safetensors", tiny.state(layers=1))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    notebook.cells[2].source = notebook.cells[2].source.replace("CHECKPOINTS = None", f"CHECKPOINTS = {given}")
    nbformat.write(notebook, tmp_path / "wrong.ipynb")
    with pytest.raises(CellExecutionError, match=message) as caught:
        executed(tmp_path / "wrong.ipynb", tmp_path)
    assert "Error" in caught.value.ename
    assert "alkahest" in caught.value.traceback

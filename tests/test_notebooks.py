"""House shape, runs clean, and the committed outputs are what the code gives today."""

from __future__ import annotations

import ast
import contextlib
import io
from pathlib import Path

import nbformat
import pytest
import tiny
from IPython.core.interactiveshell import InteractiveShell
from nbformat import NotebookNode
from notebook_runs import FOLDER, NOTEBOOKS, executed

import alkahest as ak
from alkahest.lab.models import KEYS, write_models


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


INSTALLING = nbformat.read(NOTEBOOKS[0], as_version=4).cells[1].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_house_shape(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = notebook.cells
    assert 16 <= len(cells) <= 31
    assert cells[0].cell_type == cells[-1].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    assert all(word in cells[0].source for word in ("seconds", "MB"))
    assert [tag for cell in cells for tag in cell.metadata.get("tags", [])] == ["parameters"]
    assert cells[3].metadata["tags"] == ["parameters"]
    for node in ast.parse(cells[3].source).body:
        assert isinstance(node, ast.Assign)
        ast.literal_eval(node.value)
    assert cells[1].source == INSTALLING  # closed to the eye, and the same everywhere
    assert cells[1].metadata == {"jupyter": {"source_hidden": True}}
    for cell in (cells[0], *cells[2:]):
        if cell.cell_type == "code":
            assert len(source_lines(cell)) <= 12
            assert not any(
                isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in ast.walk(ast.parse(cell.source))
            )
            assert "execution" not in cell.metadata
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_runs_clean_and_its_outputs_are_fresh(path: Path, tmp_path: Path) -> None:
    """Without any files of one's own, on the miniatures."""
    (tmp_path / "notebooks").mkdir()
    link_recorded(tmp_path)
    fresh = executed(path, tmp_path / "notebooks")
    for cell in fresh.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.get("text")
    assert texts(fresh) == texts(nbformat.read(path, as_version=4)), "run `make notebooks`"


# What makes a notebook short, where files and settings are not what is looked at.
SHORT: dict[str, dict[str, object]] = {
    "02-the-naive-merge": {"PROMPTS": 1, "STEPS": 2},
    "05-why-171x": {"KS": (30,), "PROMPTS": 1, "COUNT": 4, "STEPS": 2},
    "06-importing-a-model": {"COUNT": 4, "STEPS": 2},
    "07-supplement-loras": {"RANKS": (4,), "STRENGTHS": (0.1,), "PROMPTS": 3, "STEPS": 2},
    "08-merging-across-lineages": {"STEPS": 1, "PROMPTS": ["a cyan heart", "a red ball", "a fox"]},
}
WIDTH = {"dim": 64, "n_heads": 2, "n_kv_heads": 2}  # the miniatures' is 96, and they have four layers
TRAINED_FROM = {"variant": "base", "of_turbo": "deturbo", "weak": "base", "weak_bf16": "base"}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models file that names everything, and no miniature."""
    from diffusers import ZImagePipeline

    folder = tmp_path_factory.mktemp("own")
    states = {}
    for seed, name in enumerate(("base", "turbo", "deturbo", "bridge")):
        states[name] = tiny.model(seed, **WIDTH).state_dict()
    for seed, (name, base) in enumerate(TRAINED_FROM.items()):
        changed = tiny.near(states[base], 0.001 if "weak" in name else 0.05, 9 + seed)
        states[name] = {key: states[base][key] if "refiner" in key else value for key, value in changed.items()}
    assert states.keys() == KEYS.keys()
    for name, values in states.items():
        tiny.write(folder / f"my_{name}.safetensors", tiny.native(values))
    ZImagePipeline(transformer=None, **tiny.components()).save_pretrained(folder / "parts")
    named = {name: f"my_{name}.safetensors" for name in states} | {"components": "parts"}
    return write_models(folder / "models.toml", named)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_runs_to_its_end_on_files_of_ones_own(path: Path, own: Path, tmp_path: Path) -> None:
    said = run_cells(path, tmp_path, MODELS=str(own))
    assert "your files, named in models.toml: " in said
    assert "miniatures, because" not in said


@pytest.mark.parametrize("name", ["01-two-lineages", "06-importing-a-model", "09-your-own-files"])
def test_what_is_not_named_is_a_miniature_and_said(name: str, own: Path, tmp_path: Path) -> None:
    """As most people have it: Base, a derivative of it and a bridge; nothing to draw with."""
    few = {key: str(own.parent / f"my_{key}.safetensors") for key in ("bridge", "base", "variant")}
    said = run_cells(FOLDER / f"{name}.ipynb", tmp_path, MODELS=str(write_models(tmp_path / "few.toml", few)))
    expected = {
        "01-two-lineages": "miniatures, because few.toml names no turbo (your base is not used here)",
        "06-importing-a-model": "miniatures, because no components are named to draw yours with",
        "09-your-own-files": "your files, named in few.toml: bridge = my_bridge.safetensors",
    }
    assert expected[name] in said


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("09-your-own-files", {"bridge": "my_brige"}, "as models.toml names it: no such file.*did you mean"),
        ("06-importing-a-model", {"bridge": "text"}, "as models.toml names it: .*not a safetensors file"),
        ("00-start-here", {"variant": "deep"}, "shape|tensors"),
    ],
)
def test_a_missing_or_wrong_file_is_said(
    name: str, given: dict[str, str], message: str, own: Path, tmp_path: Path
) -> None:
    for each in ("bridge", "base", "variant"):
        (tmp_path / f"my_{each}.safetensors").symlink_to(own.parent / f"my_{each}.safetensors")
    (tmp_path / "text.safetensors").write_text("I am no model")
    tiny.write(tmp_path / "deep.safetensors", tiny.state(layers=1))
    named = {each: f"my_{each}" for each in ("bridge", "base", "variant")} | given
    models = write_models(tmp_path / "models.toml", {each: f"{file}.safetensors" for each, file in named.items()})
    with pytest.raises(ak.AlkahestError, match=f"(?s){message}"):
        run_cells(FOLDER / f"{name}.ipynb", tmp_path, MODELS=str(models))


def link_recorded(folder: Path) -> None:
    """Where notebooks look for recorded results."""
    (folder / "experiments").symlink_to(FOLDER.parent / "experiments")


def run_cells(path: Path, folder: Path, **parameters: object) -> str:
    """What a notebook's cells print and show, run in this process: a kernel for each would take longer than they do."""
    link_recorded(folder)
    (folder / "notebooks").mkdir()
    shell = InteractiveShell()
    said = io.StringIO()
    with contextlib.chdir(folder / "notebooks"), contextlib.redirect_stdout(said):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type != "code":
                continue
            result = shell.run_cell(cell.source)
            if cell.metadata.get("tags") == ["parameters"]:
                shell.push({**SHORT.get(path.stem, {}), **parameters})
            result.raise_error()
    return said.getvalue()

"""Who may import whom, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import alkahest

PACKAGE = Path(alkahest.__file__).parent

# A folder imports only folders above it: the ground floor comes first. `__init__` is the public surface.
FLOORS = [
    "errors",
    "version",
    "files",
    "model",
    "engine",
    "algebra",
    "sources",
    "mini",
    "measure",
    "pictures",
    "lora",
    "workflow",
    "recipes",
    "training",
    "__init__",
    "nodes",
    "lab",
    "experiment",
    "cli",
    "finetune",
    "__main__",
]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, known: set[str]) -> set[str]:
    """Modules of the package that a file imports, late ones too, outside ``if TYPE_CHECKING``."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "alkahest":
            module = (node.module or "").partition(".")[2]
            for alias in node.names:
                below = f"{module}.{alias.name}".strip(".")
                found.add(below if below in known else module or "__init__")
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] or "__init__" for a in node.names if a.name.split(".")[0] == "alkahest"}
    return found


def import_graph() -> dict[str, set[str]]:
    """Module -> modules that it imports, at its top or late."""
    files = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    return {name: imports(path, set(files)) for name, path in files.items()}


def floor(name: str) -> int:
    return FLOORS.index(name.partition(".")[0])


def test_a_folder_imports_only_folders_above_it() -> None:
    upward = [
        f"{name} imports {other}, which is below it"
        for name, found in import_graph().items()
        for other in found
        if floor(other) > floor(name)
    ]
    assert not upward, "\n".join(upward)


def test_nothing_imports_itself_by_way_of_others() -> None:
    graph = import_graph()
    while leaves := [name for name, found in graph.items() if not found & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"in a circle, or above one: {sorted(graph)}"


def loaded_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_the_package_brings_nothing_heavy() -> None:
    heavy = {
        "torch",
        "numpy",
        "pandas",
        "diffusers",
        "transformers",
        "matplotlib",
        "ipywidgets",
        "IPython",
        "huggingface_hub",
    }
    assert not loaded_after("import alkahest") & heavy
    assert not loaded_after("import alkahest.cli") & heavy
    assert not loaded_after("import alkahest as ak; ak.open; ak.made_up(1).save") & (heavy - {"torch", "numpy"})


def test_the_public_surface_is_what_it_says() -> None:
    assert set(dir(alkahest)) == {*alkahest.__all__, "__version__"}, "Tab offers what nobody should use"
    for name in alkahest.__all__:
        assert getattr(alkahest, name).__doc__, f"{name} has no docstring"
    typed = {
        alias.asname
        for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname and not alias.asname.startswith("_")
    }
    assert typed == set(alkahest.__all__), "what type checkers see differs from what is there"
    with pytest.raises(AttributeError, match="no attribute 'opne'"):
        alkahest.opne  # noqa: B018


def test_no_pickle_and_no_eval() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                assert ast.unparse(node.func) not in ("torch.load", "pickle.load", "np.load"), path


def test_only_sources_know_a_checkpoint_by_its_class() -> None:
    asked = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_test = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
            if (is_test or isinstance(node, ast.MatchClass)) and "Checkpoint" in {
                name.id for name in ast.walk(node) if isinstance(name, ast.Name)
            }:
                asked.append(module_name(path))
    assert {name for name in asked if not name.startswith("sources.")} == set()


def test_the_program_for_launchers_leaves_the_function_as_it_is() -> None:
    code = "import alkahest.finetune, alkahest as ak, inspect; print(inspect.signature(ak.finetune))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("(config: 'Config', folder:")
    done = subprocess.run(
        [sys.executable, "-m", "alkahest.finetune", "--help"], capture_output=True, text=True, check=True
    )
    assert "Fine-tune over the GPUs that torchrun gives" in done.stdout

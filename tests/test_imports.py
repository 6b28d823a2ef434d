"""Who may import whom, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import alkahest

PACKAGE = Path(alkahest.__file__).parent

# Each module imports only modules above it. A new module takes its place here.
ORDER = [
    "__init__", "errors", "files", "atomic", "settings", "cache", "hashes", "header", "keys", "architecture", "layouts.layout", "layouts.native",
    "layouts.diffusers", "layouts", "layouts.lora", "random", "dtypes", "compiled", "term", "fused", "scalar", "expr", "algebra", "leaf", "mixture", "methods", "model_methods", "delta_methods", "recipe", "packed", "quantised",
    "locate", "checkpoint", "lora", "lora.factors", "lora.read", "lora.apply", "lora.write", "lora.convert", "made_up", "options", "output", "work", "write", "recorded", "shards", "stream", "live", "workflow", "workflow.editor", "workflow.graph", "workflow.folders", "workflow.values", "workflow.translate", "workflow.read", "workflow.write", "provenance", "rounding", "remembered",
    "tally", "delta_table", "spectrum", "lora.rank", "lora.ranks", "lora.decompose", "lora.noise", "lora.parts", "lora.result", "lora.tensor", "lora.extract", "compare", "check", "multiplier", "nodes.running", "nodes.patches", "nodes.merging", "nodes.model", "nodes.measuring", "nodes.saving", "nodes", "nodes.install",
    "mini", "components", "pipeline", "sample", "live_model", "measures", "contact_sheet", "sweep", "mini.scenes", "mini.drawing", "dataset", "encoding", "order", "finetune", "finetune.config", "finetune.events", "finetune.parallel", "finetune.plan", "finetune.inputs", "finetune.objective", "finetune.optimise", "finetune.checkpoints", "finetune.trained", "finetune.adapter", "finetune.monitor", "finetune.loop",
    "mini.models", "mini.muon", "mini.training", "mini.judge", "mini.parts", "mini.build", "mini.report", "experiment", "experiment.config", "experiment.measure", "experiment.record", "lab", "lab.figure", "lab.multiplier_plots", "lab.plots", "lab.run_plots", "lab.panel", "lab.explore", "lab.jobs", "lab.checkpoint_picker", "lab.live_merge", "lab.sampling_grid", "lab.training_monitor", "lab.panels", "lab.report", "lab.experiment_plots", "lab.reproduction", "cli.shared", "cli.checkpoints", "cli.experiment", "cli.lora", "cli.measure", "cli.mini", "cli.nodes", "cli.train", "cli", "finetune.__main__",
    "__main__",
]  # fmt: skip
# The late imports that the design allows: an expression saves itself.
LATE = {("algebra", "stream"), ("algebra", "live"), ("__init__", "*")}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, outside ``if TYPE_CHECKING``."""
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
                found.add(below if below in ORDER else module or "__init__")
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] or "__init__" for a in node.names if a.name.split(".")[0] == "alkahest"}
    return found


def test_a_module_imports_only_modules_above_it() -> None:
    files = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    files["__init__"] = files.pop("", PACKAGE / "__init__.py")
    assert set(files) == set(ORDER)
    for name, path in files.items():
        for other in imports(path):
            late = (name, other) in LATE or (name, "*") in LATE
            assert late or ORDER.index(other) < ORDER.index(name), f"{name} imports {other}, which is below it"


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
    assert set(alkahest.__all__) <= set(dir(alkahest))
    for name in alkahest.__all__:
        assert getattr(alkahest, name).__doc__, f"{name} has no docstring"
    typed = {
        alias.asname
        for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
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

"""Pages of the site's reference: functions, classes and what they give back, and which page has which name."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from types import ModuleType
from typing import Any

import docs_tables
from docs_tables import cell, code, comments

import alkahest as ak
from alkahest.lab import panels, plots

# Page of the reference: its title, and the public names on it.
GROUPS: dict[str, tuple[str, str]] = {
    "files": ("Files", "open open_part open_lora open_signs made_up Checkpoint cached clear_cache AlkahestError"),
    "algebra": ("Algebra", "Weights Delta lerp weighted_sum param method apply_lora"),
    "methods": (
        "Merge methods",
        "ties dare della breadcrumbs sce model_stock nuslerp common union slerp karcher cosine_add train_difference",
    ),
    "measuring": (
        "Measuring",
        "delta_table rolled_up delta_spectra compare comparison_matrix absorbed rounding_curve file_noise "
        "refiner_check nearest_base matching_units alignment effect",
    ),
    "multiplier": ("Which k", "needed_multiplier Multiplier fit_factors gradient_signs"),
    "loras": ("LoRAs", "extract_lora lora_ranks convert_lora"),
    "pictures": (
        "Pictures",
        "pipeline sample LiveModel sweep search picture_measures picture_difference flow_loss preference_order",
    ),
    "training": ("Training", "read_config finetune read_history memory_plan"),
    "recipes": ("Recipes and workflows", "read_recipe read_workflow write_workflow"),
}
_PLOTS = """`from alkahest.lab import plots`. [All of them drawn](../gallery.md). Each gives a plot that shows itself, with
`.alt` (the finding in words), `.png()` and `.axes`. What they take:

| | |
| --- | --- |
| `table` | of `ak.delta_table`; `tables`: several, by the name of their line |
| `spectra`, `square`, `report`, `curve` | of `ak.delta_spectra`, `ak.comparison_matrix`, `ak.extract_lora(...).report`, `ak.rounding_curve` |
| `effect`, `alignment`, `multiplier` | of `ak.effect`, `ak.alignment`, `ak.needed_multiplier` |
| `statistic` | the column that is drawn: [`STATISTICS`](options.md#statistics), of `comparison_matrix` a column of `ak.compare` |
| `k` | is marked |
| `most` | how many matrices are drawn |
| `ax`, `figure` | matplotlib's, to draw into; by default a new one |
| `title` | in place of our own |
"""
# The same of modules that people import by name.
MODULES: dict[str, tuple[str, ModuleType, str]] = {
    "panels": (
        "Panels",
        panels,
        "`from alkahest.lab import panels`: widgets for a notebook. Each returns what a cell shows.",
    ),
    "plots": ("Plots", plots, _PLOTS),
    "mini": ("Miniatures", ak.mini, "The family of small models that ships with the package; `mini:NAME` is a path."),
}
# What people call on each class; the rest is for the engine.
MEMBERS = {
    "Weights": "protect with_parts_of save stream load_into bind text",
    "Delta": "only without scaled everywhere agreeing",
    "Checkpoint": "part summary",
    "LiveModel": "set become",
}
# What functions give back that has no page of its own.
RESULTS = """
sources.partial:PartialCheckpoint sources.lora:Lora sources.signs:Signs sources.checkpoint:Part
engine.save:Saved engine.events:Event engine.scalars:Param measure.lineage:RefinerCheck measure.lineage:NearestBase
pictures.alignments:Alignment pictures.effects:Effect pictures.fitted_factors:FittedFactors lora.result:Extracted
pictures.sampler:Sampling pictures.live:Change pictures.sweeps:Cells pictures.searches:Search
pictures.preferences:PreferenceOrder training.loop:Result engine.record:Recipe workflow.translate:WorkflowRecipe
"""
# What the engine asks of everything that can be read.
_ENGINE = ("read", "stored", "factor", "check_finite", "targets", "to_json", "from_json", "moved")
_EXAMPLES = """Examples take these names as given:

```python
import alkahest as ak

bridge, base, variant = (ak.open(f"mini:{name}", name=word) for name, word in
                         [("tb1", "bridge"), ("base", "base"), ("base-variant", "variant")])
other, turbo = ak.open("mini:base-weak", name="other"), ak.open("mini:turbo", name="turbo")
prompts = ak.mini.prompts("base-variant", count=3)
pipe = ak.pipeline(bridge)
live = ak.LiveModel(bridge.protect("refiner") + ak.param("k", 1.0) * (variant - base))
```
"""


@cache
def pages() -> list[tuple[str, str, str]]:
    """Of each page of the reference its file's name, its title and its text."""
    listed = {name for _, names in GROUPS.values() for name in names.split()}
    if missing := sorted(set(ak.__all__) - listed - {"mini"}):
        raise SystemExit(f"no page of the reference has {', '.join(missing)}")
    found = [(page, title, _group(names)) for page, (title, names) in GROUPS.items()]
    found += [(page, title, _module(page, module, words)) for page, (title, module, words) in MODULES.items()]
    return [*found, ("results", "Results", "\n".join(_results())), *docs_tables.pages()]


@cache
def places() -> dict[str, str]:
    """Where a name that people write leads: a function, a result, a command, a table of values or columns."""
    found = {name: f"{page}/#{path_of(name)}" for page, (_, names) in GROUPS.items() for name in names.split()}
    for page, (_, module, _) in MODULES.items():
        found |= {f"{page}.{name}": f"{page}/#{page}.{name}" for name, _ in _functions(module)}
    found |= {path.partition(":")[2]: f"results/#{path.partition(':')[2].lower()}" for path in RESULTS.split()}
    return found | docs_tables.places()


def _group(names: str) -> str:
    """mkdocstrings' lines for public names, under the names that people call them by."""
    lines = [_EXAMPLES]
    for name in names.split():
        lines += [f"::: {path_of(name)}", "    options:", f"      heading: ak.{name}"]
        if inspect.isclass(getattr(ak, name)):
            members = ", ".join(MEMBERS.get(name, "").split())
            lines += ["      inherited_members: true", f"      members: [{members}]"]
        lines.append("")
    return "\n".join(lines)


def _module(page: str, module: ModuleType, words: str) -> str:
    lines = [words, ""]
    for name, function in _functions(module):
        lines += [f'<a id="{page}.{name}"></a>', "", f"::: {function.__module__}.{function.__qualname__}"]
        lines += ["    options:", f"      heading: {page}.{name}", ""]
    return "\n".join(lines)


def _functions(module: ModuleType) -> Iterator[tuple[str, Any]]:
    names = sorted(vars(module)["__all__"])
    yield from ((name, found) for name in names if inspect.isfunction(found := getattr(module, name)))


def _results() -> Iterator[str]:
    for path in RESULTS.split():
        module, _, name = path.partition(":")
        kind = getattr(importlib.import_module(f"alkahest.{module}"), name)
        yield f"## {name} {{ #{name.lower()} }}\n\n{_plain(inspect.getdoc(kind) or '')}\n"
        yield from _fields(kind)
        yield from _members(kind)
        yield ""


def _fields(kind: type) -> Iterator[str]:
    """A row for each field of a result that a comment beside it explains; others are the engine's own."""
    told = {name: words for base in reversed(_own(kind)) for name, words in comments(base).items()}
    names = [one.name for one in fields(kind)] if is_dataclass(kind) else [*told]
    if rows := [name for name in names if name in told]:
        yield "| | |\n| --- | --- |"
        yield from (f"| {code(name)} | {cell(told[name])} |" for name in rows)
        yield ""


def _own(kind: type) -> list[type]:
    """The class and those above it that are not explained elsewhere."""
    engine = ("alkahest.algebra.", "alkahest.engine.expression", "alkahest.engine.readable")
    return [
        one for one in kind.__mro__ if one.__module__.startswith("alkahest.") and not one.__module__.startswith(engine)
    ]


def _members(kind: type) -> Iterator[str]:
    named = {
        name: value for base in reversed(_own(kind)) for name, value in vars(base).items() if not name.startswith("_")
    }
    rows = []
    for name, value in named.items():
        function = getattr(value, "fget", getattr(value, "func", getattr(value, "__func__", value)))
        doc = inspect.getdoc(function) if callable(function) else ""
        if doc and name not in _ENGINE:
            call = "" if function is not value and not isinstance(value, classmethod) else _call(function)
            rows.append(f"| {code(name + call)} | {cell(_sentence(doc))} |")
    if rows:
        yield "| | |\n| --- | --- |"
        yield from rows


def _sentence(doc: str) -> str:
    """The first one, without its stop."""
    first = _plain(doc).split("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<!et al)\. (?=[A-Z])", first)[0].rstrip(".")


def _call(function: Any) -> str:
    own = [one for one in inspect.signature(function).parameters.values() if one.name not in ("self", "cls")]
    shown = [one.name if one.default is inspect.Parameter.empty else f"{one.name}={one.default!r}" for one in own]
    return f"({', '.join(shown)})"


def _plain(doc: str) -> str:
    """A docstring as Markdown."""
    doc = re.sub(r"(?m)^((?:>>> .*(?:\n(?!\n).+)*\n?)+)", r"```python\n\1\n```\n", doc)
    return re.sub(r"``([^`].*?)``", r"`\1`", doc, flags=re.DOTALL)


def path_of(name: str) -> str:
    """Where a public name lives."""
    found = getattr(ak, name)
    return f"{found.__module__}.{found.__qualname__}"

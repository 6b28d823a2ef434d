"""Pages of the site that are made from the package: its reference, its notebooks, and files that lie elsewhere."""

from __future__ import annotations

import html
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import alkahest as ak
from alkahest.cli import app
from alkahest.experiment import config as experiments
from alkahest.training import config as training

ROOT = Path(__file__).parent.parent
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
# Tables of the package: where their columns are told, and what makes them.
TABLES = {
    "delta_table": ("alkahest.measure.table", "COLUMNS"),
    "delta_spectra": ("alkahest.measure.spectrum", "SPECTRUM"),
    "compare": ("alkahest.measure.pairs", "COMPARISON"),
    "matching_units": ("alkahest.measure.units", "UNITS"),
    "alignment": ("alkahest.pictures.alignments", "ALIGNMENT"),
    "effect": ("alkahest.pictures.effects", "EFFECT"),
    "extract_lora": ("alkahest.lora.result", "REPORT"),
}
ELSEWHERE = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The order of pages."""
    reference = [{title: f"reference/{page}.md"} for page, (title, _) in GROUPS.items()]
    made = [{"Commands": "commands"}, {"Columns of tables": "tables"}, {"TOML": "toml"}]
    reference += [{title: f"reference/{page}.md"} for one in made for title, page in one.items()]
    notebooks = [f"notebooks/{path.name}" for path in _notebooks()]
    config.nav = [
        {"Alkahest": "index.md"},
        {"Coming from": "coming-from.md"},
        {"Questions": "questions.md"},
        {"Reference": reference},
        {"Notebooks": notebooks},
        {"Glossary": "glossary.md"},
        {"Design": "architecture.md"},
        {"Contributing": "contributing.md"},
        {"Changelog": "changelog.md"},
    ]
    return config


@event_priority(100)
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is made, and what lies outside docs."""
    for name, text in _made():
        files.append(File.generated(config, name, content=text))
    for name, path in ELSEWHERE.items():
        files.append(File.generated(config, name, content=_moved((ROOT / path).read_text())))
    for path in _notebooks():
        files.append(File(f"notebooks/{path.name}", str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def _notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def _made() -> Iterator[tuple[str, str]]:
    listed = {name for _, names in GROUPS.values() for name in names.split()}
    if missing := sorted(set(ak.__all__) - listed - {"mini"}):
        raise SystemExit(f"no page of the reference has {', '.join(missing)}")
    for page, (title, names) in GROUPS.items():
        yield f"reference/{page}.md", f"# {title}\n\n" + "\n\n".join(_entry(name) for name in names.split())
    yield "reference/commands.md", "# Commands\n\n" + "\n".join(_commands())
    yield "reference/tables.md", "# Columns of tables\n\n" + "\n".join(_tables())
    yield "reference/toml.md", "# TOML of runs and experiments\n\n" + "\n".join(_toml())


def _entry(name: str) -> str:
    """mkdocstrings' line for a public name, under the name that people call it by."""
    return f"::: {_path(name)}\n    options:\n      heading: ak.{name}"


def _commands() -> Iterator[str]:
    context = typer.Context(typer.main.get_command(app), info_name="alkahest")
    yield from _command(context.command, context, 2)


def _command(command: Any, context: Any, level: int) -> Iterator[str]:
    inner = getattr(command, "commands", {})
    if level > 2 or not inner:
        yield f"{'#' * level} {context.command_path}\n"
        yield f"{inspect.cleandoc(command.help or '')}\n"
        yield from _options(command, context)
    for name, one in inner.items():
        yield from _command(one, type(context)(one, info_name=name, parent=context), level + 1)


def _options(command: Any, context: Any) -> Iterator[str]:
    rows = [one.get_help_record(context) for one in command.params if getattr(one, "hidden", False) is False]
    yield "| | |\n| --- | --- |"
    for row in filter(None, rows):
        yield f"| {_code(row[0])} | {_cell(html.escape(row[1]))} |"
    yield ""


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _code(text: object) -> str:
    """Code in a table, where bars, brackets and the like would be read as Markdown."""
    shown = html.escape(" ".join(str(text).split()))
    return f"<code>{re.sub(r'[][|*_`]', lambda mark: f'&#{ord(mark[0])};', shown)}</code>"


def _tables() -> Iterator[str]:
    for name, (module, attribute) in TABLES.items():
        told: Mapping[str, str] = getattr(importlib.import_module(module), attribute)
        yield f"## {name}\n\nOf `ak.{name}`.\n\n| column | |\n| --- | --- |"
        yield from (f"| `{column}` | {_cell(html.escape(words))} |" for column, words in told.items())
        yield ""


def _toml() -> Iterator[str]:
    for title, kinds in (
        ("Training", (training.Config, training.Stage)),
        ("Experiments", (experiments.Experiment, experiments.Run, experiments.Case, experiments.Check)),
    ):
        yield f"## {title}\n"
        for kind in kinds:
            yield f"### {kind.__name__}\n\n{inspect.getdoc(kind)}\n"
            yield "| key | type | default | |\n| --- | --- | --- | --- |"
            comments = _comments(kind)
            for one in fields(kind):
                default = "" if one.default is MISSING else _code(repr(one.default))
                yield f"| {_code(one.name)} | {_code(one.type)} | {default} | {_cell(comments.get(one.name, ''))} |"
            yield ""


def _comments(kind: type) -> dict[str, str]:
    """What the comment beside each field says."""
    lines = re.findall(r"^    (\w+): [^#\n]*#\s*(.*(?:\n    # .*)*)$", inspect.getsource(kind), re.MULTILINE)
    return {name: " ".join(text.replace("#", " ").split()) for name, text in lines}


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Names of public functions in running text lead to the reference."""
    places = {name: f"{page}/#{_path(name)}" for page, (_, names) in GROUPS.items() for name in names.split()}
    up = "../" * (page.url.count("/") if page.url else 0)

    def linked(match: re.Match[str]) -> str:
        name = match["name"]
        return f'<a href="{up}reference/{places[name]}">{match[0]}</a>' if name in places else match[0]

    pieces = re.split(r"(<pre.*?</pre>|<a .*?</a>|<h\d.*?</h\d>)", content, flags=re.DOTALL)
    found = re.compile(r"<code>(?:ak\.)?(?P<name>\w+)(?:\([^<]*\))?</code>")
    return "".join(piece if number % 2 else found.sub(linked, piece) for number, piece in enumerate(pieces))


def _path(name: str) -> str:
    found = getattr(ak, name)
    return f"{found.__module__}.{found.__qualname__}"


def _moved(text: str) -> str:
    """A file of the repository's top as a page: its links into docs are links to pages."""
    return re.sub(r"\]\(docs/", "](", text)

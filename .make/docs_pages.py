"""Pages of the site that are made from the package: its reference, its notebooks, and files that lie elsewhere."""

from __future__ import annotations

import html
import importlib
import inspect
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import gallery
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import alkahest as ak
from alkahest.cli import app
from alkahest.experiment import config as experiments
from alkahest.mini.scenes import ATTRIBUTES
from alkahest.pictures.settings import Sampling
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
# Values of options that have words of their own: whose, where they are told.
OPTIONS = {
    "RULES": ("extract_lora and lora_ranks: how much is kept", "alkahest.lora.rank"),
    "BASES": ("needed_multiplier: basis, its target unless told, and what it means", "alkahest.measure.bases"),
    "FLAVOURS": ("convert_lora: flavour, and how its names begin", "alkahest.lora.write"),
    "KINDS": ("clear_cache: kind", "alkahest.files.cache"),
    "STATISTICS": ("delta_magnitudes and magnitude_heatmap: statistic", "alkahest.lab.plots"),
}
# What people call on each class; the rest is for the engine.
MEMBERS = {
    "Weights": "protect with_parts_of save stream load_into bind text",
    "Delta": "only without scaled everywhere agreeing",
    "Checkpoint": "part summary",
    "LiveModel": "set become",
}
# Page: the file that it is, at the top of the repository.
ELSEWHERE = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
GUIDES = "files merging measuring which-k loras pictures training comfyui command-line machines costs"
# Keys of TOML files: the heading over each table, and the type that it becomes.
KEYS: dict[str, dict[str, type]] = {
    "Training": {"A run": training.Config, "Each [[stage]]": training.Stage, "lora": training._Lora},
    "Data of training": {"Scenes": training._Scenes, "Drawn": training._Drawn, "Sampling": Sampling},
    "Experiments": {
        "An experiment": experiments.Experiment,
        **{f"Each [[{name}]]": kind for name, (_, kind) in experiments.LISTED.items()},
    },
}
_DATA = """Each table under `[data]` has one of three keys:

| key | |
| --- | --- |
| `folder = "people"` | pictures with a `.txt`, `.caption` or `.json` beside each, or a `metadata.jsonl` or `.csv` |
| `scenes = { count = 2000, seed = 1, subject = ["man", "woman"] }` | the miniature world, see Scenes |
| `drawn = { models = { base = { steps = 20 } }, prompts = "prompts.txt" }` | what inputs of the run draw, see Drawn |
"""
_drawn: dict[str, str] = {}  # page -> its text with pictures in it
_LINK = re.compile(r"(!?)\[([^][]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The order of pages."""
    reference = [{title: f"reference/{page}.md"} for page, (title, _) in GROUPS.items()]
    made = [
        {"Commands": "commands"},
        {"Columns of tables": "tables"},
        {"Values of options": "options"},
        {"TOML": "toml"},
    ]
    reference += [{title: f"reference/{page}.md"} for one in made for title, page in one.items()]
    notebooks = [f"notebooks/{path.name}" for path in _notebooks()]
    config.nav = [
        {"Alkahest": "index.md"},
        {"Guide": [f"guide/{name}.md" for name in GUIDES.split()]},
        {"Coming from": "coming-from.md"},
        {"Questions": "questions.md"},
        {"Reference": reference},
        {"Notebooks": notebooks},
        {"Findings": ["experiments/README.md", *_experiments()]},
        {"Gallery": "gallery.md"},
        {"Glossary": "glossary.md"},
        {"Design": ["architecture.md", "exactness.md", "limits.md"]},
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
        files.append(File.generated(config, name, content=(ROOT / path).read_text()))
    _drawn["gallery.md"], pictures = gallery.draw((ROOT / "docs/gallery.md").read_text())
    for name, picture in pictures.items():
        files.append(File.generated(config, name, content=picture))
    pages = [f"notebooks/{path.name}" for path in _notebooks()] + ["experiments/README.md", *_experiments()]
    for name in [*pages, *_pictures([*files, *(ROOT / page for page in pages)])]:
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def _notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def _experiments() -> list[str]:
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "experiments").glob("[0-9]*/README.md"))]


def _pictures(pages: Iterable[File | Path]) -> set[str]:
    """Pictures outside docs that pages show."""
    found = set()
    for page in pages:
        path = page if isinstance(page, Path) else Path(page.abs_src_path or "")
        if path.suffix == ".md" and path.is_file():
            shown = (match[3] for match in _LINK.finditer(path.read_text()) if match[1])
            found |= {os.path.relpath(path.parent / one, ROOT) for one in shown}
    return {name for name in found if not name.startswith(("docs/", ".."))}


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the repository lead to their pages; what has none is named."""
    own = page.file.src_uri
    markdown = _drawn.get(own, markdown)
    at = ELSEWHERE.get(own, own if own.startswith(("experiments/", "notebooks/")) else f"docs/{own}")
    known = {path: name for name, path in ELSEWHERE.items()} | {"README.md": "index.md"}

    def linked(match: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(at), match[3]))
        target = f"{target}/README.md" if (ROOT / target / "README.md").is_file() else target
        name = known.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(name) is None:
            return match[2]
        place = os.path.relpath(name, os.path.dirname(own) or ".")
        return f"{match[1]}[{match[2]}]({place}{match[4] or ''})"

    return _LINK.sub(linked, markdown)


def _made() -> Iterator[tuple[str, str]]:
    listed = {name for _, names in GROUPS.values() for name in names.split()}
    if missing := sorted(set(ak.__all__) - listed - {"mini"}):
        raise SystemExit(f"no page of the reference has {', '.join(missing)}")
    for page, (title, names) in GROUPS.items():
        yield f"reference/{page}.md", f"# {title}\n\n" + "\n\n".join(_entry(name) for name in names.split())
    yield "reference/commands.md", "# Commands\n\n" + "\n".join(_commands())
    yield "reference/tables.md", "# Columns of tables\n\n" + "\n".join(_tables())
    yield "reference/options.md", "# Values of options\n\n" + "\n".join(_values())
    yield "reference/toml.md", "# TOML of runs and experiments\n\n" + "\n".join(_toml())


def _entry(name: str) -> str:
    """mkdocstrings' line for a public name, under the name that people call it by."""
    lines = [f"::: {_path(name)}", "    options:", f"      heading: ak.{name}"]
    if inspect.isclass(getattr(ak, name)):
        lines += ["      inherited_members: true", f"      members: [{', '.join(MEMBERS.get(name, '').split())}]"]
    return "\n".join(lines)


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


def _values() -> Iterator[str]:
    for name, (title, module) in OPTIONS.items():
        told: Mapping[str, Any] | Iterable[str] = getattr(importlib.import_module(module), name)
        yield f"## {title} {{ #{name.lower()} }}\n\n| value | |\n| --- | --- |"
        for value in told:
            words = told[value] if isinstance(told, Mapping) else ""
            several = (
                words if isinstance(words, tuple) else vars(words).values() if hasattr(words, "__dict__") else [words]
            )
            shown = "; ".join(str(one) for one in several if isinstance(one, str | float))
            yield f"| {_code(repr(value))} | {_cell(html.escape(shown))} |"
        yield ""


def _toml() -> Iterator[str]:
    for title, kinds in KEYS.items():
        yield f"## {title}\n"
        if title == "Data of training":
            yield _DATA
        for heading, kind in kinds.items():
            yield f"### {heading}\n\n{inspect.getdoc(kind)}\n"
            yield "| key | type | default | |\n| --- | --- | --- | --- |"
            yield from _keys(kind)
            yield ""


def _keys(kind: type) -> Iterator[str]:
    """A row for each key of a table, named as the file names it."""
    comments = _comments(kind)
    tables = {field: f"[[{name}]]" for name, (field, _) in experiments.LISTED.items()} | {"stages": "[[stage]]"}
    for one in fields(kind):
        if one.name == "folder":  # where the file lies, which no key says
            continue
        default = "" if one.default is MISSING else _code(repr(one.default))
        words = comments.get(one.name) or ", ".join(ATTRIBUTES.get(one.name, ()))
        if not words:
            raise SystemExit(f"{kind.__name__}.{one.name} says nothing of what it is")
        if one.name in tables:
            yield f"| {_code(tables[one.name])} | tables | | {_cell(words)} |"
        else:
            yield f"| {_code(one.name)} | {_code(one.type)} | {default} | {_cell(words)} |"


def _comments(kind: type) -> dict[str, str]:
    """What the comment beside each field says."""
    lines = re.findall(r"^    (\w+): [^#\n]*#\s*(.*(?:\n    # .*)*)$", inspect.getsource(kind), re.MULTILINE)
    return {name: " ".join(text.replace("#", " ").split()) for name, text in lines}


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Names of public functions in running text lead to the reference."""
    places = {name: f"{page}/#{_path(name)}" for page, (_, names) in GROUPS.items() for name in names.split()}
    places |= {name: f"options/#{name.lower()}" for name in OPTIONS}
    places |= {name: f"tables/#{table}" for table, (_, name) in TABLES.items()} | {"DATA": "toml/#data-of-training"}
    up = "../" * (page.url.count("/") if page.url else 0)

    def linked(match: re.Match[str]) -> str:
        name = match["name"]
        return f'<a href="{up}reference/{places[name]}">{match[0]}</a>' if name in places else match[0]

    pieces = re.split(r"(<pre.*?</pre>|<a .*?</a>|<h\d.*?</h\d>)", content, flags=re.DOTALL)
    found = re.compile(r"<code>(?:ak\.|alkahest\.[a-z._]+\.)?(?P<name>\w+)(?:\([^<]*\))?</code>")
    return "".join(piece if number % 2 else found.sub(linked, piece) for number, piece in enumerate(pieces))


def _path(name: str) -> str:
    found = getattr(ak, name)
    return f"{found.__module__}.{found.__qualname__}"

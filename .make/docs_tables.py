"""Pages of the site's reference that are tables: commands, nodes, columns, values of options, keys of TOML."""

from __future__ import annotations

import html
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any

import typer

from alkahest import nodes
from alkahest.cli import app
from alkahest.engine.options import DEVICES, ROUNDINGS
from alkahest.experiment import config as experiments
from alkahest.lab.models import KEYS as MODELS
from alkahest.lora.decompose import METHODS
from alkahest.lora.write import FLAVOURS
from alkahest.measure.table import COLUMNS
from alkahest.mini.scenes import ATTRIBUTES
from alkahest.model.dtypes import FP8, STORAGES
from alkahest.model.families.zimage import FAMILY
from alkahest.pictures.settings import SCHEDULES, Sampling
from alkahest.training import config as training

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
_BY_TENSOR = ("delta_spectra", "compare", "matching_units", "extract_lora")
# Values of options that have words of their own in the package: whose, where they are told.
OPTIONS = {
    "RULES": ("extract_lora and lora_ranks: how much is kept", "alkahest.lora.rank"),
    "BASES": (
        "needed_multiplier: basis on weights, its target unless told, and what it means",
        "alkahest.measure.bases",
    ),
    "KINDS": ("clear_cache: kind", "alkahest.files.cache"),
    "STATISTICS": ("delta_magnitudes and magnitude_heatmap: statistic", "alkahest.lab.plots"),
}
# The same of options whose values are plain names there: where these are, and what they mean.
MEANT: dict[str, tuple[str, Iterable[str], dict[str, str]]] = {
    "dtype": (
        "save, merge and convert: dtype",
        STORAGES,
        {
            "fp32": "four bytes a number",
            "fp16": "two; what is above 65504 is refused",
            "bf16": "two; fp32's range with 8 bits of precision",
            "fp8_e4m3fn": "one, of the Linears of the block stacks; the rest is bf16. Largest 448",
            "fp8_e5m2": "one, likewise, with more range and less precision. Largest 57344",
            "comfy_quant": "fp8_e4m3fn with a scale for each matrix, in ComfyUI's present spelling",
            "scaled_fp8": "the same in its older spelling",
        },
    ),
    "layout": (
        "save, merge and convert: layout",
        [*(one.name for one in FAMILY.layouts), "all-in-one"],
        {
            "native": "the names of the published single files, which ComfyUI reads",
            "diffusers": "those of diffusers' transformer folders; q, k and v apart",
            "all-in-one": "native, with the other models (VAE, text encoder) of the leading file beside it",
        },
    ),
    "rounding": (
        "save, merge and convert: rounding",
        ROUNDINGS,
        {
            "nearest": "to the nearest number of the dtype, ties to even",
            "stochastic": "up or down by chance, with seed",
        },
    ),
    "device": (
        "whatever computes: device",
        DEVICES,
        {"cpu": "the processor", "cuda": "an NVIDIA or AMD card", "mps": "Apple's", "xpu": "Intel's"},
    ),
    "method": (
        "extract_lora: method of the decomposition",
        METHODS,
        {
            "auto": "exact for small matrices, else randomised",
            "exact": "every singular value",
            "randomised": "the largest ones, by random projections (Halko et al. 2011) and with their error known",
        },
    ),
    "flavour": (
        "convert_lora and extract_lora: flavour",
        FLAVOURS,
        {
            "comfyui": "diffusion_model.…: ComfyUI and diffusers both load all of it",
            "diffusers": "transformer.…: diffusers' own, scales folded in",
            "peft": "base_model.model.…: peft's own, scales folded in",
            "kohya": "lora_unet_…, with q, k and v of an attention as one: sd-scripts and what reads its files",
            "kohya-split": "lora_unet_…, with q, k and v apart",
            "fused": "diffusion_model.…, with q, k and v of an attention as one, as trainers of the native model write",
        },
    ),
    "schedule": (
        "sample: schedule",
        SCHEDULES,
        {"diffusers": "noise levels evenly spaced before the shift", "simple": "ComfyUI's scheduler of that name"},
    ),
    "storage": (
        "pipeline and what draws: storage",
        FP8,
        {
            "fp8_e4m3fn": "the transformer's Linears in fp8, half the memory of bf16",
            "fp8_e5m2": "likewise, with more range",
        },
    ),
}
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


def pages() -> list[tuple[str, str, str]]:
    """Of each page its file's name, its title and its text."""
    made = {
        ("commands", "Commands"): _commands(),
        ("nodes", "Nodes of ComfyUI"): _nodes(),
        ("tables", "Columns of tables"): _tables(),
        ("options", "Values of options"): _values(),
        ("toml", "TOML of runs and experiments"): _toml(),
    }
    return [(page, title, "\n".join(lines)) for (page, title), lines in made.items()]


def places() -> dict[str, str]:
    """Where a command, a constant of values or columns, or kinds of data lead."""
    found = {name: f"options/#{name.lower()}" for name in OPTIONS} | {"FLAVOURS": "options/#flavour"}
    found |= {name: f"tables/#{table}" for table, (_, name) in TABLES.items()} | {"DATA": "toml/#data-of-training"}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        found |= {f"alkahest {one}": f"commands/#alkahest-{one.replace(' ', '-')}" for one in _names(name, command)}
    return found


def _names(name: str, command: Any) -> list[str]:
    return [name, *(f"{name} {inner}" for inner in getattr(command, "commands", {}))]


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
        yield f"| {code(row[0])} | {cell(html.escape(row[1]))} |"
    yield ""


def cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def code(text: object) -> str:
    """Code in a table, where bars, brackets and the like would be read as Markdown."""
    shown = html.escape(" ".join(str(text).split()))
    return f"<code>{re.sub(r'[][|*_`]', lambda mark: f'&#{ord(mark[0])};', shown)}</code>"


def _nodes() -> Iterator[str]:
    for name, kind in nodes.NODE_CLASS_MAPPINGS.items():
        yield f"## {nodes.NODE_DISPLAY_NAME_MAPPINGS[name]}\n\n{kind.DESCRIPTION}\n"
        yield "| input | type | default | range | |\n| --- | --- | --- | --- | --- |"
        for group in ("required", "optional"):
            for one, (what, *more) in kind.INPUT_TYPES().get(group, {}).items():
                yield _input(one, what, more[0] if more else {})
        given = getattr(kind, "RETURN_NAMES", getattr(kind, "RETURN_TYPES", ()))
        yield f"\nGives {', '.join(given) or 'nothing: it writes a file'}.\n"


def _input(name: str, what: Any, more: Mapping[str, Any]) -> str:
    shown = what if isinstance(what, str) else ", ".join(what)
    least, most = more.get("min"), more.get("max")
    within = f"{least:,} to {most:,}" if least is not None and most is not None else ""
    default = code(repr(more["default"])) if "default" in more else ""
    return f"| {code(name)} | {shown} | {default} | {within} | {cell(more.get('tooltip', ''))} |"


def _tables() -> Iterator[str]:
    for name, (module, attribute) in TABLES.items():
        told: Mapping[str, str] = getattr(importlib.import_module(module), attribute)
        if "tensor" not in told and name in _BY_TENSOR:
            told = {one: COLUMNS[one] for one in ("tensor", "part", "block", "module", "shape")} | dict(told)
        yield f"## {name}\n\nOf `ak.{name}`.\n\n| column | |\n| --- | --- |"
        yield from (f"| `{column}` | {cell(html.escape(words))} |" for column, words in told.items())
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
            yield f"| {code(repr(value))} | {cell(html.escape(shown))} |"
        if name == "BASES":
            yield "| <code>'pictures'</code> | what pictures say; the default where prompts or pictures are given |"
        yield ""
    for name, (title, known, meant) in MEANT.items():
        if set(known) != set(meant):
            raise SystemExit(f"the values of {name} are {', '.join(known)}")
        yield f"## {title} {{ #{name} }}\n\n| value | |\n| --- | --- |"
        yield from (f"| {code(repr(value))} | {cell(html.escape(words))} |" for value, words in meant.items())
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
    yield "## models.toml\n\nWhere your files are, for all notebooks: `panels.models_picker` writes it."
    yield "What is not named is a miniature.\n"
    yield "| key | what it is | the miniature in its place |\n| --- | --- | --- |"
    yield from (f"| {code(name)} | {cell(words)} | {code(f'mini:{mini}')} |" for name, (words, mini) in MODELS.items())
    words = "text encoder, tokenizer, VAE and scheduler: a pipeline folder, a hub id, or a table of files"
    yield f"| {code('components')} | {words} | the family's |"


def _keys(kind: type) -> Iterator[str]:
    """A row for each key of a table, named as the file names it."""
    told = comments(kind)
    tables = {field: f"[[{name}]]" for name, (field, _) in experiments.LISTED.items()} | {"stages": "[[stage]]"}
    for one in fields(kind):
        if one.name == "folder":  # where the file lies, which no key says
            continue
        default = "" if one.default is MISSING else code(repr(one.default))
        words = told.get(one.name) or ", ".join(ATTRIBUTES.get(one.name, ()))
        if not words:
            raise SystemExit(f"{kind.__name__}.{one.name} says nothing of what it is")
        if one.name in tables:
            yield f"| {code(tables[one.name])} | tables | | {cell(words)} |"
        else:
            yield f"| {code(one.name)} | {code(one.type)} | {default} | {cell(words)} |"


def comments(kind: type) -> dict[str, str]:
    """What the comment beside each field says."""
    lines = re.findall(r"^    (\w+): [^#\n]*#\s*(.*(?:\n    # .*)*)$", inspect.getsource(kind), re.MULTILINE)
    return {name: " ".join(text.replace("#", " ").split()) for name, text in lines}

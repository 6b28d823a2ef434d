"""Pages of the site and their order: what lies in docs, what the package makes, and what lies elsewhere."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import docs_reference
import gallery
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# Page: the file that it is, at the top of the repository.
ELSEWHERE = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
GUIDES = "install files merging measuring which-k loras pictures training comfyui command-line machines costs"
_drawn: dict[str, str] = {}  # page -> its text with pictures in it
_PICTURE = re.compile(r"!\[[^][]*\]\((?!https?:)([^)#\s]+)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The order of pages."""
    reference = [{title: f"reference/{page}.md"} for page, title, _ in docs_reference.pages()]
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
    for page, title, text in docs_reference.pages():
        files.append(File.generated(config, f"reference/{page}.md", content=f"# {title}\n\n{text}"))
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
            shown = (match[1] for match in _PICTURE.finditer(path.read_text()))
            found |= {os.path.relpath(path.parent / one, ROOT) for one in shown}
    return {name for name in found if not name.startswith(("docs/", ".."))}


@event_priority(50)
def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The gallery with its pictures; and what a search finds first: the reference and the guide, then the rest."""
    place = page.file.src_uri
    page.meta.setdefault("search", {"boost": 0.3 if place.startswith(("notebooks/", "experiments/")) else 1.5})
    return _drawn.get(place, markdown)

"""Links of the site: between files of the repository, from names of functions and commands; all of them must live."""

from __future__ import annotations

import os
import re
import urllib.parse
from functools import cache
from pathlib import Path

import docs_reference
from docs_pages import ELSEWHERE, ROOT
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

_LINK = re.compile(r"(!?)\[([^][]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
_ANCHOR = re.compile(r'<a ([^>]*)href="(?!https?:|mailto:|#|data:)([^"#]*)(#[^"]*)?"([^>]*)>(.*?)</a>', re.DOTALL)
# Where no name is one of ours: code, links, headings, names of parameters and the first column of a table.
_APART = re.compile(r"(<pre.*?</pre>|<a .*?</a>|<h\d.*?</h\d>|<b>.*?</b>|<tr>\s*<td[^>]*>.*?</td>)", re.DOTALL)
_NAME = re.compile(r"<code>(?P<ak>ak\.|alkahest\.[a-z._]+\.)?(?P<name>[\w.]+)(?:\([^<]*\))?</code>")
_COMMAND = re.compile(r"<code>alkahest (?P<words>[a-z-]+(?: [a-z-]+)*)[^<]*</code>")
_TYPE = re.compile(r'<span title="alkahest\.[^"]*">(?P<name>\w+)</span>')


@event_priority(-50)
def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the repository lead to their pages; what has none is named."""

    def linked(match: re.Match[str]) -> str:
        place = _page_of(match[3], page, files)
        return match[2] if place is None else f"{match[1]}[{match[2]}]({place}{match[4] or ''})"

    return _LINK.sub(linked, markdown)


def _page_of(target: str, page: Page, files: Files) -> str | None:
    """A file of the repository, named from where the page's own lies, as the site's page of it."""
    own = page.file.src_uri
    at = ELSEWHERE.get(own, own if own.startswith(("experiments/", "notebooks/")) else f"docs/{own}")
    known = {path: name for name, path in ELSEWHERE.items()} | {"README.md": "index.md"}
    meant = os.path.normpath(os.path.join(os.path.dirname(at), target))
    meant = f"{meant}/README.md" if (ROOT / meant / "README.md").is_file() else meant
    name = known.get(meant, meant.removeprefix("docs/"))
    return os.path.relpath(name, os.path.dirname(own) or ".") if files.get_file_from_path(name) else None


@event_priority(-50)
def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of notebooks lead to pages; names of functions, commands and results lead to the reference."""
    up = "../" * (page.url.count("/") if page.url else 0)
    if page.file.src_uri.startswith("notebooks/"):
        content = _ANCHOR.sub(lambda match: _from_notebook(match, page, files, up), content)

    def named(match: re.Match[str]) -> str:
        name = match["name"].removeprefix("ak.")
        place = None if name == "method" and not match["ak"] else docs_reference.places().get(name)
        return f'<a href="{up}reference/{place}">{match[0]}</a>' if place else match[0]

    def commanded(match: re.Match[str]) -> str:
        words = match["words"].split()
        known = (place for n in (2, 1) if (place := docs_reference.places().get(f"alkahest {' '.join(words[:n])}")))
        place = next(known, None)
        return f'<a href="{up}reference/{place}">{match[0]}</a>' if place else match[0]

    pieces = _APART.split(content)
    pieces = [piece if n % 2 else _COMMAND.sub(commanded, _NAME.sub(named, piece)) for n, piece in enumerate(pieces)]
    return _TYPE.sub(named, "".join(pieces))


def _from_notebook(match: re.Match[str], page: Page, files: Files, up: str) -> str:
    before, target, anchor, after, words = match.groups()
    if target.endswith(Path(page.file.src_uri).name):  # the notebook itself, to be downloaded
        return match[0]
    place = _page_of(urllib.parse.unquote(target), page, files)
    found = files.get_file_from_path(os.path.normpath(os.path.join("notebooks", place))) if place else None
    if found is None:
        return words
    # The README's headings are spread over pages of the guide.
    return f'<a {before}href="{up}{found.url}{"" if target.endswith("README.md") else anchor or ""}"{after}>{words}</a>'


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site with a link to nothing: mkdocs itself looks at Markdown alone."""
    site = Path(config.site_dir)
    dead = [f"{page.relative_to(site)}: {link}" for page in sorted(site.rglob("*.html")) for link in _dead(page, site)]
    if dead:
        raise PluginError("links to nothing:\n" + "\n".join(dead))


def _dead(page: Path, site: Path) -> list[str]:
    found = []
    for link in sorted(set(re.findall(r'<(?:a|link|img|script)\b[^>]*?\s(?:href|src)="([^"]+)"', page.read_text()))):
        parts = urllib.parse.urlsplit(link.replace("&amp;", "&"))
        if parts.scheme or parts.netloc or page.name == "404.html":
            continue
        target = (page.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else page
        target = target / "index.html" if target.is_dir() else target
        anchor = urllib.parse.unquote(parts.fragment)
        if not target.is_file() or (anchor and target.suffix == ".html" and anchor not in _anchors(target)):
            found.append(link)
    return found


@cache
def _anchors(page: Path) -> set[str]:
    return {"__top", "__skip"} | set(re.findall(r'\s(?:id|name)="([^"]*)"', page.read_text()))

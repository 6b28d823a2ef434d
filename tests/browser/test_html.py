"""Notebooks as HTML, without a kernel: every picture is there, those of widgets too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbconvert import HTMLExporter
from notebook_runs import NOTEBOOKS

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser(chromium: str) -> Any:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_every_figure_is_there(path: Path, browser: Any, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    exporter = HTMLExporter()
    exporter.display_data_priority = ["image/png", "text/html", "text/markdown", "text/plain"]
    text, _ = exporter.from_notebook_node(notebook)
    (tmp_path / "notebook.html").write_text(text)
    page = browser.new_page()
    page.route(
        "**/*", lambda route: route.continue_() if route.request.url.startswith(("file:", "data:")) else route.abort()
    )
    page.goto((tmp_path / "notebook.html").as_uri(), wait_until="domcontentloaded")
    sizes = page.evaluate(
        "() => Promise.all([...document.images].map(image => image.decode().then(() => image.naturalWidth, () => 0)))"
    )
    stored = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(sizes) >= len(stored)
    assert all(width > 0 for width in sizes)
    assert stored
    page.close()

"""A real JupyterLab, driven through Debian's Chromium."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

TOKEN = "for-tests"
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        reason = "no Chromium here; apt-get install chromium"
        if os.environ.get("ALKAHEST_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture(scope="session")
def lab(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server's address, and the folder it serves."""
    folder, home = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("home")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = home / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    # A home of its own: no settings or workspaces of whoever runs the tests.
    environment = {
        **os.environ,
        "HOME": str(home),
        "JUPYTER_CONFIG_DIR": str(home),
        "JUPYTER_DATA_DIR": str(home),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "lab" / "user-settings"),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "lab",
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        f"--IdentityProvider.token={TOKEN}",
        "--LabApp.news_url=None",
        f"--ServerApp.root_dir={folder}",
    ]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            if server.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{address}/api/status?token={TOKEN}", timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail("JupyterLab did not start: " + (folder / "server.log").read_text()[-2000:])
        yield address, folder
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture
def opened(lab: tuple[str, Path], chromium: str) -> Iterator[Callable[..., Any]]:
    """Open cells, or a notebook that there is, in the browser, run them all, and give the page."""
    from playwright.sync_api import sync_playwright

    address, folder = lab
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=_FLAGS)

        pages: dict[str, Any] = {}

        def notebook(name: str, *cells: str, dark: bool = False, source: Path | None = None, height: int = 1500) -> Any:
            made = (
                nbformat.read(source, as_version=4)
                if source
                else nbformat.v4.new_notebook(
                    cells=[nbformat.v4.new_code_cell(cell) for cell in cells],
                    metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
                )
            )
            nbformat.write(made, folder / f"{name}.ipynb")
            page = browser.new_page(viewport={"width": 1280, "height": height})
            pages[name] = page
            page.goto(f"{address}/lab/tree/{name}.ipynb?token={TOKEN}&reset")
            page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=60_000)
            if dark:
                page.get_by_role("menuitem", name="Settings", exact=True).click()
                page.get_by_text("Theme", exact=True).hover()
                page.get_by_text("JupyterLab Dark", exact=True).click()
                page.wait_for_selector("body[data-jp-theme-light='false']", state="attached")
            page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_text("Run All Cells", exact=True).click()
            return page

        yield notebook
        for name, page in pages.items():  # to look at, above all when a test has failed
            page.screenshot(path=folder / f"{name}.png")
        browser.close()

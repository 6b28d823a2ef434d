"""Widgets in a real JupyterLab: typed numbers, Cancel, pictures with alt text, light and dark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import alkahest as ak

pytestmark = pytest.mark.browser
WAIT = 60_000  # milliseconds: a kernel's start and imports, beside other tests
FAMILY = "import alkahest as ak\nfrom alkahest.lab import panels, plots\nv, b, w = (ak.mini.load(n) for n in ('base-weak', 'base', 'turbo'))"  # fmt: skip


def picture(page: Any, words: str) -> Any:
    return page.wait_for_selector(f"img[role=img][alt*='{words}']", timeout=WAIT)


def test_a_typed_multiplier_is_used_as_typed(opened: Callable[..., Any], tmp_path: Path) -> None:
    delta, on = ak.mini.load("base-weak") - ak.mini.load("base"), ak.mini.load("turbo").protect("refiner")
    k, survival = (float(ak.needed_multiplier(delta, on=on, basis=basis)) for basis in ("relative", "survival"))
    page = opened("multiplier", FAMILY, "panels.multiplier_panel(v - b, on=w.protect('refiner'))")  # fmt: skip
    page.get_by_role("button", name="Measure").click(timeout=WAIT)
    picture(page, f"k = {k:.4g}")
    assert page.get_by_text(f"subtract 10 x add {k / 10:.4g}").first.is_visible()
    number = page.get_by_label("k", exact=True)
    number.fill("171.1")
    number.press("Enter")
    picture(page, "k = 171.1")
    assert number.input_value() == "171.1"
    number.fill("5000")
    number.press("Enter")
    picture(page, "k = 5000")
    page.get_by_text("k = 5000 lies outside the slider's 0.1 to 1000").wait_for(timeout=WAIT)
    page.get_by_label("basis", exact=True).select_option("survival")
    picture(page, f"k = {survival:.4g}")
    assert page.get_by_label("target", exact=True).input_value() == "0.9"
    page.screenshot(path=tmp_path / "multiplier.png")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_delta_browser_and_a_still_plot(opened: Callable[..., Any], tmp_path: Path, dark: bool) -> None:
    page = opened(f"browser-{dark}", FAMILY, "table = ak.delta_table(ak.mini.load('base-variant') - b)\npanels.delta_browser(table)", "plots.survival(ak.rounding_curve(table))", dark=dark)  # fmt: skip
    picture(page, "relative of each of 131 tensors")
    page.get_by_label("view", exact=True).select_option("heatmap")
    picture(page, "relative of 15 modules over 8 blocks")
    page.get_by_label("statistic", exact=True).select_option("changed")
    shown = picture(page, "changed of 15 modules over 8 blocks")
    assert shown.bounding_box()["width"] > 500
    page.wait_for_selector(".jp-RenderedImage img", timeout=WAIT)
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    page.screenshot(path=tmp_path / "browser.png")


def test_a_job_is_started_cancelled_and_started_again(opened: Callable[..., Any]) -> None:
    page = opened(
        "job",
        "import time\nfrom types import SimpleNamespace as Event\nfrom alkahest.lab.jobs import Job",
        "Job(lambda: (time.sleep(0.2) or Event(done=n, total=20, key=f'layers.{n}', result=n) for n in range(1, 21)))",
    )
    start, cancel = (
        page.get_by_role("button", name="Start", exact=True),
        page.get_by_role("button", name="Cancel", exact=True),
    )
    start.click(timeout=WAIT)
    page.get_by_text("of 20").wait_for(timeout=WAIT)
    assert start.is_disabled()
    cancel.click()
    page.get_by_text("cancelled after").wait_for(timeout=WAIT)
    start.click()
    page.get_by_text("done in").wait_for(timeout=WAIT)
    assert cancel.is_disabled()

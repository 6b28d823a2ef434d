"""Widgets in a real JupyterLab: typed numbers, Cancel, pictures with alt text, light and dark, keyboard alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from notebook_runs import FOLDER

import alkahest as ak

pytestmark = pytest.mark.browser
WAIT = 60_000  # milliseconds: a kernel's start and imports, beside other tests
FAMILY = (
    "import alkahest as ak\nfrom alkahest.lab import panels, plots\nv, b, w = (ak.mini.load(n) for n in "
    "('base-weak', 'base', 'turbo'))"
)


def picture(page: Any, words: str) -> Any:
    return page.wait_for_selector(f'img[role=img][alt*="{words}"]', timeout=WAIT)


def typed(page: Any, label: str, text: str) -> Any:
    """Type into a box, once the kernel rests: what is typed while it starts up may come before its widgets do."""
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=WAIT)
    box = page.get_by_label(label, exact=True)
    box.fill(text, timeout=WAIT)
    box.press("Enter")
    return box


def test_a_typed_multiplier_is_used_as_typed(opened: Callable[..., Any], tmp_path: Path) -> None:
    delta, on = ak.mini.load("base-weak") - ak.mini.load("base"), ak.mini.load("turbo").protect("refiner")
    k, survival = (float(ak.needed_multiplier(delta, on=on, basis=basis)) for basis in ("relative", "survival"))
    page = opened("multiplier", FAMILY, "panels.multiplier_panel(v - b, on=w.protect('refiner'))")
    page.get_by_role("button", name="Measure").click(timeout=WAIT)
    picture(page, f"k = {k:.4g}")
    assert page.get_by_text(f"subtract 10 x add {k / 10:.4g}").first.is_visible()
    number = typed(page, "k", "171.1")
    picture(page, "k = 171.1")
    assert number.input_value() == "171.1"
    typed(page, "k", "5000")
    picture(page, "k = 5000")
    page.get_by_text("k = 5000 lies outside the slider's 0.1 to 1000").wait_for(timeout=WAIT)
    page.get_by_label("basis", exact=True).select_option("survival")
    picture(page, f"k = {survival:.4g}")
    assert page.get_by_label("target", exact=True).input_value() == "0.9"
    page.screenshot(path=tmp_path / "multiplier.png")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_delta_browser_and_a_still_plot(opened: Callable[..., Any], tmp_path: Path, dark: bool) -> None:
    page = opened(
        f"browser-{dark}",
        FAMILY,
        "table = ak.delta_table(ak.mini.load('base-variant') - b)\npanels.delta_browser(table)",
        "plots.survival(ak.rounding_curve(table))",
        dark=dark,
    )
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


MERGE = (
    "panels.live_merge(ak.mini.load('tb1'), {'heart': ak.mini.load('turbo-variant') - ak.mini.load('deturbo')}, ['a "
    "red heart by day'], loras={'style': ak.open_lora(ak.mini.lora('turbo-lora'))}, sampling={'steps': 4, 'cfg': 1})"
)
# What has the focus, as a screen reader names it.
FOCUSED = """() => {
    const at = document.activeElement;
    const label = at.labels && at.labels.length ? at.labels[0].innerText :
        at.getAttribute('aria-label') || at.innerText;
    return (at.getAttribute('role') || at.tagName.toLowerCase()) + ': ' + (label || '').trim();
}"""


def errors(page: Any) -> int:
    return int(
        page.locator(
            "[data-mime-type='application/vnd.jupyter.error'], [data-mime-type='application/vnd.jupyter.stderr']"
        ).count()
    )


def test_the_first_notebook_runs_and_its_live_merge_follows(opened: Callable[..., Any], tmp_path: Path) -> None:
    page = opened("start", source=FOLDER / "00-start-here.ipynb")
    page.locator(".jp-Cell").last.scroll_into_view_if_needed()
    before = picture(page, "base.protect('refiner') + (base_weak - base): 1.").get_attribute("src")
    box = typed(page, "k of weak", "171.1")
    after = picture(page, "+ 171.1 * (base_weak - base): 1.").get_attribute("src")
    assert after != before
    assert box.input_value() == "171.1"
    typed(page, "steps", "4000")
    page.get_by_role("button", name="Cancel", exact=True).first.click(timeout=WAIT)
    page.get_by_text("cancelled", exact=True).wait_for(timeout=WAIT)
    assert picture(page, "+ 171.1 * (base_weak - base): 1.").get_attribute("src") == after
    assert errors(page) == 0
    page.screenshot(path=tmp_path / "live-merge.png")


def test_a_live_merge_by_keyboard_alone(opened: Callable[..., Any], tmp_path: Path) -> None:
    page = opened("keyboard", FAMILY, MERGE)
    picture(page, "(turbo_variant - deturbo): 1. a red heart")
    page.get_by_label("k of heart", exact=True).focus()
    seen = [page.evaluate(FOCUSED)]
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(FOCUSED))
        if seen[-1].endswith("Save model"):
            break
    wanted = [
        "k of heart",
        "heart: by part",
        "strength of style",
        "style: by part",
        "protect refiner",
        "seed",
        "steps",
        "cfg",
        "shift",
        "prompts, one a line",
        "negative prompt",
        "Cancel",
        "Keep",
        "Forget kept",
        "recipe file",
        "Save recipe",
        "model file",
        "Bridge's own range",
        "Save model",
    ]
    named = [name.partition(": ")[2] for name in seen]
    # A button that is disabled is passed over. Slider handles have no name of their own in ipywidgets: the number box
    # before each does the same and has one.
    assert [name for name in wanted if name not in named] in ([], ["Cancel"])
    assert all(name.partition(": ")[2] for name in seen if not name.startswith("slider"))
    page.get_by_label("heart: by part", exact=True).focus()
    page.keyboard.press("Space")
    typed(page, "heart: layers x", "2")
    picture(page, "scaled({'layers': 2")
    page.get_by_role("button", name="Keep").focus()
    page.keyboard.press("Enter")
    page.get_by_text("kept 1:").wait_for(timeout=WAIT)
    dot = page.get_by_role("button", name="heart at 1: how smooth").first
    dot.focus()
    page.keyboard.press("Enter")
    page.get_by_text("chosen:").wait_for(timeout=WAIT)
    page.get_by_role("button", name="Save recipe").focus()
    page.keyboard.press("Enter")
    page.get_by_text("done in").first.wait_for(timeout=WAIT)
    typed(page, "cfg", "0.2")
    page.locator("pre[role=alert]", has_text="cfg counts as ComfyUI").wait_for(timeout=WAIT)
    page.screenshot(path=tmp_path / "keyboard.png")


# Marks what has the focus, and gives its name or "".
REACHED = FOCUSED.replace("return (", "at.dataset.reached = 'yes';\n    return (")
# The controls of all panels that are shown and can be used, and that Tab never came to.
UNREACHED = """() => [...document.querySelectorAll(`.jp-OutputArea :is(button, input, select, textarea,
    [role=slider])`)]
    .filter(one => !one.disabled && one.offsetParent !== null && !one.dataset.reached)
    .map(one => one.outerHTML.slice(0, 200))"""


@pytest.mark.parametrize(
    ("name", "cells", "wanted"),
    [
        (
            "measuring",
            (
                "table = ak.delta_table(v - b)\npanels.delta_browser(table)",
                "panels.multiplier_panel(table, on=w.protect('refiner'))",
                "panels.rank_panel(ak.delta_spectra((v - b).only('layers.0'), values=8))",
                "panels.delta_browser(v - b)",
            ),
            "statistic, part, view, basis, target, k, rule, value, rank max, Measure",
        ),
        (
            "drawing",
            (
                "live = ak.LiveModel(b + ak.param('k', 1.0) * (v - b))\npanels.sampling_grid(live, 'a red ball', "
                "over={'k': [0, 171.1], 'steps': [2]})",
                "panels.checkpoint_picker(ak.mini.components().parent, bases={'base': b, 'turbo': w})",
                "panels.training_monitor('runs/nowhere')",
            ),
            "k, shift, cfg, steps, seed, Draw, folder, checkpoints, bases to try, Guess lineage, measure, follow, "
            "Refresh",
        ),
    ],
    ids=["measuring", "drawing"],
)
def test_every_control_of_the_other_panels_by_keyboard(
    opened: Callable[..., Any], tmp_path: Path, name: str, cells: tuple[str, ...], wanted: str
) -> None:
    page = opened(f"keys-{name}", FAMILY, *cells, "print('all', 'shown')")
    page.get_by_text("all shown", exact=True).wait_for(timeout=WAIT)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=WAIT)
    page.locator(".jp-OutputArea :is(button, input, select, textarea)").first.focus()
    seen = [page.evaluate(REACHED)]
    while page.evaluate(UNREACHED) and len(seen) < 100:
        page.keyboard.press("Tab")
        seen.append(page.evaluate(REACHED))
    page.screenshot(path=tmp_path / "keys.png", full_page=True)
    assert page.evaluate(UNREACHED) == []
    names = [one.partition(": ")[2] for one in seen if not one.startswith("slider")]
    assert all(names), seen
    assert [one for one in wanted.split(", ") if one not in names] == []


def test_a_kernel_restarted_under_a_panel(opened: Callable[..., Any], tmp_path: Path) -> None:
    page = opened("restarted", FAMILY, MERGE)
    picture(page, "(turbo_variant - deturbo): 1. a red heart")
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_text("Restart Kernel and Run All Cells").click()
    page.get_by_role("button", name="Confirm Kernel Restart").click(timeout=WAIT)
    page.wait_for_function("() => document.querySelectorAll('img[alt*=\"a red heart\"]').length == 1", timeout=WAIT)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=WAIT)
    typed(page, "k of heart", "5000")
    picture(page, "+ 5000 * (turbo_variant - deturbo)")
    assert errors(page) == 0
    page.screenshot(path=tmp_path / "restarted.png")


def test_the_other_panels_in_the_browser(opened: Callable[..., Any], tmp_path: Path) -> None:
    page = opened(
        "panels",
        FAMILY,
        "live = ak.LiveModel(b + ak.param('k', 1.0) * (v - b))\npanels.sampling_grid(live, 'a red ball', over={'k': "
        "[0, 171.1], 'steps': [2]})",
        "panels.checkpoint_picker(ak.mini.components().parent, bases={'base': b, 'turbo': w})",
        "panels.training_monitor('runs/nowhere')",
    )
    typed(page, "shift", "3, 6")
    page.get_by_role("button", name="Draw").click(timeout=WAIT)
    picture(page, "4 pictures over k, shift")
    page.get_by_label("checkpoints", exact=True).select_option(label="base-variant.safetensors, 3.01 MB")
    page.get_by_role("button", name="Guess lineage").click()
    page.get_by_text("of its norm away").wait_for(timeout=WAIT)
    page.get_by_text("nothing measured yet").wait_for(timeout=WAIT)
    assert errors(page) == 0
    page.screenshot(path=tmp_path / "panels.png", full_page=True)


# Whether an element lies in the window as it is.
INSIDE = "one => { const at = one.getBoundingClientRect(); return at.top >= 0 && at.bottom <= window.innerHeight; }"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_live_merge_fits_a_small_screen(opened: Callable[..., Any], tmp_path: Path, dark: bool) -> None:
    page = opened(f"small-{dark}", FAMILY, MERGE, height=720, dark=dark)
    picture(page, "(turbo_variant - deturbo): 1. a red heart")
    box = typed(page, "k of heart", "171.1")
    picture(page, "+ 171.1 * (turbo_variant - deturbo): 1. a red heart")
    page.get_by_text("in ComfyUI: subtract 10 x add 17.11").wait_for(timeout=WAIT)
    handle = page.locator("[role=slider]").first
    assert handle.get_attribute("aria-valuenow") == "2.2"  # log10: the slider has gone where the box is
    page.get_by_role("button", name="Keep").click()
    typed(page, "k of heart", "5000")
    page.get_by_text("k of heart = 5000 lies outside the slider's 0.1 to 1000").wait_for(timeout=WAIT)
    picture(page, "+ 5000 * (turbo_variant - deturbo): 1. a red heart")
    page.get_by_role("button", name="heart at 1: how smooth").click()
    page.get_by_text("chosen:").wait_for(timeout=WAIT)
    box.scroll_into_view_if_needed()
    box.evaluate("one => one.scrollIntoView({block: 'start'})")
    page.screenshot(path=tmp_path / "small.png")
    images = page.locator(".jp-OutputArea img[role=img]")
    assert images.count() == 3  # the present one, the kept one, and the dot's, in one row
    assert len({round(images.nth(number).bounding_box()["y"]) for number in range(3)}) == 1
    for one in (
        box,
        page.get_by_label("cfg", exact=True),
        images.first,
        page.get_by_role("group", name="pictures that"),
    ):
        assert one.evaluate(INSIDE)


BY_BLOCK = """
v = ak.mini.load('base-variant')
panels.live_merge(ak.mini.load('tb1'), {'cyan': v - b}, ['a cyan ball on a beach'], sampling={'steps': 2}, k=2.0)
"""


def test_factors_by_block_under_the_hand(opened: Callable[..., Any], tmp_path: Path) -> None:
    page = opened("blocks", FAMILY, BY_BLOCK, height=720, dark=True)
    picture(page, "2 * (base_variant - base): 1. a cyan ball")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=WAIT)
    page.get_by_label("k of cyan", exact=True).evaluate("one => one.scrollIntoView({block: 'start'})")
    page.get_by_role("tab", name="factors by block").click()
    curve = page.get_by_role("group", name="factor by block")
    curve.wait_for(timeout=WAIT)
    for one in (page.locator(".jp-OutputArea img[role=img]").first, curve):
        assert one.evaluate(INSIDE)
    page.screenshot(path=tmp_path / "curve.png")
    # By keyboard: 0.05 and 0.25 down at block 1, 0.05 up at its neighbour.
    page.get_by_role("slider", name="layers.1", exact=True).focus()
    for key in ("ArrowDown", "PageDown", "ArrowRight", "ArrowUp"):
        page.keyboard.press(key)
    page.get_by_text(".scaled({'layers.1': 0.7, 'layers.2': 1.05})").wait_for(timeout=WAIT)
    picture(page, "scaled({'layers.1': 0.7, 'layers.2': 1.05})")
    # By mouse: painted from high on the left to low on the right, in one quick stroke.
    box = curve.bounding_box()
    page.mouse.move(box["x"] + 0.12 * box["width"], box["y"] + 0.3 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.6 * box["height"], steps=2)
    page.mouse.up()
    page.wait_for_function(
        "() => { const all = [...document.querySelectorAll('circle[role=slider]')].map(one => +one.ariaValueNow);"
        " return all.length === 4 && all.every((one, n) => !n || one < all[n - 1]) && all[3] < 1 && all[0] > 1 }",
        timeout=WAIT,
    )
    drawn = page.get_by_role("slider", name="layers.3", exact=True).get_attribute("aria-valuenow")
    # The list follows the curve; typed into before it has, it would follow over what was typed.
    page.wait_for_function(
        "end => [...document.querySelectorAll('input')].some(one => one.value.endsWith(`, ${end}`))", arg=drawn
    )
    typed(page, "as a list", "0, 3")
    page.get_by_text("2 numbers spread over 4 blocks").wait_for(timeout=WAIT)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=WAIT)
    page.get_by_role("button", name="Measure by tensor").click()
    cells = page.get_by_role("group", name="the delta by module and depth")
    cell = cells.get_by_role("button", name="layers.3.attention.to_q.weight")
    cell.click(timeout=WAIT)
    page.get_by_role("slider", name="layers.3", exact=True).and_(page.locator("[r='8']")).wait_for(timeout=WAIT)
    page.keyboard.press("ArrowLeft")
    page.get_by_role("status").filter(has_text="layers.2.attention.to_q.weight, norm").wait_for(timeout=WAIT)
    page.keyboard.press("Enter")
    page.locator("tr[aria-selected=true]").get_by_text("layers.2.attention.to_q.weight").wait_for(timeout=WAIT)
    page.get_by_role("slider", name="layers.2", exact=True).and_(page.locator("[r='8']")).wait_for(timeout=WAIT)
    page.screenshot(path=tmp_path / "map.png")


SWEEP = """
import tempfile
live = ak.LiveModel(ak.mini.load('tb1').protect('refiner') + ak.param('k', 1.0) * (ak.mini.load('base-variant') - b))
prompts, over = ['a cyan ball on a beach', 'a house by day'], {'k': list(range(200))}
cells = ak.sweep(live, prompts, over=over, steps=24, cfg=3, batch=1, folder=tempfile.mkdtemp())
"""


def test_a_sweep_shows_its_sheet_and_hears_cancel(opened: Callable[..., Any], tmp_path: Path) -> None:
    page = opened("sweep", FAMILY, SWEEP, "print('the cell below')", height=720)
    page.get_by_text(re.compile(r"sweep: \d+%, \d+ s, .* left; k=")).wait_for(timeout=WAIT)
    page.wait_for_selector("img[alt='first results']", timeout=WAIT)
    page.screenshot(path=tmp_path / "filling.png")
    cancel = page.get_by_role("button", name="Cancel", exact=True)
    cancel.focus()
    page.keyboard.press("Enter")
    page.get_by_text(re.compile(r"sweep: cancelled after \d+ s")).wait_for(timeout=WAIT)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=WAIT)
    cancel.wait_for(state="detached", timeout=WAIT)
    assert page.get_by_text("the cell below", exact=True).count() == 0  # it was not run
    page.screenshot(path=tmp_path / "cancelled.png")


BLIND = """
live = ak.LiveModel(ak.mini.load('tb1').protect('refiner') + ak.param('k', 1.0) * (ak.mini.load('base-variant') - b))
prompts, over = ['a cyan ball on a beach', 'a cyan house by day'], {{'k': [0, 5, 40]}}
panels.blind_comparison(live, prompts, over=over, sampling={{'steps': 2}}, file='{file}')
"""


def test_two_pictures_are_compared_blindly(opened: Callable[..., Any], tmp_path: Path) -> None:
    page = opened("blind", FAMILY, BLIND.format(file=tmp_path / "answers.csv"), height=720, dark=True)
    picture(page, "left picture: a cyan ball on a beach")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=WAIT)
    left = page.get_by_role("button", name="Left is better")
    left.evaluate("one => one.closest('.jp-OutputArea').scrollIntoView({block: 'start'})")
    for one in (left, page.locator("img[alt^='right picture']")):
        assert one.evaluate(INSIDE)
    page.screenshot(path=tmp_path / "pair.png")
    left.focus()
    page.keyboard.press("Enter")
    page.get_by_text("1 answers, in ").wait_for(timeout=WAIT)
    for name, count in (("Right is better", 2), ("Alike", 3), ("Take back", 2)):
        page.locator(f"button:not([disabled]):has-text('{name}')").click(timeout=WAIT)
        page.get_by_text(f"{count} answers, in ").wait_for(timeout=WAIT)
    assert page.get_by_text("k = 40").count() == 0
    for count in range(3, 13):
        page.locator("button:not([disabled]):has-text('Alike')").click(timeout=WAIT)
        page.get_by_text(f"{count} answers, in ").wait_for(timeout=WAIT)
    page.get_by_text("is the best with a probability of").wait_for(timeout=WAIT)
    assert page.locator(".jp-OutputArea tbody tr").count() == 3
    page.screenshot(path=tmp_path / "order.png")
    assert (tmp_path / "answers-order.csv").is_file()


def test_files_are_named_in_a_panel(opened: Callable[..., Any], tmp_path: Path) -> None:
    path = ak.mini.load("base").path
    panel = f"panels.models_picker('{tmp_path}/models.toml', '{path.parent}')"
    page = opened("models", FAMILY, panel, height=720)
    box = page.get_by_label("base: Base, which its derivatives were trained from", exact=True)
    box.fill(str(path), timeout=WAIT)
    box.press("Enter")
    page.get_by_text("1,501,504 parameters, 4 layers, width 96").wait_for(timeout=WAIT)
    page.screenshot(path=tmp_path / "models.png")
    save = page.get_by_role("button", name="Save models.toml")
    save.focus()
    page.keyboard.press("Enter")
    page.get_by_text("Run the notebook again from its top").wait_for(timeout=WAIT)
    assert f'base = "{path}"' in (tmp_path / "models.toml").read_text()


def test_a_table_is_one_line_a_tensor(opened: Callable[..., Any], tmp_path: Path) -> None:
    page = opened(
        "table",
        FAMILY,
        "table = ak.delta_table(ak.mini.load('base-variant') - b)\ntable",
        height=720,
        dark=True,
    )
    page.get_by_text("also in the table: ").wait_for(timeout=WAIT)
    rows = page.locator(".jp-OutputArea tbody tr")
    assert rows.count() == len(ak.mini.load("base").shapes)
    assert rows.nth(0).bounding_box()["height"] < 30
    head = page.locator(".jp-OutputArea thead th").first
    before = head.bounding_box()["y"]
    page.locator(".jp-OutputArea div:has(> table)").first.evaluate("one => one.scrollTo(0, 500)")
    assert abs(head.bounding_box()["y"] - before) < 2  # the head stays in sight
    page.screenshot(path=tmp_path / "table.png")

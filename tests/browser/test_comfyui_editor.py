"""ComfyUI's real editor in Chromium: numbers typed into our nodes, graphs that we write, and what nodes say."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import alkahest as ak
from alkahest.nodes.examples import FOLDER, two_imports
from alkahest.workflow.graph import read_graph
from alkahest.workflow.translate import recipes_of

pytest.importorskip("comfyui_frontend_package", reason="not run: no comfyui-frontend-package")
pytest.importorskip("playwright.sync_api")
sys.path.insert(0, str(Path(__file__).parent.parent / "nodes"))
import editor

NUMBERS = [17.11, 171.1, 0.05, 0.04, 1e-6, 0.9995, 123456.789, -3.25, 1 / 3]


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def opened(browser: Any) -> Iterator[editor.Editor]:
    with editor.opened(browser) as found:
        yield found


@pytest.fixture(scope="module")
def in_page(browser: Any) -> Iterator[editor.Editor]:
    with editor.opened(browser, in_page=True) as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for name, settings in {"a": {}, "v": {"delta": 0.02}, "b": {"seed": 1}}.items():
        ak.made_up(layers=1, width=64, **settings).save(place / f"{name}.safetensors")
    a, v = ak.open(place / "a.safetensors"), ak.open(place / "v.safetensors")
    ak.extract_lora(v - a, rank=2).save(place / "lora.safetensors")
    return place


def numbers_of_ours() -> list[tuple[str, str, float, float]]:
    """Node, widget, least and most of every number of ours."""
    found = []
    for kind, about in editor.object_info().items():
        if kind.startswith("Alkahest"):
            for name, (form, *options) in about["input"]["required"].items():
                if form == "FLOAT":
                    found.append((kind, name, options[0]["min"], options[0]["max"]))
    return found


@pytest.mark.parametrize(("kind", "widget", "least", "most"), numbers_of_ours())
def test_a_typed_number_is_sent_to_the_last_digit(
    kind: str, widget: str, least: float, most: float, opened: editor.Editor
) -> None:
    opened.load({"nodes": [{"id": 1, "type": kind, "pos": [300, 200]}], "links": [], "version": 0.4})
    for number in NUMBERS:
        if least <= number <= most:
            opened.type_into(1, widget, repr(number))
            assert opened.prompt()["1"]["inputs"][widget] == number, number


@pytest.mark.parametrize(("kind", "widget", "least", "most"), numbers_of_ours())
def test_so_is_one_that_is_typed_into_a_node_in_the_page(
    kind: str, widget: str, least: float, most: float, in_page: editor.Editor
) -> None:
    in_page.load({"nodes": [{"id": 1, "type": kind, "pos": [300, 200]}], "links": [], "version": 0.4})
    for number in NUMBERS:
        if least <= number <= most:
            in_page.type_into_page(1, widget, repr(number))
            assert in_page.prompt()["1"]["inputs"][widget] == number, number


def test_without_the_extension_six_digits_are_left(browser: Any) -> None:
    with editor.opened(browser, extensions=[]) as plain:
        plain.load({"nodes": [{"id": 1, "type": "AlkahestMerge", "pos": [300, 200]}], "links": [], "version": 0.4})
        for number in (17.11, 171.1, 0.05, 0.04, 0.000001):
            plain.type_into(1, "multiplier", repr(number))
            assert plain.prompt()["1"]["inputs"]["multiplier"] == number


EXPRESSIONS = {
    "the article's": "a + 171.1 * (v - b)",
    "one split": "a + 17.11 * (v - b)",
    "a small one": "a + 0.0333 * (v - b)",
    "a share": "lerp(a, v, 0.3333)",
    "a LoRA": "a + 0.125 * lora",
    "ours": "a.protect('refiner') + 17.11 * (v - b).scaled({'layers': 1.23456789})",
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_a_graph_that_we_write_is_sent_as_it_was_written(
    name: str, opened: editor.Editor, folder: Path, tmp_path: Path
) -> None:
    from alkahest.recipes.text import parse
    from alkahest.sources.lora import open_input

    named = {one: open_input(folder / f"{one}.safetensors", name=one) for one in ("a", "v", "b", "lora")}
    expression = parse(EXPRESSIONS[name], named)
    ak.write_workflow(expression, tmp_path / "editor.json")
    ak.write_workflow(expression, tmp_path / "api.json", form="api")
    opened.load(editor.json.loads((tmp_path / "editor.json").read_text()))
    sent = opened.prompt()
    wanted = editor.json.loads((tmp_path / "api.json").read_text())
    assert {n: (one["class_type"], one["inputs"]) for n, one in sent.items()} == {
        n: (one["class_type"], one["inputs"]) for n, one in wanted.items()
    }
    (recipe,) = recipes_of(read_graph(sent))
    assert [recipe.text] == [one.text for one in ak.read_workflow(tmp_path / "editor.json")]
    boxes = opened.page.evaluate("() => window.app.graph._nodes.map(n => [...n.pos, ...n.size])")
    for n, (x, y, width, height) in enumerate(boxes):  # it looks like a graph: no node lies on another
        for left, top, wide, high in boxes[:n]:
            assert x >= left + wide or left >= x + width or y >= top + high or top >= y + height


@pytest.mark.parametrize("name", ["core", "alkahest"])
def test_the_examples_are_sent_as_they_were_written(name: str, opened: editor.Editor) -> None:
    opened.load(editor.json.loads((FOLDER / f"merge_two_imports_{name}.json").read_text()))
    sent, wanted = opened.prompt(), two_imports(ours=name == "alkahest")
    assert {n: (one["class_type"], one["inputs"]) for n, one in sent.items()} == {
        n: (one["class_type"], one["inputs"]) for n, one in wanted.items()
    }
    titles = [one["_meta"]["title"] for one in sent.values()]
    assert titles[:2] == ["the bridge: ALKAHEST", "a Turbo derivative"]


@pytest.mark.parametrize("mode", ["opened", "in_page"])
def test_an_error_of_ours_is_shown_on_its_node(mode: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(mode)
    found.load({"nodes": [{"id": 1, "type": "AlkahestMerge", "pos": [300, 200]}], "links": [], "version": 0.4})
    error = {"node_id": "1", "node_type": "AlkahestMerge", "exception_message": "Alkahest Merge: no number\n  fix: one"}
    about = {"prompt_id": "1", "executed": [], "exception_type": "AlgebraError", "traceback": [], "timestamp": 1}
    found.server.tell("execution_error", {**error, **about, "current_inputs": {}, "current_outputs": []})
    shown = "() => [...document.querySelectorAll('textarea')].some(one => one.value.startsWith('Alkahest Merge: no'))"
    found.page.wait_for_function(shown)


def test_what_a_node_says_is_seen(opened: editor.Editor, tmp_path: Path) -> None:
    kinds = [kind for kind in editor.object_info() if kind.startswith("Alkahest")]
    nodes = [{"id": n, "type": kind, "pos": [80 + 420 * (n % 3), 80 + 400 * (n // 3)]} for n, kind in enumerate(kinds)]
    opened.load({"nodes": nodes, "links": [], "version": 0.4})
    before = opened.prompt()
    for node in nodes:
        said = f"multiplier 17.11\nwarning: {node['type']} stands on little"
        output = {"text": [said]}
        opened.server.tell("executed", {"node": str(node["id"]), "display_node": str(node["id"]), "output": output})
    opened.page.wait_for_function(
        "n => window.app.graph._nodes.filter(o => o.widgets?.some(w => w.name == 'said' && w.value)).length == n",
        arg=len(nodes),
    )
    shown = opened.page.locator("textarea").evaluate_all("all => all.map(one => one.value)")
    assert [f"multiplier 17.11\nwarning: {kind} stands on little" for kind in kinds] == [
        text for text in shown if "stands on" in text
    ]
    opened.page.screenshot(path=tmp_path / "said.png")
    assert opened.prompt() == before, "what was said is neither sent nor saved"

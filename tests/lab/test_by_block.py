from __future__ import annotations

import base64
import sys
from typing import Any

import pytest

import alkahest as ak
from alkahest.errors import AlgebraError
from alkahest.lab.block_curve import block_curve
from alkahest.lab.block_editor import BlockEditor
from alkahest.lab.delta_map import delta_map
from alkahest.lab.live_controls import DeltaRow
from alkahest.lab.live_merge import LiveMerge, live_merge

PROMPT = "a cyan ball on a beach"


@pytest.fixture(scope="module")
def cyan() -> Any:
    return ak.mini.load("base-variant") - ak.mini.load("base")


@pytest.fixture(scope="module")
def table(cyan: Any) -> Any:
    return ak.delta_table(cyan)


@pytest.fixture(params=["anywidget", "plain"])
def front(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setitem(sys.modules, "anywidget", None)
    return str(request.param)


def editor_of(cyan: Any, protect: str = "refiner") -> tuple[BlockEditor, list[str]]:
    asked: list[str] = []
    bridge = ak.mini.load("tb1").protect(protect)
    rows = [DeltaRow(name, cyan, 2.0, (0.1, 1000.0), True, (), 4) for name in ("cyan", "again")]
    return BlockEditor(rows, lambda: bridge, lambda: asked.append("")), asked


def test_the_curve_writes_factors_into_the_expression(cyan: Any, front: str) -> None:
    editor, asked = editor_of(cyan)
    editor.curve.values = [1.0, 0.5, 0.5, 2.0]
    assert len(asked) == 1
    assert editor.list.value == "1, 0.5, 0.5, 2"
    wanted = 2.0 * cyan.scaled({"layers.1-2": 0.5, "layers.3": 2.0})
    assert editor.row.scaled.text() == wanted.text()
    assert ".scaled({&#x27;layers.1-2&#x27;: 0.5, &#x27;layers.3&#x27;: 2})" in editor.note.value
    editor.of.value = "again"
    assert editor.curve.values == [1.0] * 4
    assert len(asked) == 1  # looking at another changes nothing
    editor.of.value = "cyan"
    assert editor.curve.values == [1.0, 0.5, 0.5, 2.0]


def test_lists_presets_and_buttons(cyan: Any, front: str) -> None:
    editor, asked = editor_of(cyan)
    editor.list.value = "0, 3"
    assert editor.curve.values == [0, 1, 2, 3]
    assert editor.list.value == "0, 1, 2, 3"
    assert "2 numbers spread over 4 blocks" in editor.note.value
    editor.buttons["Mirror"].click()
    assert editor.row.by_block == [3, 2, 1, 0]
    editor.buttons["Smooth"].click()
    assert editor.row.by_block == [2.75, 2, 1, 0.25]
    editor.presets.value = "GRAD_V"
    assert editor.row.by_block == [1.0, 0.3333, 0.3333, 1.0]
    assert "GRAD_V: 25 numbers spread over 4 blocks" in editor.note.value
    editor.list.value = "1, two"
    assert "role='alert'" in editor.note.value
    assert editor.row.by_block == [1.0, 0.3333, 0.3333, 1.0]
    editor.buttons["Reset"].click()
    assert editor.row.by_block == [1.0] * 4
    assert "every block at 1" in editor.note.value
    assert editor.list.value == "1, 1, 1, 1"
    assert len(asked) == 5


def test_blocks_where_a_factor_does_nothing_are_named(cyan: Any) -> None:
    editor, _ = editor_of(cyan, "refiner, layers.0-1")
    assert "protected or not in the delta: layers.0, 1: a factor there does nothing" in editor.note.value
    lora = ak.open_lora(ak.mini.lora("turbo-lora"))
    row = DeltaRow("style", lora.only("layers.2"), 1.0, (0.0, 2.0), False, (), 4)
    row.by_block = [1.0, 1.0, 0.5, 1.0]
    assert row.block_factors == {"layers.2": 0.5}


def test_number_boxes_stand_in_for_the_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anywidget", None)
    curve = block_curve("by block", ["layers.0", "layers.1"], "block")
    curve.boxes[1].value = 0.25
    assert curve.values == [1.0, 0.25]
    assert curve.chosen == 1
    curve.values = [2.0, 3.0]
    assert [box.value for box in curve.boxes] == [2.0, 3.0]
    curve.behind_label, curve.behind = "effect", [0.5, None]
    assert curve.bars.value == "effect: layers.0 50 %"


def test_a_map_tells_of_every_tensor(table: Any, front: str) -> None:
    found = delta_map(table)
    assert [row["tensor"] for row in found.map.rows] == table.tensor.tolist()
    inside = [row for row in found.map.rows if row["column"] >= 0]
    assert len({(row["row"], row["column"]) for row in inside}) == len(inside) == (table.block >= 0).sum()
    assert [head for _, head, _ in found.map.columns] == ["norm", "relative", "changed"]
    name = "layers.2.attention.to_q.weight"
    (row,) = (row for row in found.map.rows if row["tensor"] == name)
    measured = table.set_index("tensor").loc[name]
    assert (row["delta_norm"], row["relative"], row["changed"]) == (
        measured.delta_norm,
        measured.relative,
        measured.changed,
    )
    found.map.chosen = name
    assert found.chosen == name
    assert found.place == ("layers", 2)
    found.choose_block("layers", 1)
    assert found.place == ("layers", 1)
    block = table[(table.part == "layers") & (table.block == 1)]
    assert table.set_index("tensor").loc[found.chosen].relative == block.relative.max()
    still = found._repr_mimebundle_()
    assert base64.b64decode(still["image/png"]).startswith(b"\x89PNG")
    assert "Module by depth" in still["text/plain"]
    found.statistic.value = "changed"
    assert found.map.statistic == "changed"


def test_without_anywidget_the_map_is_a_list(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anywidget", None)
    found = delta_map(table)
    name = "layers.2.attention.to_q.weight"
    found.map.list.value = name
    assert found.chosen == name
    assert f"{name}, norm " in found.map.words.value
    found.choose_block("layers", 3)
    assert found.map.list.value == found.chosen != name


def test_a_map_of_something_else_is_refused(table: Any) -> None:
    with pytest.raises(AlgebraError, match="no table of tensors"):
        delta_map(table.drop(columns="tensor"))


def test_measured_by_block_under_a_live_merge(cyan: Any) -> None:
    panel: LiveMerge = live_merge(
        ak.mini.load("tb1"),
        {"cyan": cyan},
        [PROMPT],
        k=2.0,
        sampling={"steps": 2, "cfg": 2.0, "negative_prompt": "grey"},
    )
    by_block, editor = panel.by_block, panel.by_block.editor
    editor.curve.values = [0.0, 1.0, 1.0, 1.0]
    panel.wait(60)
    assert panel.expression.text() == (panel.onto + 2.0 * cyan.scaled({"layers.0": 0.0})).text()
    assert "scaled({'layers.0': 0})" in panel.alt
    assert by_block.map is None
    by_block.measure.start()
    by_block.measure.wait(60)
    by_block.measure_effect.start()
    by_block.measure_effect.wait(120)
    assert by_block.measure_effect.error is None
    effect = editor.row.effect
    wanted = ak.effect(cyan, panel.onto, k=2.0, prompts=[PROMPT], steps=2, cfg=2.0)
    assert effect.table.along.tolist() == pytest.approx(wanted.table.along.tolist(), rel=1e-5)
    assert "measured without: negative prompt" in repr(effect)
    layers = wanted.table[wanted.table.part == "layers"]
    assert editor.curve.behind == pytest.approx(layers.along.tolist(), rel=1e-5)
    (row,) = (row for row in by_block.map.map.rows if row["tensor"] == "layers.2.attention.to_q.weight")
    assert row["along"] == pytest.approx(layers.along.iloc[2], rel=1e-5)
    assert row["flow"] > 0
    by_block.map.map.chosen = "layers.2.attention.to_q.weight"
    assert editor.curve.chosen == 2
    editor.curve.chosen = 3
    assert by_block.map.place == ("layers", 3)
    # The picture is still that of the controls.
    panel.settings["seed"].value = 7
    panel.wait(60)
    drawn = ak.sample(ak.pipeline(panel.expression), PROMPT, steps=2, cfg=2.0, negative_prompt="grey", seed=7)
    assert [image.tobytes() for image in panel.images] == [image.tobytes() for image in drawn.images]

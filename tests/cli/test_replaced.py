"""Whatever writes over something says so: each command that takes an output, and the panels."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import alkahest as ak
from alkahest.cli import app

COMMANDS = {
    "merge": ("merge", "b + 2 * (v - a)", "--b", "mini:tb1", "--v", "mini:base-weak", "--a", "mini:base", "-o", "OUT"),
    "convert": ("convert", "mini:base", "-o", "OUT"),
    "made up": ("make-checkpoint", "--layers", "1", "--width", "96", "-o", "OUT"),
    "workflow": ("workflow", "a + 2 * (b - a)", "--a", "mini:base", "--b", "mini:tb1", "-o", "JSON"),
    "LoRA": ("extract-lora", "--variant", "mini:base-variant", "--base", "mini:base", "--rank", "1", "-o", "OUT"),
    "csv": ("diff", "mini:base-variant", "mini:base", "--csv", "CSV"),
    "html": ("diff", "mini:base-variant", "mini:base", "--html", "HTML"),
    "plot": ("multiplier", "mini:base-variant", "mini:base", "--plot", "PNG"),
}
NAMES = {
    "OUT": "out.safetensors",
    "JSON": "graph.json",
    "CSV": "table.csv",
    "HTML": "report.html",
    "PNG": "plot.png",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_second_run_says_what_it_replaced(command: tuple[str, ...], tmp_path: Path) -> None:
    (written,) = (tmp_path / name for word, name in NAMES.items() if word in command)
    line = [str(tmp_path / NAMES[word]) if word in NAMES else word for word in command]
    first, second = (CliRunner().invoke(app, line) for _ in range(2))
    assert first.exit_code == second.exit_code == 0, second.output
    assert written.exists()
    assert "replaced" not in first.output
    assert "replaced the file of that name" in second.output
    assert str(written) in second.output


def test_a_folder_that_holds_anything_is_refused(tmp_path: Path) -> None:
    line = ["convert", "mini:base", "--max-shard-size", "1MB", "-o", str(tmp_path / "folder")]
    first, second = (CliRunner().invoke(app, line) for _ in range(2))
    assert first.exit_code == 0, first.output
    assert second.exit_code == 1
    assert "the output folder exists and is not empty" in second.output


def test_in_python_the_result_has_the_note(tmp_path: Path) -> None:
    base = ak.mini.load("base")
    assert base.save(tmp_path / "out.safetensors").notes == []
    size = (tmp_path / "out.safetensors").stat().st_size
    (note,) = base.save(tmp_path / "out.safetensors").notes
    assert note == f"replaced the file of that name ({size:,} bytes): {tmp_path / 'out.safetensors'}"
    assert note in repr(base.save(tmp_path / "out.safetensors"))


def test_python_says_it_too(tmp_path: Path) -> None:
    from alkahest.lab.report import write_report

    delta = ak.mini.load("base-variant") - ak.mini.load("base")
    extracted, table = ak.extract_lora(delta, rank=2), ak.delta_table(delta)
    for existing in (False, True):
        lora = extracted.save(tmp_path / "lora.safetensors")
        told = write_report(tmp_path / "report.html", table)
        assert any("replaced the file of that name" in note for note in lora.notes) is existing
        assert any("replaced the file of that name" in note for note in told) is existing
    assert "replaced the file of that name" in repr(lora)

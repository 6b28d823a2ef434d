from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

import alkahest as ak
from alkahest.cli import app
from alkahest.errors import FileFormatError, OutputError
from alkahest.files.paths import expanded


def test_a_miniature_is_named_wherever_a_path_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ak.open("mini:tb1") == ak.mini.load("tb1")
    assert ak.open(' "mini:tb1.safetensors" ').path == ak.mini.load("tb1").path
    assert ak.open_lora("mini:base-lora").path == ak.mini.lora("base-lora")
    assert expanded("mini:", "open") == ak.mini.WEIGHTS
    assert expanded("mini:components", "open") == ak.mini.components()
    monkeypatch.chdir(tmp_path)
    ak.made_up(layers=1, width=64).save(tmp_path / "own.safetensors")
    (tmp_path / "own.safetensors").rename(tmp_path / "mini:tb1")  # who has a file of that very name means it
    assert expanded("mini:tb1", "open") == Path("mini:tb1")


@pytest.mark.parametrize("name", ["bse", "judge", "../weights/base", "base/", "BASE"])
def test_what_is_no_miniature_is_said(name: str) -> None:
    with pytest.raises(FileFormatError, match="there is no such miniature") as caught:
        ak.open(f"mini:{name}")
    assert "base-variant" in str(caught.value.fix)


def test_nothing_is_written_into_the_family() -> None:
    with pytest.raises(OutputError, match="the miniature family is read, not written"):
        ak.mini.load("base").save("mini:new")
    before = os.listdir(ak.mini.WEIGHTS)
    with pytest.raises(OutputError):
        ak.mini.load("base").save("mini:base")
    assert os.listdir(ak.mini.WEIGHTS) == before


def test_every_command_takes_them(tmp_path: Path) -> None:
    def run(*words: object) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        return done.stdout

    three = ("--bridge", "mini:tb1", "--variant", "mini:base-variant", "--base", "mini:base")
    assert "4 layers, width 96" in run("inspect", "mini:base")
    assert "embedders" in run("diff", "mini:base", "mini:base-variant")
    assert "basis relative" in run("multiplier", "mini:base-variant", "mini:base", "--on", "mini:tb1", "-q")
    assert "importable" in run("check", "mini:base-variant", "mini:base")
    assert "rank" in run("lora", "inspect", "mini:base-lora")
    expression = "bridge.protect('refiner') + 5 * (variant - base)"
    run("merge", expression, *three, "-o", tmp_path / "merged.safetensors", "-q")
    assert "is as it was" not in run("verify", tmp_path / "merged.safetensors", "--recompute", "-q")
    run("workflow", expression, *three, "-o", tmp_path / "graph.json")
    assert "BLAKE3" in run("recipe", tmp_path / "graph.json", "--models-dir", "mini:")

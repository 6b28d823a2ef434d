"""What the command line says: fixes as commands, numbers as people write them, an example for each command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from alkahest.cli import app

NAMED = ("--a", "mini:tb1", "--b", "mini:base-weak", "--c", "mini:base", "-o", "out.safetensors")
GROUP = typer.main.get_command(app)
COMMANDS = {**GROUP.commands}  # type: ignore[attr-defined]
# Those that take an hour, or a ComfyUI.
LONG = {"mini", "nodes", "make-dataset"}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(*line: str) -> str:
    result = CliRunner().invoke(app, list(line), env={"COLUMNS": "400"})
    assert result.exit_code in (1, 2), result.output
    return result.output


@pytest.mark.parametrize(
    ("text", "problem", "fix"),
    [
        ("a + 171,1 * (b - c)", "this is no number", "171.1"),
        ("a + (171,1) * (b - c)", "this is no number", "171.1"),
        ("a + 171.1x * (b - c)", "this is no number", "write 171.1 * (variant - base)"),
        ("a + 20x (b - c)", "this is no number", "write 20 * (variant - base)"),
        ("a.protect('refiner) + 2 * (b - c)", "a quote is not closed", "between two quotes"),
        ("lerp(a, b)", "missing 1 required positional argument: 't'", "write it as lerp(a, b, t"),
        ("a, b", "these are several expressions", "one, without commas between"),
    ],
)
def test_slips_in_an_expression_get_a_sentence(text: str, problem: str, fix: str) -> None:
    named = NAMED if "c" in text.replace("protect", "") else (*NAMED[:4], *NAMED[-2:])
    said = refused("merge", text, *named)
    assert problem in said
    assert fix in said
    assert "\\n" not in said


@pytest.mark.parametrize(
    ("value", "meant"), [("171,1", "171.1"), ("171.1x", "171.1"), ("20\u00d7", "20"), ("-3,5", "-3.5")]
)
def test_a_number_as_people_write_it_is_no_file(value: str, meant: str) -> None:
    said = refused("merge", "a + k * (b - c)", f"--k={value}", *NAMED)
    assert f"--k {value} is no number; write --k {meant}" in said


@pytest.mark.parametrize(
    ("command", "option"),
    [("multiplier", "--target"), ("diff", "--k"), ("extract-lora", "--sum"), ("make-dataset", "--cfg")],
)
def test_a_number_of_an_option_too(command: str, option: str) -> None:
    said = refused(command, f"{option}=171,1")
    assert f"'{option}': 171,1 is no number; write 171.1" in said


def test_a_file_of_such_a_name_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "20x").write_text("I am no model")
    assert "is no number" not in refused("merge", "a + k", "--a", "mini:tb1", "--k", "20x", "-o", "out.safetensors")


def test_a_base_of_no_reference_is_not_passed_over() -> None:
    said = refused("multiplier", "mini:base-weak", "mini:base", "--reference-base", "mini:turbo")
    assert "--reference-base is the base of --reference" in said


def test_a_fix_is_a_command() -> None:
    said = refused("inspect", "mini:base-lora")
    assert "ak." not in said
    assert "alkahest lora inspect FILE shows it" in said
    assert CliRunner().invoke(app, ["lora", "inspect", "mini:base-lora"]).exit_code == 0
    added = ["merge", "base + 0.8 * lora", "--base", "mini:base", "--lora", "mini:base-lora", "-o", "out.safetensors"]
    assert CliRunner().invoke(app, added).exit_code == 0
    assert "ak." not in CliRunner().invoke(app, ["lora", "inspect", "mini:base"]).output
    said = refused("lora", "convert", "mini:base", "-o", "out.safetensors")
    assert "alkahest inspect FILE shows it; alkahest extract-lora --variant FILE --base BASE -o OUT" in said
    assert "ak." not in refused("merge", "a + b", *NAMED)


def test_every_command_stands_in_a_group_and_has_an_example() -> None:
    panels = {name: getattr(command, "rich_help_panel", None) for name, command in COMMANDS.items()}
    assert all(isinstance(panel, str) for panel in panels.values()), panels
    assert all("For example:" in (command.epilog or "") for command in COMMANDS.values())


def test_each_example_runs_as_it_stands() -> None:
    first = ("merge", "extract-lora")  # what others read
    for name in (*first, *(name for name in COMMANDS if name not in (*first, *LONG))):
        for line in re.findall(r"`(alkahest [^`]+)`", COMMANDS[name].epilog):
            words = shlex.split(line)[1:]
            if name == "experiment":
                words += ["--root", str(Path(__file__).parents[2] / "experiments")]
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, (line, result.output, result.exception)

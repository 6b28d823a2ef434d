from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alkahest.errors import AlkahestError, FileFormatError, UnknownNameError, UnsupportedError
from alkahest.training.config import Config, config_of, read_config

TEXT = """
start = "lerp(a, b, 0.5)"
clip = 1
betas = [0.9, 0.95]
[inputs]
a = "mini:base"
b = "mini:turbo"
[data.people]
scenes = { count = 20, seed = 1, subject = ["man", "woman"] }
[data.mine]
folder = "pictures"
[[stage]]
name = "first"
mix = { people = 0.8, mine = 0.2 }
steps = 30
lr = 1e-4
[[stage]]
mix = { mine = 1 }
steps = 12
lr = 1
shift = 6
"""


def given(**changes: Any) -> dict[str, Any]:
    stage = {"mix": {"people": 1.0}, "steps": 3, "lr": 0.1}
    return {
        "start": "a",
        "inputs": {"a": "mini:base"},
        "data": {"people": {"scenes": {"count": 4, "seed": 1}}},
        "stage": [stage],
        **changes,
    }


def test_a_file_becomes_a_run(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(TEXT)
    config = read_config(tmp_path / "run.toml")
    assert config.folder == tmp_path
    assert [stage.name for stage in config.stages] == ["first", "stage 2"]
    assert config.stages[1].shift == 6.0
    assert isinstance(config.stages[1].lr, float)
    assert config.frozen == "refiner"
    assert config.betas == (0.9, 0.95)
    assert config.steps == 42
    assert [config.stage_at(step) for step in (0, 29, 30, 41)] == [(0, 0), (0, 29), (1, 0), (1, 11)]


def test_the_digest_is_that_of_what_changes_the_weights() -> None:
    one = config_of(given())
    assert config_of(given(measure_every=7, prompts=["x"])).digest == one.digest
    for change in (
        {"seed": 1},
        {"frozen": "input"},
        {"optimiser": "adafactor"},
        {"stage": [{**given()["stage"][0], "lr": 0.2}]},
    ):
        assert config_of(given(**change)).digest != one.digest


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown key": ({"forzen": "refiner"}, UnknownNameError, "did you mean 'frozen'"),
    "unknown key of a stage": (
        {"stage": [{**given()["stage"][0], "step": 3}]},
        UnknownNameError,
        r"(?s)stage 1 has an unknown key.*'steps'",
    ),
    "no stage": ({"stage": []}, FileFormatError, "a run needs stages"),
    "lacking": ({"stage": [{"mix": {"people": 1.0}}]}, FileFormatError, "stage 1 lacks steps, lr"),
    "kind": ({"seed": "one"}, FileFormatError, r"(?s)wrong kind.*seed.*expected: a whole number"),
    "bool": ({"seed": True}, FileFormatError, "wrong kind"),
    "optimiser": ({"optimiser": "adam"}, UnknownNameError, "did you mean 'adamw'"),
    "mix": ({"stage": [{"mix": {"peple": 1.0}, "steps": 3, "lr": 0.1}]}, UnknownNameError, "did you mean 'people'"),
    "fused": ({"fused": True}, UnsupportedError, r"(?s)fused backward.*clip=1"),
    "fused and accumulate": ({"fused": True, "clip": 0.0, "accumulate": 2}, UnsupportedError, "fused backward"),
    "steps": ({"stage": [{**given()["stage"][0], "steps": 0}]}, UnsupportedError, "steps is too small"),
    "drop": ({"stage": [{**given()["stage"][0], "drop": 2.0}]}, UnsupportedError, "drop is too large"),
    "decay": ({"stage": [{**given()["stage"][0], "decay": "cosin"}]}, UnknownNameError, "cosine"),
    "data": ({"data": {"people": {}}}, FileFormatError, "needs one of folder, scenes, drawn"),
    "two sources": (
        {"data": {"people": {"folder": "x", "scenes": {}}}},
        FileFormatError,
        "needs one of folder, scenes, drawn",
    ),
    "ema": ({"ema": 1.0}, UnsupportedError, "ema is too large"),
    "betas of text": (
        {"betas": ["a", "b"]},
        FileFormatError,
        r"(?s)wrong kind.*key: betas\[0\].*expected: a number.*found: \['a', 'b'\]",
    ),
    "one beta": ({"betas": [0.9]}, FileFormatError, r"(?s)key: betas.*length 2"),
    "a beta of 1": ({"betas": [0.9, 1.0]}, UnsupportedError, r"(?s)betas\[1\] is too large.*below 1"),
    "a share below 0": (
        {"stage": [{**given()["stage"][0], "mix": {"people": -1.0}}]},
        UnsupportedError,
        "mix: people is too small",
    ),
    "a share of text": (
        {"stage": [{**given()["stage"][0], "mix": {"people": "all"}}]},
        FileFormatError,
        r"(?s)wrong kind.*key: mix",
    ),
    "nothing mixed": (
        {"stage": [{**given()["stage"][0], "mix": {"people": 0.0}}]},
        UnsupportedError,
        "nothing is mixed",
    ),
    "weight_decay": ({"weight_decay": -1}, UnsupportedError, "weight_decay is too small"),
    "std": ({"stage": [{**given()["stage"][0], "std": float("inf")}]}, FileFormatError, "std is no finite number"),
    "lr": ({"stage": [{**given()["stage"][0], "lr": float("nan")}]}, FileFormatError, "lr is no finite number"),
    "a setting": ({"sampling": {"stepz": 3}}, UnknownNameError, r"(?s)sampling has an unknown key.*'steps'"),
    "a setting's kind": ({"sampling": {"steps": "many"}}, FileFormatError, r"(?s)sampling: this value.*key: steps"),
    "a setting's size": ({"sampling": {"cfg": 0.5}}, AlkahestError, "cfg counts as ComfyUI"),
    "prompts": ({"prompts": [1, 2]}, FileFormatError, r"(?s)wrong kind.*key: prompts\[0\].*expected: text"),
    "frozen": ({"frozen": 3}, FileFormatError, r"(?s)wrong kind.*key: frozen"),
    "inputs": ({"inputs": {"a": 3}}, FileFormatError, r"(?s)wrong kind.*key: inputs"),
    "export": ({"export": "bf61"}, UnknownNameError, "did you mean 'bf16'"),
    "a stage that is none": ({"stage": ["one"]}, FileFormatError, "stage 1 must be a table"),
    "lora": ({"lora": {"rnak": 4}}, UnknownNameError, "'rank'"),
    "lora's kind": ({"lora": {"rank": 4.5}}, FileFormatError, r"(?s)lora: this value.*key: rank"),
    "lora's size": ({"lora": {"alpha": 0}}, UnsupportedError, "alpha must be above 0"),
    "seed": ({"seed": -1}, UnsupportedError, "seed is too small"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    changes, kind, words = BAD[case]
    with pytest.raises(kind, match=words):
        config_of(given(**changes))


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    for content in (b"start = ", b"\xff\xfe", b"[" * 5000, b"#" * (2 << 20)):
        path.write_bytes(content)
        with pytest.raises(AlkahestError):
            read_config(path)
    with pytest.raises(AlkahestError):
        read_config(tmp_path / "nowhere.toml")
    assert isinstance(config_of(given()), Config)


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        ({"drawn": {"scenes": {"count": 1, "seed": 1}}}, FileFormatError, "drawn lacks models"),
        ({"drawn": {"models": {"a": {}}}}, FileFormatError, "scenes or prompts"),
        ({"drawn": {"models": {"aa": {}}, "prompts": "p.txt"}}, UnknownNameError, "did you mean 'a'"),
        ({"scenes": {"count": 4}}, FileFormatError, "scenes lacks seed"),
        ({"scenes": {"count": 4, "seed": 1, "subjekt": "man"}}, UnknownNameError, "'subject'"),
        ({"scenes": {"count": 4, "seed": 1, "subject": ["man", "womam"]}}, UnknownNameError, "'woman'"),
        ({"scenes": {"count": 0, "seed": 1}}, UnsupportedError, "count is too small"),
        ({"drawn": {"models": {"a": {"step": 4}}, "prompts": "p.txt"}}, UnknownNameError, "'steps'"),
        ({"drawn": {"models": {"a": {}}, "prompts": ["p"]}}, FileFormatError, "wrong kind"),
        ({"folder": 3}, FileFormatError, "wrong kind"),
        ({"scenes": "many"}, FileFormatError, "scenes must be a table"),
        ("folder", FileFormatError, "needs one of folder, scenes, drawn"),
    ],
)
def test_bad_data(data: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        config_of(given(data={"people": data}))

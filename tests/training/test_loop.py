"""Whole runs on the miniatures, a few steps long."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import alkahest as ak
from alkahest.engine.events import result_of
from alkahest.errors import (
    AlkahestError,
    FileFormatError,
    MismatchError,
    NonFiniteError,
    OutputError,
    RecipeError,
    UnknownNameError,
    UnsupportedError,
)
from alkahest.model.families.zimage import FAMILY
from alkahest.model.keys import Pattern
from alkahest.pictures.dataset import from_scenes
from alkahest.pictures.encoded import Encoded, Item
from alkahest.recipes.inputs import build
from alkahest.recipes.verify import stream_verdict
from alkahest.training import loop, states
from alkahest.training.config import Config, config_of
from alkahest.training.events import TrainingStep
from alkahest.training.inputs import start_of
from alkahest.training.loop import finetune, read_history, stream_finetune
from alkahest.training.optimise import Updates
from alkahest.training.order import Order
from alkahest.training.states import saved_checkpoints


def config(**changes: Any) -> Config:
    stages = [
        {"name": "one", "mix": {"people": 0.5, "things": 0.5}, "steps": 5, "lr": 1e-3, "batch": 4, "resolution": 64},
        {
            "name": "two",
            "mix": {"things": 1.0},
            "steps": 4,
            "lr": 5e-4,
            "batch": 3,
            "resolution": 64,
            "decay": "cosine",
        },
    ]
    return config_of(
        {
            "start": "lerp(deturbo, base, 0.5)",
            "inputs": {"deturbo": "mini:deturbo", "base": "mini:base"},
            "data": {
                "people": {"scenes": {"count": 30, "seed": 1, "subject": ["man", "woman"]}},
                "things": {"scenes": {"count": 20, "seed": 2, "style": "anime"}},
            },
            "stage": stages,
            "save_every": 3,
            "measure_every": 4,
            "held_out": 4,
            **changes,
        }
    )


def weights_of(result: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = result.weights.tensors.tensors
    return found


def test_a_run(tmp_path: Path) -> None:
    events = list(stream_finetune(config(ema=0.5), tmp_path / "run"))
    steps = [event for event in events if event.done and event.result is None]
    assert [event.done for event in steps] == list(range(1, 10))
    assert [event.key.split(":")[0] for event in steps] == ["one"] * 5 + ["two"] * 4
    result = events[-1].result
    assert result is not None
    history = result.history
    assert history.step.tolist() == [0, 4, 8, 9]
    assert history["held_out things 64"].iloc[-1] < history["held_out things 64"].iloc[0]
    assert [path.name for path in saved_checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step-0000006",
        "step-0000009",
    ]
    start = start_of(config())
    assert set(weights_of(result)) == {key for key in start.shapes if not Pattern("refiner", FAMILY).matches(key)}
    assert "finetuned(lerp(deturbo, base, 0.5)" in repr(result)
    assert result.ema is not None
    assert not torch.equal(
        result.ema.tensors.tensors["layers.0.attention.to_q.weight"],
        weights_of(result)["layers.0.attention.to_q.weight"],
    )  # type: ignore[attr-defined]
    drawn = ak.sample(ak.pipeline(result.weights), "a red ball", steps=2, cfg=1).images[0]
    assert drawn.size == (64, 64)


def test_frozen_tensors_are_the_starts_byte_for_byte(tmp_path: Path) -> None:
    result = finetune(config(), tmp_path / "run")
    before = load_file(start_of(config()).save(tmp_path / "start.safetensors").path)
    after = load_file(result.weights.save(tmp_path / "end.safetensors").path)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) == ("refiner" in name), name
    what, recipe = ak.read_recipe(tmp_path / "end.safetensors")
    assert what == "a checkpoint that was trained, which no recipe repeats"
    assert recipe.text == ""
    assert recipe.made.startswith("finetuned(lerp(deturbo, base, 0.5), ")
    assert set(recipe.inputs) == {"deturbo", "base"}
    verdict = result_of(stream_verdict(tmp_path / "end.safetensors"))
    assert (verdict.ok, verdict.recipe, verdict.made) == (True, None, recipe.made)
    assert verdict.inputs.keys() == {"deturbo", "base"}
    with pytest.raises(RecipeError, match="no recipe repeats that"):
        result_of(stream_verdict(tmp_path / "end.safetensors", recompute=True))
    with pytest.raises(RecipeError, match="no recipe repeats that"):
        build(recipe, {})
    # What is made of it has one: the file is an input like any other.
    opened = ak.open(tmp_path / "end.safetensors")
    merged = ak.lerp(opened, ak.mini.load("base"), 0.25).save(tmp_path / "merged.safetensors")
    assert result_of(stream_verdict(merged.path, {"end": opened.path}, recompute=True)).differing == []
    # What holds trained tensors that are in no file says so.
    inside = ak.lerp(result.weights, ak.mini.load("base"), 0.25).save(tmp_path / "inside.safetensors", dtype="fp16")
    assert any("no recipe" in note for note in inside.notes)
    said = ak.read_recipe(inside.path)[1]
    assert (said.text, said.output) == ("", {"dtype": "fp16"})


def test_a_family_s_bridges_say_that_they_were_trained() -> None:
    what, recipe = ak.read_recipe(ak.mini.WEIGHTS / "tb1.safetensors")
    assert (what, recipe.text) == ("a checkpoint that was trained, which no recipe repeats", "")
    assert recipe.made.startswith("finetuned(")


def test_a_frozen_tensor_that_moves_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alkahest.training import loop

    real = loop.losses

    def meddling(model: Any, *given: Any) -> torch.Tensor:
        with torch.no_grad():
            model.get_parameter("noise_refiner.1.feed_forward.w1.weight")[3, 5] += 1e-6
        return real(model, *given)

    monkeypatch.setattr(loop, "losses", meddling)
    with pytest.raises(MismatchError, match=r"frozen tensors have moved by step 3"):
        finetune(config(), tmp_path / "run")
    assert not saved_checkpoints(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimiser": "adafactor", "precision": "bf16"}, {"ema": 0.9, "accumulate": 2}, {"fused": True, "clip": 0.0}],
    ids=str,
)
def test_a_run_that_was_stopped_gives_the_same_bits(changes: dict[str, Any], tmp_path: Path) -> None:
    whole = finetune(config(**changes), tmp_path / "whole")
    for stop in (4, 8):
        events = stream_finetune(config(**changes), tmp_path / "stopped")
        for event in events:
            if event.done == stop:
                break
        events.close()
    again = finetune(config(**changes), tmp_path / "stopped")
    for name, value in weights_of(whole).items():
        assert torch.equal(value, weights_of(again)[name]), name
    if whole.ema is not None:
        assert all(
            torch.equal(value, again.ema.tensors.tensors[name]) for name, value in whole.ema.tensors.tensors.items()
        )  # type: ignore[union-attr, attr-defined]
    assert again.history.drop(columns=["loss"]).equals(whole.history.drop(columns=["loss"]))
    done: list[TrainingStep] = list(stream_finetune(config(**changes), tmp_path / "stopped"))
    assert done[-1].result is not None
    assert not [event for event in done if event.done and event.done < 9], "a finished run has nothing to do"


def test_mixed_precision_trains_in_float32_and_computes_in_bf16(tmp_path: Path) -> None:
    exact, mixed = finetune(config(), tmp_path / "exact"), finetune(config(precision="mixed"), tmp_path / "mixed")
    trained = weights_of(mixed)
    assert {value.dtype for value in trained.values()} == {torch.float32}
    name = "layers.1.feed_forward.w1.weight"
    assert not torch.equal(trained[name], trained[name].bfloat16().float())
    columns = ["held_out people 64", "held_out things 64"]
    assert np.allclose(mixed.history[columns], exact.history[columns], rtol=0.02)
    assert not mixed.history[columns].equals(exact.history[columns])
    start = load_file(start_of(config()).save(tmp_path / "start.safetensors").path)
    end = load_file(mixed.weights.save(tmp_path / "end.safetensors").path)
    assert all(torch.equal(value, end[key]) for key, value in start.items() if "refiner" in key)


@pytest.mark.parametrize(
    ("frozen", "moves"),
    [
        ("layers_only", lambda key: key.startswith("layers.")),
        ("nothing", lambda key: True),
        ("refiners", lambda key: "refiner" not in key),
    ],
)
def test_presets(frozen: str, moves: Callable[[str], bool], tmp_path: Path) -> None:
    result = finetune(config(frozen=frozen, measure_every=100, export=""), tmp_path / "run")
    assert set(weights_of(result)) == {key for key in start_of(config()).shapes if moves(key)}


@pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16"])
def test_a_lora_is_what_diffusers_loads(precision: str, tmp_path: Path) -> None:
    changes = {"lora": {"rank": 4, "alpha": 8, "targets": "attention"}, "precision": precision, "export": "fp32"}
    result = finetune(config(**changes), tmp_path / "run")
    path = tmp_path / "run" / "2-two.safetensors"
    modules = {key.removesuffix(".alpha").partition(".lora")[0] for key in load_file(path)}
    layers = {
        key for key in start_of(config()).shapes if key.startswith("layers.") and ".to_" in key and ".norm" not in key
    }
    assert modules == {f"diffusion_model.{key.removesuffix('.weight')}" for key in layers}, "not the frozen refiners"
    pipe = ak.pipeline(start_of(config()))
    pipe.load_lora_weights(str(path), adapter_name="ours")
    ours = ak.sample(ak.pipeline(result.weights), "a red ball", steps=2, cfg=1).images[0]
    theirs = ak.sample(pipe, "a red ball", steps=2, cfg=1, loras={"ours": 1.0}).images[0]
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
    before = ak.sample(ak.pipeline(start_of(config())), "a red ball", steps=2, cfg=1).images[0]
    assert np.abs(np.asarray(ours, int) - np.asarray(before, int)).max() > 1
    stopped = stream_finetune(config(**changes), tmp_path / "stopped")
    assert next(event for event in stopped if event.done == 4)
    stopped.close()
    finetune(config(**changes), tmp_path / "stopped")
    assert (tmp_path / "stopped" / "2-two.safetensors").read_bytes() == path.read_bytes()


def test_a_lora_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="no Linear is left for a LoRA"):
        finetune(config(lora={"targets": "noise_refiner"}), tmp_path / "run")


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"finetune: the device is not there(?s:.*)'cuda:99'"):
        finetune(config(), tmp_path / "run", device="cuda:99")


def test_memory_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alkahest.training import loop

    def greedy(*given: Any) -> torch.Tensor:
        return torch.empty(10**15)

    monkeypatch.setattr(loop, "losses", greedy)
    with pytest.raises(
        AlkahestError,
        match=r"(?s)out of memory.*allocate.*checkpointing = true, batch = 1 and adafactor, bf16, fused take the least",
    ):
        finetune(config(), tmp_path / "run")


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="POSIX has limits on file sizes, Windows has not")
    events = stream_finetune(config(export=""), tmp_path / "run")
    for event in events:
        if event.done == 4:
            break
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # from here on no file grows over a MB
    try:
        with pytest.raises(OutputError, match=r"(?s)could not be written.*step-0000006.*goes on from the checkpoint"):
            list(events)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000003"]
    again = finetune(config(export=""), tmp_path / "run")
    whole = finetune(config(export=""), tmp_path / "whole")
    assert all(torch.equal(value, weights_of(again)[name]) for name, value in weights_of(whole).items())


def test_kill_9_in_the_middle(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, torch; torch.set_num_threads(1)\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "from test_loop import config, finetune\n"
        "result = finetune(config(), sys.argv[1])\n"
        "result.weights.save(sys.argv[2], dtype='fp32')\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([sys.executable, script, whole, tmp_path / "whole.safetensors"], check=True, env=environment)
    process = subprocess.Popen([sys.executable, script, killed, tmp_path / "killed.safetensors"], env=environment)
    limit = time.time() + 100
    while not saved_checkpoints(killed / "checkpoints") and time.time() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed.safetensors").exists(), "it was killed too late"
    subprocess.run([sys.executable, script, killed, tmp_path / "killed.safetensors"], check=True, env=environment)
    assert (tmp_path / "killed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    stage = {"mix": {"things": 1.0}, "steps": 1, "lr": 1e-3, "resolution": 64, "batch": 4}
    given: dict[str, Any] = {
        "data": {"things": {"scenes": {"count": 4, "seed": 3}}},
        "held_out": 0,
        "clip": 0.0,
        "optimiser": "adafactor",
    }
    # A seed with which two batches of two come in the order of one batch of four.
    things = [Encoded("x", [Item(str(n), Path(), Path(), (8, 8, 32)) for n in range(4)], torch.zeros(1))]
    seed = next(
        seed
        for seed in range(99)
        if Order(things, [1.0], 2, seed).take().picks == Order(things, [1.0], 4, seed).take().picks[:2]
    )
    one = finetune(config(stage=[stage], seed=seed, **given), tmp_path / "one")
    two = finetune(config(stage=[{**stage, "batch": 2}], accumulate=2, seed=seed, **given), tmp_path / "two")
    assert one.history.loss.iloc[-1] == pytest.approx(two.history.loss.iloc[-1], rel=1e-5)
    for name, value in weights_of(one).items():
        assert torch.allclose(value, weights_of(two)[name], atol=1e-5), name


def test_the_history_can_be_read_while_it_trains(tmp_path: Path) -> None:
    events = stream_finetune(
        config(prompts=["a red ball", "a blue box"], sampling={"steps": 2, "cfg": 1}), tmp_path / "run"
    )
    for event in events:
        if event.done == 6:
            break
    table = read_history(tmp_path / "run")
    assert table.step.tolist() == [0, 4]
    assert {"lag1", "grid", "latent_std", "held_out people 64"} <= set(table)
    assert len(list((tmp_path / "run" / "pictures").glob("0000004-*.png"))) == 2
    events.close()


def pictures_of(folder: Path, count: int = 6) -> dict[str, Any]:
    """A folder of pictures of which some cannot be taken, and a run on it."""
    folder.mkdir(exist_ok=True)
    for number, example in enumerate(from_scenes(count, seed=3).examples):
        example.open().save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(example.caption)
    (folder / "none.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:60])
    (folder / "cut.txt").write_text("cut")
    stage = {"name": "one", "mix": {"mine": 1.0}, "steps": 4, "lr": 1e-4, "batch": 2, "resolution": 64}
    return {"data": {"mine": {"folder": str(folder)}}, "stage": [stage], "save_every": 2, "measure_every": 2}


def test_what_is_left_out_is_told_at_the_start_at_the_end_and_in_the_history(tmp_path: Path) -> None:
    changes = pictures_of(tmp_path / "mine")
    events = list(stream_finetune(config(**changes), tmp_path / "run"))
    (note,) = [event.note for event in events if event.note]
    assert note.startswith("mine: 2 files are left out (1: no caption; 1: unreadable: ")
    result = events[-1].result
    assert result is not None
    assert result.left_out["mine"]["none.png"] == "no caption"
    assert "unreadable" in result.left_out["mine"]["cut.png"]
    assert "mine: 2 files are left out" in repr(result)
    lines = (tmp_path / "run" / "history.jsonl").read_text().splitlines()

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert set(rows[0]["left_out"]["mine"]) == {"none.png", "cut.png"}
    assert rows[0]["noted"] == {}
    assert rows[1]["loss"] is None  # before the first step there is none
    assert np.isnan(result.history.loss[0])
    assert result.history.step.tolist() == [0, 2, 4]
    assert len(list(stream_finetune(config(**changes), tmp_path / "run"))) > 0
    assert (tmp_path / "run" / "history.jsonl").read_text().splitlines() == lines
    with pytest.raises(FileFormatError, match="strict refuses"):
        finetune(config(**changes, strict=True), tmp_path / "strict")


def test_what_is_not_taken_as_it_is_is_told_too(tmp_path: Path) -> None:
    """Also by a run that finds its pictures encoded already."""
    changes = pictures_of(tmp_path / "mine")
    with Image.open(tmp_path / "mine" / "1.png") as image:
        image.convert("RGBA").save(tmp_path / "mine" / "1.png")
    (tmp_path / "mine" / "2.caption").write_text("something else")
    for run in ("first", "second"):
        events = list(stream_finetune(config(**changes), tmp_path / run))
        told = [event.note for event in events if event.note]
        assert "mine: 2 pictures are not taken as they are" in told[1]
        result = events[-1].result
        assert result is not None
        assert result.noted["mine"] == {
            "1.png": "transparency is laid on white",
            "2.png": "two captions: 2.txt is taken; 2.caption says otherwise",
        }
        assert told[1] in repr(result)


@pytest.mark.parametrize("change", ["a caption", "a picture", "one more", "one less"])
def test_a_resumed_run_notices_that_its_data_changed(change: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    changes = pictures_of(mine)
    events = stream_finetune(config(**changes), tmp_path / "run")
    for event in events:
        if event.done == 3:
            break
    events.close()
    match change:
        case "a caption":
            (mine / "1.txt").write_text("another caption")
        case "a picture":
            (mine / "1.png").write_bytes((mine / "2.png").read_bytes())
        case "one more":
            (mine / "none.txt").write_text("now with a caption")
        case "one less":
            (mine / "1.png").unlink()
    with pytest.raises(MismatchError, match=r"(?s)the data is other than when the run was stopped.*another folder"):
        finetune(config(**changes), tmp_path / "run")


def test_a_damaged_history_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    good = '{"step": 0, "loss": 1.0}\n'
    path.write_text(good + '{"step": 4, "lo')  # cut off by a kill
    assert read_history(tmp_path).step.tolist() == [0]
    for bad in (b"nonsense\n", b"\xff\xfe\n", b"[1]\n", b'{"loss": 3}\n', b"[" * 100_000 + b"\n"):
        path.write_bytes(good.encode() + bad + good.encode())
        with pytest.raises(FileFormatError, match="line 2 of the history is damaged"):
            read_history(tmp_path)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'refiner'"):
        finetune(config(frozen="refinr"), tmp_path / "run")
    with pytest.raises(AlkahestError, match="everything is frozen"):
        finetune(config(frozen="all"), tmp_path / "run")
    with pytest.raises(NonFiniteError, match=r"(?s)no number any more.*checkpoints/step-0000003"):
        finetune(exploding(), tmp_path / "nan")
    finetune(config(), tmp_path / "run")
    with pytest.raises(MismatchError, match="of another configuration"):
        finetune(config(seed=5), tmp_path / "run")
    with pytest.raises(AlkahestError):
        finetune(config(inputs={"deturbo": "mini:nobody", "base": "mini:base"}), tmp_path / "other")


def exploding() -> Config:
    calm = {"mix": {"things": 1.0}, "steps": 3, "lr": 1e-3, "batch": 3, "resolution": 64}
    return config(stage=[calm, {**calm, "lr": 1e25, "steps": 5}], clip=0.0)


def test_a_run_draws_its_own_data(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red ball\na blue box by day\n")
    models = {"base": {"steps": 2, "cfg": 1}, "deturbo": {"steps": 2, "cfg": 2}}
    data = {
        "own": {"drawn": {"models": models, "scenes": {"count": 6, "seed": 9, "light": ["night"]}}},
        "told": {"drawn": {"models": {"base": {"steps": 1, "cfg": 1}}, "prompts": str(tmp_path / "prompts.txt")}},
    }
    stage = {"mix": {"own": 0.7, "told": 0.3}, "steps": 2, "lr": 1e-4, "batch": 2, "resolution": 64}
    events = list(stream_finetune(config(data=data, stage=[stage], held_out=0), tmp_path / "run"))
    drawn = sorted(path.name for path in (tmp_path / "run" / "data" / "own").glob("*.png"))
    assert drawn == [f"{name}-{n:05}.png" for name in ("base", "deturbo") for n in range(6)]
    expected = [example.caption for example in from_scenes(6, 9, light=("night",)).examples]
    assert [(tmp_path / "run" / "data" / "own" / f"base-{n:05}.txt").read_text() for n in range(6)] == expected
    assert (tmp_path / "run" / "data" / "told" / "base-00001.txt").read_text() == "a blue box by day"
    assert any("drawing own: 12 of 12" in event.key for event in events)


def test_each_stage_leaves_a_checkpoint(tmp_path: Path) -> None:
    result = finetune(config(export="fp32"), tmp_path / "run")
    last = ak.open(tmp_path / "run" / "2-two.safetensors")
    for key, value in weights_of(result).items():
        assert torch.equal(last[key], value)
    first = ak.open(tmp_path / "run" / "1-one.safetensors")
    assert not torch.equal(first["layers.0.attention.to_q.weight"], last["layers.0.attention.to_q.weight"])
    finetune(config(export=""), tmp_path / "none")
    assert not list((tmp_path / "none").glob("*.safetensors"))


def test_a_control_starts_from_random_layers(tmp_path: Path) -> None:
    from alkahest.training.inputs import reset_tensors

    pipe = ak.pipeline(start_of(config()))
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    reset_tensors(pipe.transformer, Pattern("layers", FAMILY), seed=4)
    after = pipe.transformer.state_dict()
    for name, value in after.items():
        if name.startswith("layers.") and value.ndim > 1:
            cosine = torch.nn.functional.cosine_similarity(value.flatten(), before[name].flatten(), 0)
            assert abs(float(cosine)) < 0.05
            assert float(value.std()) == pytest.approx(float(before[name].std()), rel=0.05)
        else:
            assert torch.equal(value, before[name]), name
    one, two = (finetune(config(reset="layers", seed=seed), tmp_path / str(seed)) for seed in (0, 0))
    assert all(torch.equal(value, weights_of(two)[name]) for name, value in weights_of(one).items())


def stopped_run(folder: Path) -> Path:
    """A run that was stopped after its first checkpoint; that checkpoint."""
    events = stream_finetune(config(), folder)
    for event in events:
        if event.done == 4:
            break
    events.close()
    (saved,) = saved_checkpoints(folder / "checkpoints")
    return saved


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError("no memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out of memory"),
        (OSError(5, "Input/output error"), "cannot be read at the moment"),
    ],
)
def test_what_says_nothing_against_a_checkpoint_is_not_told_as_damage(
    error: Exception, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = stopped_run(tmp_path / "run")

    def fail(*given: Any, **more: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(states, "load", fail)
        with pytest.raises(AlkahestError, match=told) as caught:
            finetune(config(), tmp_path / "run")
    assert "damaged" not in str(caught.value)
    assert "delete" not in str(caught.value)
    assert saved_checkpoints(tmp_path / "run" / "checkpoints") == [saved]
    assert finetune(config(), tmp_path / "run").history.step.iloc[-1] == 9, "it was sound"


def _cut(path: Path) -> None:
    file = path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def _garbled(path: Path) -> None:
    file = path / "state.safetensors"
    file.write_bytes(b"\xff" * 20 + file.read_bytes()[20:])


def _renamed(path: Path) -> None:
    file = path / "state.safetensors"
    state = load_file(file)
    first = sorted(state)[0]
    save_file({name + "_" * (name == first): value for name, value in state.items()}, file)


def _flipped(checkpoint: Path) -> None:
    """One bit of one number."""
    raw = bytearray((checkpoint / "state.safetensors").read_bytes())
    raw[-3] ^= 1
    (checkpoint / "state.safetensors").write_bytes(raw)


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    first = stream_finetune(config(), tmp_path / "run")
    for event in first:
        if event.done == 1:
            break
    with pytest.raises(AlkahestError, match="another process is at work in this folder"):
        finetune(config(), tmp_path / "run")
    first.close()
    finetune(config(), tmp_path / "run")


@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        _garbled,
        _renamed,
        lambda p: (p / "state.safetensors").unlink(),
        lambda p: (p / "state.json").write_text("{}"),
        _flipped,
    ],
)
def test_a_damaged_checkpoint_is_told_so(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    damage(stopped_run(tmp_path / "run"))
    with pytest.raises(FileFormatError, match="this checkpoint is damaged"):
        finetune(config(), tmp_path / "run")


def test_the_running_mean_is_that_of_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand in float64: most of what was, a little of what is."""
    seen: list[dict[str, torch.Tensor]] = []
    real = loop._Training._one

    def watched(self: Any, *given: Any) -> float:
        if not seen:
            seen.append({name: p.detach().double().clone() for name, p in self.trained.items()})
        loss = real(self, *given)
        seen.append({name: p.detach().double().clone() for name, p in self.trained.items()})
        return loss

    monkeypatch.setattr(loop._Training, "_one", watched)
    result = finetune(config(ema=0.9), tmp_path / "run")
    assert len(seen) == 10
    name = "layers.1.attention.to_v.weight"
    mean = seen[0][name]
    for now in seen[1:]:
        mean = 0.9 * mean + 0.1 * now[name]
    found = result.ema.tensors.tensors[name].double()  # type: ignore[union-attr, attr-defined]
    torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-7)
    assert (found - seen[-1][name]).abs().max() > 10 * (found - mean).abs().max()


@pytest.mark.parametrize("accumulate", [1, 4])
def test_gradients_are_the_mean_over_what_is_accumulated(
    accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a loss whose gradient is known: neither Adam's steps nor Adafactor's show how long a gradient is."""
    found: list[torch.Tensor] = []
    name = "layers.1.attention.to_v.weight"

    def known(model: Any, made: Any, how: Any) -> torch.Tensor:
        return 3.0 * model.get_parameter(name).sum() * torch.ones(len(made.latents))

    def finish(self: Updates) -> None:
        found.append(self._parameters[name].grad.clone())  # type: ignore[union-attr]
        for parameter in self._parameters.values():
            parameter.grad = None

    monkeypatch.setattr(loop, "losses", known)
    monkeypatch.setattr(Updates, "finish", finish)
    finetune(config(accumulate=accumulate, clip=0.0), tmp_path / "run")
    assert len(found) == 9
    for gradient in found:
        torch.testing.assert_close(gradient, torch.full_like(gradient, 3.0))

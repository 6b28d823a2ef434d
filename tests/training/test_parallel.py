"""Two processes over gloo against one: the same run within float noise, and each goes on where the other stopped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from alkahest.errors import UnsupportedError
from alkahest.model.families.zimage import FAMILY
from alkahest.training import parallel
from alkahest.training.config import read_config
from alkahest.training.inputs import start_of
from alkahest.training.loop import finetune, read_history, stream_finetune

CONFIG = """
start = "lerp(deturbo, base, 0.5)"
save_every = 4
measure_every = 4
held_out = 3
ema = 0.5
export = "fp32"
prompts = ["a red ball"]
sampling = {{ steps = 2, cfg = 1 }}
{more}
[inputs]
deturbo = "mini:deturbo"
base = "mini:base"
[data.people]
scenes = {{ count = 30, seed = 1, subject = ["man", "woman"] }}
[[stage]]
name = "one"
mix = {{ people = 1.0 }}
steps = 6
lr = 1e-3
batch = {batch}
resolution = 64
"""


def written(folder: Path, more: str = "", batch: int = 6) -> Path:
    path = folder / "run.toml"
    path.write_text(CONFIG.format(more=more, batch=batch))
    return path


HALF_THE_MEMORY = {
    "bf16": 'precision = "bf16"\nfused = true\nclip = 0.0\ncheckpointing = true',
    "mixed": 'precision = "mixed"\nfrozen = "layers_only"',
}
# Starting a process costs more than a run of six steps, so that both of a pair go through several.
RUNS = """
import sys
from alkahest.cli.train import train_with_progress
from alkahest.training import parallel
with parallel.processes() as device:
    for config, folder in zip(sys.argv[1::2], sys.argv[2::2]):
        train_with_progress(config, folder, device, 1, quiet=True)
"""


def train_in_two(script: Sequence[str]) -> None:
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *script],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=300,
    )


def export(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "1-one.safetensors")


def moved(start: dict[str, torch.Tensor], end: dict[str, torch.Tensor]) -> float:
    """Norm of a difference of all tensors."""
    return float(torch.stack([(end[key] - value).double().norm() for key, value in start.items()]).norm())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs by name: of one process, of two, each gone on with by the other, and at half the memory."""
    folder = tmp_path_factory.mktemp("parallel")
    config = written(folder)
    finetune(read_config(config), folder / "one")
    train_in_two(["-m", "alkahest.finetune", str(config), "-o", str(folder / "two"), "--threads", "1"])
    for other, name in {"one": "two after one", "two": "one after two"}.items():
        shutil.copytree(folder / other, folder / name)
        shutil.rmtree(folder / name / "checkpoints" / "step-0000006")
        (folder / name / "1-one.safetensors").unlink()
    finetune(read_config(config), folder / "one after two")
    several = [str(config), str(folder / "two after one")]
    for name, more in HALF_THE_MEMORY.items():
        (folder / f"in {name}").mkdir()
        several += [str(written(folder / f"in {name}", more)), str(folder / name)]
    (folder / "runs.py").write_text(RUNS)
    train_in_two([str(folder / "runs.py"), *several])
    return folder


def test_two_processes_are_one_within_float_noise(runs: Path, tmp_path: Path) -> None:
    config, one, two = runs / "run.toml", runs / "one", runs / "two"
    a, b = export(one), export(two)
    start = load_file(start_of(read_config(config)).save(tmp_path / "start.safetensors", dtype="fp32").path)
    assert moved(a, b) < 1e-3 * moved(start, a)
    assert all(
        torch.equal(value, a[key]) and torch.equal(value, b[key]) for key, value in start.items() if "refiner" in key
    )
    measured = [read_history(folder).drop(columns=["stage"]) for folder in (one, two)]
    pd.testing.assert_frame_equal(*measured, rtol=1e-3, atol=1e-5)
    assert sorted(path.name for path in (two / "pictures").iterdir()) == [f"{step:07}-00.png" for step in (0, 4, 6)]
    shards = list((two / "checkpoints" / "step-0000006").glob("*.safetensors"))
    assert len(shards) == 2
    assert all("optimiser|layers.0.attention.to_q.weight|exp_avg" in load_file(shard) for shard in shards)


@pytest.mark.parametrize("name", ["one after two", "two after one"])
def test_each_goes_on_where_the_other_stopped(runs: Path, name: str) -> None:
    assert moved(export(runs / "one"), export(runs / name)) < 1e-2
    assert read_history(runs / name).step.tolist() == [0, 4, 6]


@pytest.mark.parametrize("name", list(HALF_THE_MEMORY))
def test_half_the_memory(runs: Path, name: str, tmp_path: Path) -> None:
    config = read_config(runs / f"in {name}" / "run.toml")
    losses = read_history(runs / name)["held_out people 64"]
    assert losses.iloc[-1] < losses.iloc[0]
    end = export(runs / name)
    start = load_file(start_of(config).save(tmp_path / "start.safetensors", dtype="fp32").path)
    fixed = [key for key in start if not config.trains(key, FAMILY)]
    assert all(torch.equal(start[key], end[key]) for key in fixed)
    assert not torch.equal(start["layers.1.feed_forward.w1.weight"], end["layers.1.feed_forward.w1.weight"])


@pytest.mark.parametrize(
    ("more", "batch", "words"),
    [('optimiser = "adafactor"', 6, "adafactor needs whole tensors"), ("", 5, "2 processes cannot share its batch")],
)
def test_what_processes_cannot_share_is_refused(
    more: str, batch: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "size", lambda: 2)
    with pytest.raises(UnsupportedError, match=words):
        list(stream_finetune(read_config(written(tmp_path, more, batch)), tmp_path / "run"))
    assert not (tmp_path / "run").exists()

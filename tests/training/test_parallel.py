"""Two processes over gloo against one: the same run within float noise, and each goes on where the other stopped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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
from alkahest.training.loop import read_history, stream_finetune

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


def train(config: Path, folder: Path, processes: int) -> None:
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        "-m",
        "alkahest.finetune",
    ]
    if processes == 1:
        command = ["-m", "alkahest", "finetune", "--quiet"]
    subprocess.run(
        [sys.executable, *command, str(config), "-o", str(folder), "--threads", "1"],
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
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("parallel")
    config = written(folder)
    for count, name in enumerate(("one", "two"), 1):
        train(config, folder / name, count)
    return config, folder / "one", folder / "two"


def test_two_processes_are_one_within_float_noise(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    config, one, two = runs
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


@pytest.mark.parametrize("processes", [1, 2])
def test_each_goes_on_where_the_other_stopped(runs: tuple[Path, Path, Path], processes: int, tmp_path: Path) -> None:
    config, *folders = runs
    other = folders[2 - processes]
    shutil.copytree(other, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-0000006")
    (tmp_path / "run" / "1-one.safetensors").unlink()
    train(config, tmp_path / "run", processes)
    assert moved(export(folders[0]), export(tmp_path / "run")) < 1e-2
    assert read_history(tmp_path / "run").step.tolist() == [0, 4, 6]


@pytest.mark.parametrize(
    "more",
    [
        'precision = "bf16"\nfused = true\nclip = 0.0\ncheckpointing = true',
        'precision = "mixed"\nfrozen = "layers_only"',
    ],
    ids=["bf16", "mixed"],
)
def test_half_the_memory(more: str, tmp_path: Path) -> None:
    config = written(tmp_path, more)
    train(config, tmp_path / "run", 2)
    losses = read_history(tmp_path / "run")["held_out people 64"]
    assert losses.iloc[-1] < losses.iloc[0]
    end = export(tmp_path / "run")
    start = load_file(start_of(read_config(config)).save(tmp_path / "start.safetensors", dtype="fp32").path)
    fixed = [key for key in start if not read_config(config).trains(key, FAMILY)]
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

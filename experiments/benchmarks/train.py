"""Peak memory and time of training steps on blocks of real width, beside what ``alkahest finetune --plan`` says.

    python experiments/benchmarks/train.py --resolution 512

Models of width 3840 with one and with two layers (and the real refiners, frozen), random numbers, in fresh processes:
the difference is one block of the 30. Memory is anonymous memory at its peak over two steps less what was there before
the model; on a GPU (``--device cuda``) the allocator's peak. ``--layers 30`` measures the whole model.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

MODES = {
    "adafactor, bf16, fused": {"optimiser": "adafactor", "precision": "bf16", "fused": True, "clip": 0.0},
    "adafactor, bf16": {"optimiser": "adafactor", "precision": "bf16"},
    "adamw, bf16": {"optimiser": "adamw", "precision": "bf16"},
    "adamw, fp32 master": {"optimiser": "adamw", "precision": "mixed"},
}
GIB = 1 << 30
HERE = Path(__file__).parent


def step_memory(
    mode: str, layers: int, resolution: int, checkpointing: bool, device: str, threads: int
) -> dict[str, float]:
    """GiB at the peak of a step, what the plan says, and seconds of the second step."""
    import torch

    import alkahest as ak
    from alkahest.model.families.zimage import FAMILY
    from alkahest.pictures.flow import Arithmetic, losses
    from alkahest.pictures.pipelines import empty_transformer
    from alkahest.training.config import Stage, config_of
    from alkahest.training.inputs import lighten
    from alkahest.training.memory import memory_plan
    from alkahest.training.objective import add_noise
    from alkahest.training.optimise import Updates

    torch.set_num_threads(threads)
    weights = ak.made_up(layers=layers)
    stage = {"mix": {"x": 1.0}, "steps": 2, "lr": 1e-5}
    config = config_of(
        {
            "start": "x",
            "inputs": {},
            "data": {"x": {"folder": "."}},
            "stage": [stage],
            "frozen": "layers_only",
            **MODES[mode],
        }
    )
    before = memory_now(device)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = empty_transformer(weights, torch.bfloat16, device=device)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0, 0.02)
        if config.trains(name, FAMILY):
            parameter.data = parameter.data.to(dtype)
    lighten(model, config, FAMILY)
    trained = {name: p.requires_grad_() for name, p in model.named_parameters() if config.trains(name, FAMILY)}
    if checkpointing:
        model.enable_gradient_checkpointing()
    updates, how = Updates(trained, config), Arithmetic(torch.device(device), dtype, config.precision == "mixed")
    side = resolution // 8
    latents, caption = torch.randn(16, side, side), torch.randn(128, 2560)
    forget_peak(device)
    for number in range(2):
        started = time.perf_counter()
        batch = add_noise([latents], [caption], caption, Stage("x", {}, 1, 1.0), 0, number)
        updates.begin(number, 1e-5)
        loss = losses(model.train(), batch, how).mean()
        loss.backward()
        updates.finish()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    row = (
        memory_plan(weights, frozen="layers_only", resolution=resolution, checkpointing=checkpointing)
        .set_index("mode")
        .loc[mode]
    )
    said = {name: float(row[name]) for name in ("weights", "gradients", "optimiser", "activations")}
    return {"measured": (peak_memory(device) - before) / GIB, "planned": sum(said.values()), "seconds": seconds, **said}


def memory_now(device: str) -> int:
    import torch

    return _status("RssAnon") if device == "cpu" else torch.cuda.memory_allocated()


def forget_peak(device: str) -> None:
    import torch

    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: str) -> int:
    """The peak since `forget_peak`, less the files that are mapped."""
    import torch

    return (
        _status("VmHWM") - _status("RssFile") - _status("RssShmem")
        if device == "cpu"
        else torch.cuda.max_memory_allocated()
    )


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--only", nargs=3, metavar=("MODE", "LAYERS", "CHECKPOINTING"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        mode, layers, checkpointing = options.only
        print(
            json.dumps(
                step_memory(
                    mode, int(layers), options.resolution, checkpointing == "1", options.device, options.threads
                )
            )
        )
        return
    rows = []
    print(
        f"{platform.processor() or platform.machine()}, {options.device}, {options.threads} threads, "
        f"{options.resolution} x {options.resolution}, batch 1"
    )
    print(f"{'mode':26} {'checkpointing':14} {'layers':>6} {'measured GiB':>13} {'planned GiB':>12} {'s a step':>9}")
    for mode in MODES:
        for checkpointing in ("1", "0"):
            found = []
            for layers in options.layers:
                shared = [
                    "--resolution",
                    str(options.resolution),
                    "--device",
                    options.device,
                    "--threads",
                    str(options.threads),
                ]
                command = [sys.executable, __file__, *shared, "--only", mode, str(layers), checkpointing]
                # glibc keeps what it frees below 32 MB in gaps of its heap, which no GPU's allocator has: return it.
                environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                found.append(json.loads(done.stdout))
                rows.append({"mode": mode, "checkpointing": checkpointing, "layers": layers, **found[-1]})
                show(mode, checkpointing, str(layers), found[-1])
            if len(found) == 2:
                show(mode, checkpointing, "a block", {key: found[1][key] - found[0][key] for key in found[0]})
    with (HERE / f"train-{options.device}-{options.resolution}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(
            {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()} for row in rows
        )


def show(mode: str, checkpointing: str, layers: str, found: dict[str, float]) -> None:
    told = "yes" if checkpointing == "1" else "no"
    print(
        f"{mode:26} {told:14} {layers:>6} {found['measured']:13.2f} {found['planned']:12.2f} {found['seconds']:9.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()

"""Time, memory and energy of ``extract_lora`` on made-up files of real width, beside ``torch.linalg.svd`` of every matrix.

    python experiments/benchmarks/lora.py --layers 2
    python experiments/benchmarks/lora.py --layers 30 --whole

The variant is the base plus 32 directions in every matrix, rounded to bf16. Ours and the full decomposition,
the way PEFT and kohya's scripts go, run in turns on one layer, each in a fresh process, with the same threads,
from the files to the written LoRA; ``--whole`` then extracts every layer of the files once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from merge import measure
from safetensors.torch import load_file, save_file

import alkahest as ak

RANK = 32
RULES: dict[str, dict[str, Any]] = {
    "energy 0.995": {"energy": 0.995}, "energy 0.995, no cap": {"energy": 0.995, "rank_max": None}, "noise edge": {"noise_edge": True, "rank_max": None},
}  # fmt: skip


def make(folder: Path, layers: int, size: float) -> None:
    """base.safetensors and variant.safetensors, unless they are there."""
    if (folder / "variant.safetensors").exists():
        return
    base = ak.open(ak.made_up(layers=layers).save(folder / "base.safetensors").path)
    tensors = {}
    for key, shape in base.shapes.items():
        if len(shape) == 2 and min(shape) > RANK and key.endswith(".weight"):
            generator = torch.Generator().manual_seed(sum(map(ord, key)))
            up, down = (
                torch.randn(shape[0], RANK, generator=generator),
                torch.randn(RANK, shape[1], generator=generator),
            )
            module = f"diffusion_model.{key.removesuffix('.weight')}"
            # The made-up weights' standard deviation is 0.02.
            tensors |= {f"{module}.lora_B.weight": up * (0.02 * size / RANK**0.5), f"{module}.lora_A.weight": down}
    save_file(tensors, folder / "planted.safetensors")
    (base + ak.open_lora(folder / "planted.safetensors")).save(folder / "variant.safetensors")


def ours(folder: Path, only: str, rule: str, threads: int) -> Any:
    variant, base = (ak.open(folder / f"{name}.safetensors") for name in ("variant", "base"))
    found = ak.extract_lora(variant - base, include=only, threads=threads, **RULES[rule])
    found.save(folder / "out.safetensors")
    return found


def checked(folder: Path, report: Any) -> dict[str, Any]:
    """What was found, and the energy of one layer once more in float64 from the written file."""
    variant, base = (ak.open(folder / f"{name}.safetensors") for name in ("variant", "base"))
    stored = load_file(folder / "out.safetensors")
    kept = report[report.kept == "LoRA"]
    layer = kept[kept.tensor.str.startswith("layers.0.")]
    wrong = 0.0
    for row in layer.itertuples():
        module = f"diffusion_model.{row.tensor.removesuffix('.weight')}"
        d = variant[row.tensor].double() - base[row.tensor].double()
        left = d - stored[f"{module}.lora_B.weight"].double() @ stored[f"{module}.lora_A.weight"].double()
        wrong = max(wrong, abs(row.energy - (1 - float(left.square().sum() / d.square().sum()))))
    return {
        "tensors": len(kept), "least rank": int(kept["rank"].min()), "greatest rank": int(kept["rank"].max()), "capped": int(kept.capped.sum()),
        "least energy": round(float(kept.energy.min()), 5), "noise": round(float(kept.noise.mean()), 5),
        "MB": round(kept.nbytes.sum() / 1e6, 1), "energy off by at most": wrong,
    }  # fmt: skip


def full_svd(folder: Path, only: str, threads: int) -> None:
    torch.set_num_threads(threads)
    variant, base = (ak.open(folder / f"{name}.safetensors") for name in ("variant", "base"))
    tensors = {}
    for key in base.part(only):
        if len(base.shapes[key]) == 2 and key.endswith(".weight"):
            u, s, v = torch.linalg.svd(variant[key].float() - base[key].float(), full_matrices=False)
            rank = min(64, int(torch.searchsorted(torch.cumsum(s**2, 0), 0.995 * (s**2).sum())) + 1)
            root = s[:rank].sqrt()
            module = key.removesuffix(".weight")
            tensors |= {f"{module}.lora_B.weight": (u[:, :rank] * root).bfloat16().contiguous(), f"{module}.lora_A.weight": (root[:, None] * v[:rank]).bfloat16().contiguous()}  # fmt: skip
    save_file(tensors, folder / "out.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--size", type=float, default=0.05, help="norm of the planted change over that of the weights")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--whole", action="store_true", help="also extract every layer, once for each rule")
    parser.add_argument("--folder", type=Path, help="where the two files are, or shall be made and kept")
    parser.add_argument("--only", nargs=2, metavar=("RUN", "PATTERN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        run, pattern = options.only
        report: list[Any] = []
        if run == "svd":
            print(json.dumps(measure(lambda: full_svd(options.folder, pattern, options.threads))))
            return
        import pandas  # noqa: F401 - starting Python is not what is measured

        times = measure(lambda: report.append(ours(options.folder, pattern, run, options.threads)))
        print(json.dumps({**times, **checked(options.folder, report[0].report)}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        make(folder, options.layers, options.size)
        size = (folder / "base.safetensors").stat().st_size
        print(f"{platform.processor() or platform.machine()}, {options.threads} threads, 2 x {size / 1e9:.2f} GB")
        found: dict[str, list[float]] = {name: [] for name in ("svd", *RULES)}
        for _ in range(options.rounds):
            for name, walls in found.items():
                walls.append(run_apart(name, "layers.0", folder, options)["wall"])
        for name in RULES:
            ratios = [a / b for a, b in zip(found["svd"], found[name], strict=True)]
            print(f"one layer, {name}: {statistics.median(ratios):.1f} times as fast as torch.linalg.svd")
        for name in RULES if options.whole else ():
            run_apart(name, "all", folder, options)


def run_apart(name: str, pattern: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "ALKAHEST_CACHE": cache, "OMP_NUM_THREADS": str(options.threads)}
        command = [sys.executable, __file__, "--only", name, pattern, "--folder", str(folder), "--threads", str(options.threads)]  # fmt: skip
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    print(f"{pattern:9} {name:20}", {key: float(f"{value:.4g}") for key, value in result.items()}, flush=True)
    return result


if __name__ == "__main__":
    main()

"""How often ``a + k*(v - b)`` in bf16 differs from the correctly rounded float64 answer.

    python experiments/benchmarks/exactness.py --layers 1

On made-up files of real width: every element of the output is compared, at k = 1.1 and 171.1, with
the default order (difference first) and with ComfyUI's.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import alkahest as ak


def rounded(exact: torch.Tensor) -> torch.Tensor:
    """float64 to bf16 in one rounding to nearest even; by way of float32 it would be two."""
    bits = exact.view(torch.int64)
    half, odd = (1 << 44) - 1, (bits >> 45) & 1
    return ((bits + half + odd) >> 45 << 45).view(torch.float64).to(torch.bfloat16)


def differing(
    path: Path, bridge: ak.Checkpoint, variant: ak.Checkpoint, base: ak.Checkpoint, k: float
) -> tuple[int, int]:
    merged = ak.open(path)
    wrong = total = 0
    for key in merged:
        flat = [model[key].view(-1).split(1 << 22) for model in (merged, bridge, variant, base)]
        for out, a, v, b in zip(*flat, strict=True):
            wrong += int((out != rounded(a.double() + k * (v.double() - b.double()))).sum())
            total += out.numel()
    return wrong, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--width", type=int, default=3840)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = {"bridge": {"seed": 1}, "variant": {"delta": 0.02}, "base": {}}
        for file, settings in made.items():
            ak.made_up(layers=options.layers, width=options.width, **settings).save(folder / f"{file}.safetensors")
        bridge, variant, base = (ak.open(folder / f"{file}.safetensors") for file in made)
        for comfy in (False, True):
            for k in (1.1, 171.1):
                (bridge + k * (variant - base)).save(folder / "out.safetensors", comfy_compatible=comfy)
                wrong, total = differing(folder / "out.safetensors", bridge, variant, base, k)
                order = "ComfyUI's order" if comfy else "difference first"
                print(f"{order:17} k = {k:5}: {wrong:>9,} of {total:,} differ ({wrong / total * 1e6:.1f} in a million)")


if __name__ == "__main__":
    main()

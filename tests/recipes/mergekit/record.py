"""Record what mergekit makes of the configs here: in an environment of its own, ``pip install mergekit==0.1.5``, then
``python tests/recipes/mergekit/record.py``.

It runs mergekit's own planner for raw files with the place in the stack that ``mergekit-yaml`` gives each layer, 0
before the first block and 1 after the last. Inputs are made once and kept, as the numbers are, in ``numbers.safetensors``.
"""

import os
import re
import tempfile
from pathlib import Path

import torch
import yaml
from mergekit.graph import Executor
from mergekit.options import MergeOptions
from mergekit.parameter_resolver import resolve_parameters
from mergekit.scripts import merge_raw_pytorch as raw
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
BLOCKS = 3
SHAPES = {
    "x_embedder.weight": (32, 16),
    "noise_refiner.0.attention.out.weight": (32, 32),
    "context_refiner.0.feed_forward.w1.weight": (85, 32),
    **{f"layers.{n}.attention.out.weight": (32, 32) for n in range(BLOCKS)},
    **{f"layers.{n}.attention_norm1.weight": (32,) for n in range(BLOCKS)},
    "layers.1.attention.qkv.weight": (96, 32),
    "layers.2.attention.q_norm.weight": (32,),
    "final_layer.linear.weight": (16, 32),
}


def inputs() -> dict[str, dict[str, torch.Tensor]]:
    torch.manual_seed(29)
    base = {key: 0.1 * torch.randn(shape) + float("norm" in key) for key, shape in SHAPES.items()}
    shared = {key: torch.randn(shape) for key, shape in SHAPES.items()}
    made = {"base": base}
    for name, size in (("a", 0.05), ("b", 0.08)):
        made[name] = {key: base[key] + size * (0.6 * shared[key] + torch.randn(shape)) for key, shape in SHAPES.items()}
    return made


def place(name: str) -> float:
    block = re.match(r"layers\.(\d+)\.", name)
    return int(block[1]) / (BLOCKS - 1) if block else float(name.startswith("final_layer"))


def main() -> None:
    made, numbers = inputs(), {}
    raw.resolve_parameters = lambda spec, **given: resolve_parameters(spec, t=place(given["tensor_name"]), **given)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name, tensors in made.items():
            save_file(tensors, f"{name}.safetensors")
            numbers |= {f"{name}/{key}": tensor for key, tensor in tensors.items()}
        for path in sorted(HERE.glob("*.yml")):
            torch.manual_seed(29)
            config = raw.RawPyTorchMergeConfig.model_validate(yaml.safe_load(path.read_text()))
            tasks = raw.plan_flat_merge(config, f"{path.stem}", False, False, MergeOptions(safe_serialization=True))
            Executor(tasks).execute()
            (result,) = Path(path.stem).glob("*.safetensors")
            numbers |= {f"{path.stem}/{key}": tensor for key, tensor in load_file(result).items()}
    save_file(numbers, HERE / "numbers.safetensors")


if __name__ == "__main__":
    main()

"""The other tools' side of each benchmark, run by their own Python, which has no Alkahest in it.

Each is used as its own documentation shows, with the same threads; sd-mecha writes bf16 when told to.
"""

from __future__ import annotations

import sys
from pathlib import Path

from measured import run_job

K = 0.7
NAMES = ("bridge", "variant", "base")


def torch_merge(folder: Path, threads: int) -> None:
    """Plain torch: three files loaded, a dictionary computed in float32, saved."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(threads)
    a, b, c = (load_file(folder / f"{name}.safetensors") for name in NAMES)
    merged = {key: (a[key].float() + K * (b[key].float() - c[key].float())).bfloat16() for key in a}
    save_file(merged, folder / "out.safetensors")


def mecha_merge(folder: Path, threads: int) -> None:
    import sd_mecha
    import torch

    torch.set_num_threads(threads)
    a, b, c = (sd_mecha.model(folder / f"{name}.safetensors") for name in NAMES)
    recipe = a + (b - c) * K
    sd_mecha.merge(
        recipe, output=folder / "out.safetensors", output_dtype=torch.bfloat16, merge_device="cpu", threads=threads
    )


def mergekit_merge(folder: Path, threads: int) -> None:
    """Task arithmetic about the base: c + (a - c) + K (b - c)."""
    import torch
    from click.testing import CliRunner
    from mergekit.scripts.merge_raw_pytorch import main

    torch.set_num_threads(threads)
    a, b, c = (folder / f"{name}.safetensors" for name in NAMES)
    config = folder / "mergekit.yaml"
    config.write_text(
        f"merge_method: task_arithmetic\nbase_model: {c}\ndtype: bfloat16\nmodels:\n"
        f"  - model: {a}\n    parameters: {{weight: 1.0}}\n  - model: {b}\n    parameters: {{weight: {K}}}\n"
    )
    done = CliRunner().invoke(main, [str(config), str(folder / "mergekit-out")])
    if done.exit_code:
        raise SystemExit(f"mergekit: {done.output}\n{done.exception!r}")


def deltas(folder: Path, threads: int):
    """The matrices of one layer's change, one after the other."""
    import torch
    from safetensors import safe_open

    torch.set_num_threads(threads)
    with safe_open(folder / "variant.safetensors", "pt") as v, safe_open(folder / "base.safetensors", "pt") as b:
        for key in v.keys():  # noqa: SIM118
            value = v.get_tensor(key)
            if key.startswith("layers.0.") and value.dim() == 2:
                yield key, value.float() - b.get_tensor(key).float()


def svd(folder: Path, threads: int) -> None:
    """As kohya's and LyCORIS' scripts: the whole decomposition of every matrix, then the rank that keeps the energy."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for key, delta in deltas(folder, threads):
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        rank = min(64, int(torch.searchsorted(torch.cumsum(s**2, 0), 0.995 * (s**2).sum())) + 1)
        root = s[:rank].sqrt()
        tensors[f"{key}.lora_up"] = (u[:, :rank] * root).bfloat16().contiguous()
        tensors[f"{key}.lora_down"] = (root[:, None] * v[:rank]).bfloat16().contiguous()
    save_file(tensors, folder / "lora.safetensors")


def peft(folder: Path, threads: int) -> None:
    """What PEFT's convert_to_lora does with each layer, given the change as an adapter's delta weight."""
    import torch
    from peft.tuners.lora.conversion import _convert_module_to_lora
    from safetensors.torch import save_file

    class Change:
        def __init__(self, delta) -> None:
            self.delta = delta

        def get_delta_weight(self, adapter):
            return self.delta

        def get_base_layer(self):
            return torch.nn.Linear(1, 1)

    tensors = {}
    for key, delta in deltas(folder, threads):
        down, up, _ = _convert_module_to_lora(Change(delta), 0.995)
        tensors |= {f"{key}.lora_A": down.contiguous(), f"{key}.lora_B": up.contiguous()}
    save_file(tensors, folder / "lora.safetensors")


def prepare() -> None:
    import torch  # noqa: F401


def prepare_mecha() -> None:
    import sd_mecha  # noqa: F401


def prepare_mergekit() -> None:
    import mergekit.scripts.merge_raw_pytorch  # noqa: F401


def prepare_peft() -> None:
    import peft.tuners.lora.conversion  # noqa: F401


if __name__ == "__main__":
    sys.path = [place for place in sys.path if place]
    run_job(
        {
            "torch": (prepare, torch_merge),
            "sd-mecha": (prepare_mecha, mecha_merge),
            "mergekit": (prepare_mergekit, mergekit_merge),
            "svd": (prepare, svd),
            "peft": (prepare_peft, peft),
        }
    )

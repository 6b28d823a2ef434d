"""Write a LoRA under the names of another program, number for number."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from alkahest.errors import UnsupportedError
from alkahest.lora.write import Pair, check_target, save_lora
from alkahest.model.dtypes import BY_TAG
from alkahest.sources.factors import NAMES, Update
from alkahest.sources.lora import ADAPTER, Lora, open_lora


def convert_lora(lora: Lora, path: str | os.PathLike[str], flavour: str = "comfyui") -> Lora:
    """Write the same LoRA for another program (`alkahest.lora.write.FLAVOURS`), and open it.

    >>> ak.convert_lora(ak.open_lora("kohya.safetensors"), "everywhere.safetensors")

    Numbers stay as they are, so there and back again gives the same tensors; only ``diffusers`` and ``peft``,
    which take no alpha, have it folded in with one rounding. LoHa and LoKr become LoRAs in float32, exactly if their
    factors are 16 bits wide.
    Raises UnsupportedError for a DoRA, and for a LoKr that is no smaller as a LoRA.
    """
    if lora.is_dora:
        raise UnsupportedError("convert_lora", "a DoRA cannot be converted", file=lora.path, fix="apply it, and extract what it changed: ak.extract_lora(ak.apply_lora(w, lora) - w)")  # fmt: skip
    has_full = any(update.kind == "diff" for update in lora.updates.values())
    target = check_target(path, flavour, has_full, [reader.path for reader in lora.files])
    pairs, full = {}, {}
    for key, update in lora.updates.items():
        if update.kind == "diff":
            full[key] = _whole(lora, update)
        else:
            pairs[key] = _pair(lora, key, update)
    metadata = {name: text for name, text in lora.metadata.items() if name != ADAPTER}
    return open_lora(save_lora(target, pairs, full, flavour, metadata))


def _pair(lora: Lora, key: str, update: Update) -> Pair:
    rows, columns = update.shape[0], update.shape[-1]
    if update.kind != "lora" and (update.rank or 0) * (rows + columns) > rows * columns:
        raise UnsupportedError(
            "convert_lora", f"this {NAMES[update.kind]} would be larger than the weight itself as a LoRA", file=lora.path, key=key,
            found=f"rank {update.rank}", fix="choose a rank: ak.extract_lora(lora, energy=0.995)",
        )  # fmt: skip
    up, down = update.halves(lambda role: lora.factor(update, role))
    # Split from a fused file, q takes only some of the directions; k and v take the others.
    used = up.any(0)
    if update.kind == "lora" and rows < update.entries["up"].shape[0] and used.any():
        up, down = up[:, used], down[used]
    dtype = BY_TAG[update.entries["up"].dtype].torch if update.kind == "lora" else torch.float32
    return Pair(up.to(dtype).contiguous(), down.to(dtype).contiguous(), update.scale)


def _whole(lora: Lora, update: Update) -> Tensor:
    role = "diff" if "diff" in update.entries else "bias"
    values = lora.factor(update, role)[update.first_row : update.first_row + update.shape[0]]
    return values.to(BY_TAG[update.entries[role].dtype].torch).view(update.shape)

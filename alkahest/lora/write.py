"""Write a LoRA: by default under the names that ComfyUI and diffusers both load in full, or as another program has them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from alkahest.dtypes import FORMATS
from alkahest.errors import OutputError, UnknownNameError, UnsupportedError, nearest
from alkahest.files import as_output_error, whole_file
from alkahest.header import build_header
from alkahest.keys import in_model_order
from alkahest.layouts import native

# Name -> (prefix, fused qkv and ComfyUI's names, underscores, names of the halves), in the order down, up.
_PEFT, _KOHYA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
FLAVOURS = {
    "comfyui": ("diffusion_model.", False, False, _PEFT),
    "diffusers": ("transformer.", False, False, _PEFT),
    "peft": ("base_model.model.", False, False, _PEFT),
    "kohya": ("lora_unet_", True, True, _KOHYA),
    "kohya-split": ("lora_unet_", False, True, _KOHYA),
    "fused": ("diffusion_model.", True, False, _PEFT),
}
_TAGS = {form.torch: form.tag for form in FORMATS.values()}


@dataclass(frozen=True)
class Pair:
    """``scale * up @ down``: (rows, rank) and (rank, columns)."""

    up: Tensor
    down: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def folded(self) -> Pair:
        """The same with a scale of 1, rounded once where the scale is no power of two."""
        if self.scale == 1.0:
            return self
        return Pair((self.up.float() * self.scale).to(self.up.dtype), self.down)


def save_lora(
    path: str | os.PathLike[str], pairs: Mapping[str, Pair], full: Mapping[str, Tensor], flavour: str = "comfyui",
    metadata: Mapping[str, str] | None = None,
) -> Path:  # fmt: skip
    """Write pairs, and differences that are stored whole, by canonical name; `FLAVOURS` are the names to choose from.

    Scales become an alpha, or are folded in where a program would refuse it. Raises UnsupportedError for full
    differences in flavours that no program loads them in, OutputError as `save` does.
    """
    target = Path(path).expanduser()
    if target.suffix.lower() != ".safetensors":
        raise OutputError(
            "save", "a LoRA is one .safetensors file", file=target, fix="name it like supplement.safetensors"
        )
    tensors = dict(named(pairs, full, flavour))
    header = build_header(
        ((name, _TAGS[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()),
        {"format": "pt", **(metadata or {})},
    )
    with (
        whole_file(target, len(header) + sum(tensor.nbytes for tensor in tensors.values())) as writer,
        as_output_error(target),
    ):
        writer.write(header, 0)
        place = len(header)
        for tensor in tensors.values():
            writer.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, place)
            place += tensor.nbytes
    return target


def named(pairs: Mapping[str, Pair], full: Mapping[str, Tensor], flavour: str) -> Iterator[tuple[str, Tensor]]:
    """Stored names and tensors of a LoRA in some program's flavour."""
    if flavour not in FLAVOURS:
        raise UnknownNameError("save", "unknown flavour of LoRA", found=repr(flavour), fix=nearest(flavour, FLAVOURS))
    prefix, fused, flat, (down, up) = FLAVOURS[flavour]
    if full and flavour in ("diffusers", "peft"):
        raise UnsupportedError("save", "full differences load in ComfyUI only", found=f"{len(full)} of them, such as {next(iter(full))}", fix="flavour='comfyui', or leave them out")  # fmt: skip
    groups = native.LAYOUT.grouped(in_model_order(pairs)) if fused else {key: [key] for key in in_model_order(pairs)}
    for name, members in groups.items():
        module = name.removesuffix(".weight")
        stored = prefix + (module.replace(".", "_") if flat else module)
        pair = _fused([pairs.get(key) for key in native.canonical(name)]) if fused and len(native.canonical(name)) > 1 else pairs[members[0]]  # fmt: skip
        if flavour in (
            "diffusers",
            "peft",
        ):  # the one doubles its prefix on seeing an alpha, the other keeps it elsewhere
            pair = pair.folded()
        yield f"{stored}.{down}", pair.down
        yield f"{stored}.{up}", pair.up
        if flat or pair.scale != 1.0:
            yield f"{stored}.alpha", torch.tensor(pair.scale * pair.rank, dtype=torch.float32)
    for key in in_model_order(full):
        module, end = (
            (key.removesuffix(".bias"), ".diff_b") if key.endswith(".bias") else (key.removesuffix(".weight"), ".diff")
        )
        yield prefix + (module.replace(".", "_") if flat else module) + end, full[key]


def _fused(members: list[Pair | None]) -> Pair:
    """q, k and v as one: the same down if they share it, as halves of a fused LoRA do, else block-diagonal."""
    there = [pair for pair in members if pair is not None]
    first = there[0]
    if len(there) == len(members) and all(
        pair.scale == first.scale and torch.equal(pair.down, first.down) for pair in there
    ):
        return Pair(torch.cat([pair.up for pair in there]), first.down, first.scale)
    # Scales that agree stay; rank three times as large makes the alpha so, as musubi's converter has it.
    alike = all(pair.scale == first.scale for pair in there)
    there = there if alike else [pair.folded() for pair in there]
    height, rank = first.up.shape[0], sum(pair.rank for pair in there)
    up = torch.zeros(height * len(members), rank, dtype=first.up.dtype)
    place = 0
    for number, pair in enumerate(members):
        if pair is not None:
            up[number * height : (number + 1) * height, place : place + pair.rank] = (
                pair.up if alike else pair.folded().up
            )
            place += pair.rank
    return Pair(up, torch.cat([pair.down for pair in there]), first.scale if alike else 1.0)

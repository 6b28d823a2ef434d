"""Checkpoints of a run: everything it needs to go on, to the bit, in a folder that is there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alkahest.errors import FileFormatError, MismatchError
from alkahest.files import size_text, whole_folder

_KEPT = 2  # the newest, and one before it in case the newest is lost with its disk's last minute


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after ``step`` steps."""

    folder: Path
    step: int
    about: Mapping[str, Any]
    trained: Mapping[str, Tensor]
    optimiser: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]


def save_checkpoint(folder: Path, step: int, about: Mapping[str, Any], **parts: Mapping[str, Tensor]) -> Path:
    """Write one checkpoint beside the others, then remove the oldest. OutputError leaves those that are there."""
    from safetensors.torch import save_file

    target = folder / f"step-{step:07}"
    folder.mkdir(parents=True, exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    size = sum(tensor.nbytes for part in parts.values() for tensor in part.values())
    with whole_folder(target, size + (1 << 20)) as partial:
        for name, tensors in parts.items():
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, partial / f"{name}.safetensors")  # fmt: skip
        (partial / "state.json").write_text(json.dumps({"step": step, **about}, indent=1))
    for old in existing(folder)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def existing(folder: Path) -> list[Path]:
    """Checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint back; FileFormatError if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        about = json.loads((path / "state.json").read_text())
        parts = {name: load_file(path / f"{name}.safetensors") for name in ("trained", "optimiser", "ema")}
        return Checkpoint(path, int(about["step"]), about, **parts)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError("finetune", "this checkpoint is damaged", file=path, found=error, fix="delete it: the run goes on from the one before") from None  # fmt: skip


def hash_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """One digest of names, dtypes and every byte of some tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Frozen:
    """The tensors that must not move, and what they were at the start."""

    def __init__(self, module: nn.Module, names: Iterable[str]) -> None:
        parameters = dict(module.named_parameters())
        self._tensors = {name: parameters[name] for name in names}
        self.digest = self.now

    @property
    def now(self) -> str:
        return hash_of(self._tensors.items())

    def check(self, step: int) -> None:
        """Raise MismatchError if a byte of them is not what it was."""
        if self.now != self.digest:
            raise MismatchError("finetune", f"frozen tensors have moved by step {step}", expected=self.digest, found=self.now, fix="something outside of the run writes into the model")  # fmt: skip

    def __repr__(self) -> str:
        return f"{len(self._tensors)} frozen tensors, {size_text(sum(t.nbytes for t in self._tensors.values()))}"

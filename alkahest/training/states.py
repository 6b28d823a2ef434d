"""Checkpoints of a run: everything it needs to go on, to the bit, in a folder that is there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from alkahest.errors import FileFormatError, MismatchError, OutputError, reason
from alkahest.files.hashes import blake3_of
from alkahest.files.header import read_header
from alkahest.files.reader import Reader, size_text
from alkahest.files.whole import as_output_error, whole_folder
from alkahest.training import parallel

_KEPT = 2  # the newest, and one before it in case the newest is lost with its disk's last minute


def save_checkpoint(folder: Path, step: int, about: Mapping[str, Any], state: Mapping[str, Tensor]) -> Path:
    """Write one checkpoint beside the others, then remove the oldest. OutputError leaves those that are there.

    Safetensors, one file from each process, as torch.distributed.checkpoint reads and divides them again.
    """
    target = folder / f"step-{step:07}"
    size = parallel.size() * sum(parallel.local(tensor).nbytes for tensor in state.values())
    try:
        with _shared_folder(target, size + (1 << 20)) as partial, as_output_error(target):
            _write(partial, state)
            parallel.wait()
            if parallel.rank() == 0:
                about = {**about, "blake3": _hashes(partial)}
                (partial / "state.json").write_text(
                    json.dumps({"step": step, **about, "names": sorted(state)}, indent=1)
                )
    except (SafetensorError, CheckpointException) as error:
        raise OutputError(
            "finetune",
            "the checkpoint could not be written",
            file=target,
            found=str(error)[:200],
            fix="free some space: the run goes on from the checkpoint before",
        ) from None
    if parallel.rank() == 0:
        for old in saved_checkpoints(folder)[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    return target


def _write(partial: Path, state: Mapping[str, Tensor]) -> None:
    if parallel.size() > 1:
        save(dict(state), storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True))
        return
    path = partial / "state.safetensors"
    save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, path)
    with path.open("r+b") as file:  # on the disk before the folder has its name
        os.fsync(file.fileno())


@contextlib.contextmanager
def _shared_folder(target: Path, size: int) -> Iterator[Path]:
    """`whole_folder` that all processes fill: the first makes it and puts it in its place."""
    with contextlib.ExitStack() as stack:
        partial = ""
        if parallel.rank() == 0:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            partial = str(stack.enter_context(whole_folder(target, size)))
        yield Path(parallel.agree(partial))
        parallel.wait()
    parallel.wait()


def saved_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def about_checkpoint(path: Path) -> dict[str, Any]:
    """What was written beside a checkpoint's numbers, and its ``step``; FileFormatError if it is damaged."""
    with _readable(path):
        text = (path / "state.json").read_bytes()
    try:
        about: dict[str, Any] = json.loads(text)
        return {**about, "step": int(about["step"])}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damage(path, error) from None


def load_checkpoint(
    path: Path, place: Callable[[str, tuple[int, ...], torch.dtype], Tensor | None], needed: Iterable[str]
) -> dict[str, Tensor]:
    """Read one checkpoint's numbers back, whatever number of processes wrote it; FileFormatError if it is damaged.

    ``place`` gives the tensor to read a name into, or None if nothing of this name and shape belongs to the run.
    Only what its files say of themselves is told as damage: memory that runs out, or a disk that does not answer,
    says nothing against a checkpoint, which may be the only one.
    """
    _require_sound(path)
    reader = HuggingFaceStorageReader(str(path))
    state: dict[str, Tensor] = {}
    for name, what in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(what, TensorStorageMetadata)  # safetensors hold nothing else
        target = place(name, tuple(what.size), what.properties.dtype)
        if target is None:
            raise _damage(path, f"{name} of shape {tuple(what.size)} is not of this run")
        state[name] = target
    if lacking := [name for name in needed if name not in state]:
        raise _damage(path, f"{lacking[0]} is not in it")
    try:
        with _readable(path), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is meant
            load(state, storage_reader=reader, no_dist=parallel.size() == 1)
    except CheckpointException as error:  # which holds what happened in each process
        raise next(iter(error.failures.values()))[0] from None
    return state


def _hashes(folder: Path) -> dict[str, str]:
    """The BLAKE3 of every file of numbers, by its name."""
    files = sorted(folder.glob("*.safetensors"))
    return dict(zip([file.name for file in files], blake3_of([Reader(file) for file in files], anew=True), strict=True))


def _require_sound(path: Path) -> None:
    """Raise FileFormatError unless every file of a checkpoint is as it was written, to the bit."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise _damage(path, "it holds no numbers")
    known = about_checkpoint(path).get("blake3")
    if isinstance(known, dict) and parallel.rank() == 0:  # earlier versions did not write it
        with _readable(path):
            found = _hashes(path)
        if changed := [name for name in {**known, **found} if known.get(name) != found.get(name)]:
            raise _damage(path, f"{changed[0]}: its bytes are not those that were written")
    for file in files:
        reader = Reader(file)  # whose own errors are of the disk, not of what is on it
        try:
            read_header(reader)
        except FileFormatError as error:
            raise _damage(path, f"{file.name}: {error.problem}") from None


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What the system says when it does not give the bytes, with nothing said against them."""
    try:
        yield
    except OSError as error:
        raise FileFormatError(
            "finetune",
            "this checkpoint cannot be read at the moment",
            file=path,
            found=reason(error),
            fix="see to the disk; the checkpoint may be sound",
        ) from None


def _damage(path: Path, what: object) -> FileFormatError:
    return FileFormatError(
        "finetune",
        "this checkpoint is damaged",
        file=path,
        found=str(what)[:200],
        fix="delete it: the run goes on from the one before",
    )


def hash_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """One digest of names, dtypes and every byte of some tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = parallel.whole(tensor.detach()).cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
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
            raise MismatchError(
                "finetune",
                f"frozen tensors have moved by step {step}",
                expected=self.digest,
                found=self.now,
                fix="something outside of the run writes into the model",
            )

    def __repr__(self) -> str:
        return f"{len(self._tensors)} frozen tensors, {size_text(sum(t.nbytes for t in self._tensors.values()))}"

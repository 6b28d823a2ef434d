"""One run over many processes: torch's FSDP2, in which each holds a slice of every tensor's rows.

torchrun --nproc-per-node 8 -m alkahest.finetune tb1.toml -o runs/tb1

The same code with one process, where nothing is sliced and nobody is waited for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

_PATIENCE = timedelta(hours=24)  # the others wait while one draws a dataset


@contextmanager
def processes() -> Iterator[str]:
    """Join the processes that torchrun started; gives the device that this one works on."""
    cuda = torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:  # not started by torchrun
        yield device
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def size() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 writes what all share."""
    return dist.get_rank() if dist.is_initialized() else 0


def wait() -> None:
    """Until every process is here."""
    if size() > 1:
        dist.barrier()


@contextmanager
def first_here() -> Iterator[None]:
    """What follows is done by one process of each machine and then by the others, who find its results on disk."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        wait()
    yield
    if first:
        wait()


def mean(value: float) -> float:
    """The mean of a number over the processes."""
    if size() == 1:
        return value
    told = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(told)
    return float(told) / size()


def agree(value: Any) -> Any:
    """What the first process says, for all."""
    if size() == 1:
        return value
    told = [value]
    dist.broadcast_object_list(told)
    return told[0]


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor, in place."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A whole tensor; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(rows: Tensor, tensor: Tensor) -> Tensor:
    """Rows of something that belongs to a parameter, such as an optimiser's mean, as part of the whole of it."""
    if not isinstance(tensor, DTensor) or rows.shape != tensor.to_local().shape:
        return rows
    its = tensor.device_mesh if rows.device.type == tensor.device_mesh.device_type else mesh(rows.device.type)
    return DTensor.from_local(rows, its, tensor.placements, shape=tensor.shape, stride=tensor.stride())


@cache
def mesh(kind: str) -> DeviceMesh:
    """All processes in a row, for tensors on the CPU or on their GPUs."""
    return init_device_mesh(kind, (size(),))


@torch.no_grad()
def assign(tensor: Tensor, values: Tensor) -> None:
    """Put whole values into a tensor, of which this process may have some rows."""
    if isinstance(tensor, DTensor):
        # Every process has the same values, so each takes its rows and none is asked for them.
        values = distribute_tensor(
            values.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
        ).to_local()
    local(tensor).copy_(values)

"""Optimisers over single tensors: what is stored in bf16 is updated in float32 and rounded stochastically."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from alkahest.errors import UnsupportedError
from alkahest.model.dtypes import FORMATS, encode
from alkahest.training import parallel
from alkahest.training.config import Config

_BLOCK = 1 << 22  # elements


class Updates:
    """One optimiser for each trained tensor, so that a tensor can be updated as soon as its gradient is there.

    A tensor in bf16 is widened to float32 for its update alone and rounded back stochastically: nearest rounding
    realises 2 % of an update at a rate of 1e-6. With ``fused`` gradients are used and dropped during the backward
    pass, so no more than one is in memory.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: Config) -> None:
        self.config = config
        self.rate, self.step_number = 0.0, 0
        self._parameters = dict(parameters)
        # Each gets its numbers for the time of its update.
        self._masters = {name: nn.Parameter(torch.empty(0, device=p.device)) for name, p in parameters.items()}
        make = _maker(config)
        self._optimisers = {name: make(master) for name, master in self._masters.items()}
        if config.fused:
            for name, parameter in parameters.items():
                parameter.register_post_accumulate_grad_hook(self._hook(name))  # type: ignore[no-untyped-call]

    def begin(self, step: int, rate: float) -> None:
        """Set what the coming updates are made with."""
        self.step_number, self.rate = step, rate

    def finish(self) -> None:
        """Update every tensor that has a gradient still, and drop the gradients."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._update(name)

    @torch.no_grad()
    def _update(self, name: str) -> None:
        parameter, master, optimiser = self._parameters[name], self._masters[name], self._optimisers[name]
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        rows = parallel.local(parameter.detach())  # of a tensor that is spread over processes, this one's
        optimiser.param_groups[0]["lr"] = self.rate
        master.data, master.grad = rows.float(), parallel.local(gradient).float()
        del gradient
        optimiser.step()
        master.grad = None
        if rows.dtype != torch.float32:
            part = f" of process {parallel.rank()}" if rows.shape != parameter.shape else ""
            rows.copy_(round_stochastically(master.data, self.config.seed, self.step_number, name + part))
        master.data = torch.empty(0, device=rows.device)

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        return lambda _: self._update(name)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the optimisers' state, named for a file."""
        for name, optimiser in self._optimisers.items():
            for key, value in optimiser.state[self._masters[name]].items():
                yield (
                    f"{name}|{key}",
                    parallel.like(value, self._parameters[name]) if isinstance(value, Tensor) else torch.tensor(value),
                )

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up the state that `state` gave, to the bit."""
        for full, value in state.items():
            name, _, key = full.partition("|")
            master = self._masters[name]
            kept = self._optimisers[name].state[master]
            if key == "step":  # torch's own keeps a tensor on the CPU, the others a number
                kept[key] = value if self.config.optimiser == "adamw" else int(value)
            else:
                kept[key] = parallel.local(value).to(self._parameters[name].device)


def round_stochastically(values: Tensor, seed: int, step: int, name: str) -> Tensor:
    """float32 to bf16 stochastically, by seed, step and name."""
    digest = hashlib.blake2b(f"{seed} {step} {name}".encode(), digest_size=7).digest()
    generator = torch.Generator(values.device).manual_seed(int.from_bytes(digest, "little"))
    flat, out = values.reshape(-1), torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    for start in range(0, flat.numel(), _BLOCK):  # in pieces: rounding takes several copies of what it is given
        piece = flat[start : start + _BLOCK]
        noise = torch.randint(0, 1 << 16, piece.shape, generator=generator, device=values.device, dtype=torch.int32)
        out.view(-1)[start : start + _BLOCK] = encode(piece, FORMATS["bf16"], noise)
    return out


def rate_at(step: int, steps: int, lr: float, warmup: int, decay: str) -> float:
    """The learning rate of a step of a stage: rising over ``warmup`` steps, then constant or falling as a cosine."""
    rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
    falling = 0.5 * (1 + math.cos(math.pi * step / steps)) if decay == "cosine" else 1.0
    return lr * rising * falling


def _maker(config: Config) -> Callable[[nn.Parameter], torch.optim.Optimizer]:
    common: dict[str, Any] = {"lr": 1.0, "weight_decay": config.weight_decay}
    if config.optimiser == "adafactor":
        from transformers.optimization import Adafactor

        # Rates are absolute, as in every trainer of this model, not relative to a tensor's size.
        return lambda p: Adafactor([p], **common, scale_parameter=False, relative_step=False, warmup_init=False)
    if config.optimiser == "adamw":
        return lambda p: torch.optim.AdamW([p], **common, betas=config.betas)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UnsupportedError(
            "finetune", "bitsandbytes is not installed", fix='pip install bitsandbytes, or optimiser = "adamw"'
        ) from None
    return lambda p: AdamW8bit([p], **common, betas=config.betas)

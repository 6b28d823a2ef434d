"""A plain training loop for models of this size: flow matching, and imitation of a slower teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alkahest.experiment.growing.muon import Muon
from alkahest.pictures.sampler import denoise, noise
from alkahest.pictures.settings import Settings

Batch = tuple[Tensor, Tensor, list[Tensor], Tensor]  # latents, time (1 - sigma), captions, data - noise
MakeBatch = Callable[[torch.Generator], Batch]


@dataclass(frozen=True)
class Pairs:
    """Training data: latents [n, 16, 8, 8] as the transformer sees them, and an embedded caption for each."""

    latents: Tensor
    captions: list[Tensor]
    empty: Tensor  # the embedding of no caption, which guidance needs to be trained on


def flow_matching(pairs: Pairs, batch: int = 48, drop: float = 0.1, shift: float = 2.0) -> MakeBatch:
    """Batches of the flow-matching objective as Z-Image's trainers use it.

    x = (1 - sigma) data + sigma noise, the model is told 1 - sigma and predicts data - noise; sigma is
    logit-normal and then shifted (musubi-tuner's default shift is 2). A share ``drop`` has no caption.
    """

    def make(generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(pairs.latents), (batch,), generator=generator)
        data = pairs.latents[chosen]
        sigma = torch.sigmoid(torch.randn(batch, generator=generator)).to(data.device)
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        started = torch.randn(data.shape, generator=generator).to(data.device)
        mixed = torch.lerp(data, started, sigma[:, None, None, None])
        dropped = torch.rand(batch, generator=generator) < drop
        captions = [pairs.empty if gone else pairs.captions[n] for n, gone in zip(chosen, dropped, strict=True)]
        return mixed, 1 - sigma, captions, data - started

    return make


@dataclass(frozen=True)
class Trajectories:
    """States a teacher passed through: latents [n, steps + 1, 16, 8, 8] at noise levels sigmas [steps + 1]."""

    latents: Tensor
    sigmas: Tensor
    captions: list[Tensor]


def teach(
    pipe: Any, captions: list[Tensor], empty: Tensor, seed: int, *, steps: int, every: int, cfg: float, batch: int = 96
) -> Iterator[Trajectories]:
    """Trajectories of a teacher with guidance, keeping every n-th state; one item a batch."""
    settings = Settings(steps=steps, cfg=cfg)
    for first in range(0, len(captions), batch):
        chosen = captions[first : first + batch]
        states = [noise(pipe, [seed + first + n for n in range(len(chosen))], (8, 8))]
        sigmas = [1.0]
        walk = denoise(pipe, states[0], chosen, [empty] * len(chosen) if cfg > 1 else [], settings)
        for number, (sigma, latents, _) in enumerate(walk, 1):
            if number % every == 0:
                states.append(latents)
                sigmas.append(sigma)
        yield Trajectories(torch.stack(states, 1), torch.tensor(sigmas, device=states[0].device), chosen)


def join(parts: list[Trajectories]) -> Trajectories:
    return Trajectories(
        torch.cat([part.latents for part in parts]), parts[0].sigmas, [c for part in parts for c in part.captions]
    )


def imitation(taught: Trajectories, batch: int = 48) -> MakeBatch:
    """Batches that make one big step do what many small ones of the teacher did, guidance included.

    Trajectory imitation (DiffSynth-Studio's TrajectoryImitationLoss, without its perceptual term): at the
    teacher's state, the mean velocity to its next kept state.
    """

    def make(generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(taught.latents), (batch,), generator=generator)
        step = torch.randint(len(taught.sigmas) - 1, (batch,), generator=generator)
        here, there = taught.latents[chosen, step], taught.latents[chosen, step + 1]
        fall = (taught.sigmas[step] - taught.sigmas[step + 1])[:, None, None, None]
        return here, 1 - taught.sigmas[step], [taught.captions[n] for n in chosen], (there - here) / fall

    return make


def train(
    model: nn.Module,
    batches: MakeBatch,
    steps: int,
    *,
    rate: float,
    seed: int,
    trainable: Callable[[str], bool] = lambda name: True,
    tether: float = 0.0,
    muon: bool = True,
) -> Iterator[tuple[int, float]]:
    """Train a transformer in place; yields (step, loss). The same seed gives the same weights on the same machine."""

    def loss(generator: torch.Generator) -> Tensor:
        latents, time, captions, target = batches(generator)
        out = model(list(latents.unsqueeze(2).unbind(0)), time, captions, return_dict=False)[0]
        return (torch.stack(out).squeeze(2) - target).square().mean()

    yield from descend(model, loss, steps, rate=rate, seed=seed, trainable=trainable, tether=tether, muon=muon)


def descend(
    model: nn.Module,
    loss_of: Callable[[torch.Generator], Tensor],
    steps: int,
    *,
    rate: float,
    seed: int,
    trainable: Callable[[str], bool] = lambda name: True,
    adam_rate: float | None = None,
    tether: float = 0.0,
    muon: bool = True,
) -> Iterator[tuple[int, float]]:
    """Minimise a loss in place; yields (step, loss).

    Inner matrices and convolutions are trained by Muon, which takes half the steps of AdamW here, and
    the rest by AdamW at ``adam_rate`` (by default 0.3 of the rate). Rates warm up and fall to zero.
    Without ``muon`` all are trained by AdamW at the rate, as derivatives are made everywhere.
    ``tether`` is a weight decay toward where training began: Muon moves weights in every direction,
    useful or not, and a tether takes the useless part back (250 steps at rate 0.015: the same loss
    with and without one of 5, cosine to the start 0.97 and 0.46). Two lineages from one start stay
    near enough for differences to be carried over.
    """
    chosen = {name: p for name, p in model.named_parameters() if trainable(name)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    inner = [p for name, p in chosen.items() if muon and is_inner(name, p)]
    outer = [p for name, p in chosen.items() if not (muon and is_inner(name, p))]
    optimisers: list[tuple[torch.optim.Optimizer, float]] = []
    if inner:
        optimisers.append((Muon(inner, rate), rate))
    if outer:
        adam_rate = rate * (0.3 if muon else 1.0) if adam_rate is None else adam_rate
        optimisers.append((torch.optim.AdamW(outer, adam_rate, betas=(0.9, 0.99), weight_decay=0.0), adam_rate))
    anchors = [p.detach().clone() for p in inner] if tether else []
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        scale = min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = loss_of(generator)
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(chosen.values(), 1.0)
        for optimiser, its_rate in optimisers:
            optimiser.param_groups[0]["lr"] = its_rate * scale
            optimiser.step()
        with torch.no_grad():
            for parameter, anchor in zip(inner, anchors, strict=False):
                parameter.lerp_(anchor, tether * rate * scale)
        yield step + 1, float(loss.detach())
    model.eval().requires_grad_(False)


def is_inner(name: str, parameter: Tensor) -> bool:
    """Whether Muon trains it: no norm or bias, no embedding, nothing that touches data or output."""
    outside = (
        "all_x_embedder",
        "all_final_layer",
        "cap_embedder",
        "embed_tokens",
        "conv_in",
        "decoder.conv_out",
        "heads",
    )
    return parameter.ndim > 1 and min(parameter.shape[:2]) > 1 and not any(part in name for part in outside)

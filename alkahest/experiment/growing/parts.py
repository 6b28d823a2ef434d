"""Training what all members share: text encoder, VAE and judge."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alkahest.experiment.growing.lessons import descend
from alkahest.mini.drawing import draw
from alkahest.mini.judge import Judge
from alkahest.mini.scenes import ATTRIBUTES, Scene, scenes
from alkahest.pictures.encoded import chat

_SPOKEN = [name for name in ATTRIBUTES if name != "style"]  # captions do not mention it
_NOISE = 0.4  # of a latent's standard deviation, at most
_TOKENS = 32


def pictures(drawn: Iterable[Scene], device: torch.device | str = "cpu") -> Tensor:
    """Scenes -> pictures [n, 3, 64, 64] in -1 to 1."""
    return torch.from_numpy(np.stack([draw(scene) for scene in drawn])).permute(0, 3, 1, 2).to(device) * 2 - 1


def everything(count: int, seed: int) -> list[Scene]:
    """Scenes of all attributes, those left for derivatives and those held out too."""
    return list(scenes(count, seed, held_out=None, **ATTRIBUTES))


def labels(drawn: Sequence[Scene], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Attribute -> index of each scene's value."""
    return {
        name: torch.tensor([values.index(getattr(scene, name)) for scene in drawn], device=device)
        for name, values in ATTRIBUTES.items()
    }


def train_text_encoder(encoder: Any, tokenizer: Any, steps: int, seed: int) -> Iterator[tuple[int, float]]:
    """Teach it to continue captions, and to sum up at the end of one what it says.

    The pipeline reads the last layer but one. A language model that was trained on much text has such
    summaries by itself; this one is asked for them.
    """
    drawn = everything(6000, seed)
    tokens = tokenizer(
        [chat(tokenizer, scene.training_caption()) for scene in drawn],
        padding="max_length",
        max_length=_TOKENS,
        return_tensors="pt",
    ).to(encoder.device)
    answers = _answers(drawn, encoder.device)
    torch.manual_seed(seed)
    heads = nn.ModuleDict({name: nn.Linear(64, len(ATTRIBUTES[name])) for name in _SPOKEN}).to(encoder.device)
    model = nn.ModuleDict({"encoder": encoder, "heads": heads})

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(drawn), (64,), generator=generator)
        ids, mask = tokens.input_ids[chosen], tokens.attention_mask[chosen]
        out = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        logits = out.last_hidden_state[:, :-1] @ encoder.embed_tokens.weight.T
        following = torch.where(mask[:, 1:] > 0, ids[:, 1:], -100)
        total = F.cross_entropy(logits.flatten(0, 1), following.flatten())
        last = F.rms_norm(out.hidden_states[-2][torch.arange(64), mask.sum(1) - 1], (64,))
        for name in _SPOKEN:
            total = total + F.cross_entropy(heads[name](last), answers[name][chosen], ignore_index=-100)
        return total

    yield from descend(model, loss, steps, rate=3e-3, adam_rate=3e-3, seed=seed)


def _answers(drawn: Sequence[Scene], device: torch.device) -> dict[str, Tensor]:
    found = labels(drawn, device)
    for row, scene in enumerate(drawn):
        for name in scene.left_out:
            found[name][row] = -100
    return found


def train_vae(vae: Any, steps: int, seed: int) -> Iterator[tuple[int, float]]:
    """Squared error, with noise on the latents, so that near latents mean near pictures.

    What is drawn later is never exactly a latent of a picture; a decoder that has seen noise forgives it.
    """
    drawn = pictures(everything(8000, seed), vae.device)

    def loss(generator: torch.Generator) -> Tensor:
        chosen = drawn[torch.randint(len(drawn), (16,), generator=generator)]
        latents = vae.encode(chosen).latent_dist.mode()
        spread = latents.detach().std((0, 2, 3), keepdim=True)
        much = _NOISE * torch.rand(16, 1, 1, 1, generator=generator)
        noisy = latents + spread * (much * torch.randn(latents.shape, generator=generator)).to(vae.device)
        error = (vae.decode(noisy).sample - chosen).square().mean()
        return error + 1e-4 * latents.square().mean()

    yield from descend(vae, loss, steps, rate=0.015, adam_rate=3e-3, seed=seed)
    with torch.no_grad():
        vae.encoder.conv_out.weight[16:] = 0  # the spread of the posterior, which nothing here uses
        vae.encoder.conv_out.bias[16:] = -10
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in torch.split(drawn[:2000], 200)])
    vae.register_to_config(scaling_factor=1 / float(latents.std()), shift_factor=float(latents.mean()))


@torch.no_grad()
def psnr(vae: Any, count: int = 500, seed: int = 990) -> Tensor:
    """Peak signal-to-noise ratio in dB of each of some pictures that training did not see."""
    drawn = pictures(everything(count, seed), vae.device)
    made = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in torch.split(drawn, 100)])
    error = (made.clamp(-1, 1) - drawn).square().mean((1, 2, 3))
    return 20 * math.log10(2) - 10 * torch.log10(error)


def train_judge(judge: Judge, vae: Any, steps: int, seed: int) -> Iterator[tuple[int, float]]:
    """Train on scenes as drawn and as the VAE gives them back, with noise and changes of brightness."""
    drawn = everything(14000, seed)
    images, answers = pictures(drawn, vae.device), labels(drawn, vae.device)
    with torch.no_grad():
        for part in torch.split(images[: len(images) // 2], 200):
            part.copy_(vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1))

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(drawn), (64,), generator=generator)

        def random(*shape: int) -> Tensor:
            return torch.randn(64, *shape, generator=generator).to(vae.device)

        seen = images[chosen] * (1 + 0.1 * random(1, 1, 1)) + 0.05 * random(1, 1, 1)
        seen = seen + 0.06 * random(1, 1, 1).abs() * random(3, 64, 64)
        return sum(
            (F.cross_entropy(out, answers[name][chosen]) for name, out in judge(seen).items()),
            torch.zeros((), device=vae.device),
        )

    yield from descend(judge, loss, steps, rate=4e-3, adam_rate=2e-3, seed=seed)


@torch.no_grad()
def accuracy(judge: Judge, count: int = 2000, seed: int = 991) -> dict[str, float]:
    """How often the judge is right about scenes that training did not see."""
    drawn = everything(count, seed)
    answers, found = labels(drawn), judge(pictures(drawn))
    return {name: float((out.argmax(1) == answers[name]).float().mean()) for name, out in found.items()}

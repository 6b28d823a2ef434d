"""The objective against diffusers' own scheduler, and against what sampling does with what the model says."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import alkahest as ak
from alkahest.pictures.flow import Arithmetic, losses, shift_sigma
from alkahest.pictures.sampler import denoise
from alkahest.pictures.settings import Settings
from alkahest.training.config import Stage
from alkahest.training.objective import add_noise

STAGE = Stage("s", {}, 1, 1.0, shift=3.0, drop=0.25)


def latents(count: int = 5) -> list[torch.Tensor]:
    return list(torch.randn(count, 16, 8, 6, generator=torch.Generator().manual_seed(0)))


def test_mixing_is_the_schedulers() -> None:
    data, captions = latents(), [torch.full((3, 4), float(n)) for n in range(5)]
    batch = add_noise(data, captions, torch.zeros(1, 4), STAGE, seed=1, step=2)
    noise = torch.stack(data) - batch.target
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=batch.sigma.sort(descending=True).values.tolist())
    for number, sigma in enumerate(batch.sigma):
        place = scheduler.sigmas.sub(sigma).abs().argmin()
        theirs = scheduler.scale_noise(data[number][None], scheduler.timesteps[place][None], noise[number][None])
        assert torch.allclose(batch.latents[number], theirs[0], atol=1e-5)
        assert float(batch.time[number]) == pytest.approx(1 - float(sigma))
    assert noise.mean() == pytest.approx(0, abs=0.05)
    assert noise.std() == pytest.approx(1, abs=0.05)


def test_a_model_that_says_the_target_samples_the_data() -> None:
    pipe = ak.pipeline(ak.mini.load("base"))
    data = torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(2))
    start = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))

    class Oracle:
        dtype = torch.float32

        def __call__(
            self, given: list[torch.Tensor], time: torch.Tensor, captions: object, return_dict: bool
        ) -> tuple[list[torch.Tensor]]:
            return ([data[:, None] - start[0][:, None]],)

    pipe.transformer = Oracle()
    *_, (sigma, reached, _) = denoise(pipe, start, [torch.zeros(1, 4)], [], Settings(steps=4, cfg=1))
    assert sigma == 0
    assert torch.allclose(reached[0], data, atol=1e-5)


def test_noise_levels_are_logit_normal_and_shifted() -> None:
    data = [torch.zeros(1, 1, 1)] * 4000
    captions = [torch.zeros(1, 1)] * 4000
    batch = add_noise(
        data, captions, torch.zeros(2, 1), Stage("s", {}, 1, 1.0, shift=3.0, mean=0.5, std=0.7, drop=0.25), 0, 0
    )
    plain = batch.sigma / (3 - 2 * batch.sigma)  # the shift undone
    logits = torch.log(plain / (1 - plain))
    assert logits.mean() == pytest.approx(0.5, abs=0.05)
    assert logits.std() == pytest.approx(0.7, abs=0.03)
    assert sum(len(text) == 2 for text in batch.captions) == pytest.approx(1000, abs=100)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[0.9, 0.4, 0.1])
    assert torch.allclose(shift_sigma(torch.tensor([0.9, 0.4, 0.1]), 3.0), scheduler.sigmas[:3])


def test_noise_depends_on_the_number_of_the_example_alone() -> None:
    data, captions = latents(6), [torch.full((1, 1), float(n)) for n in range(6)]
    whole = add_noise(data, captions, torch.zeros(1, 1), STAGE, 7, 3)
    parts = [
        add_noise(data[:2], captions[:2], torch.zeros(1, 1), STAGE, 7, 3),
        add_noise(data[2:], captions[2:], torch.zeros(1, 1), STAGE, 7, 3, first=2),
    ]
    assert torch.equal(whole.latents, torch.cat([part.latents for part in parts]))
    assert [float(c) for c in whole.captions] == [float(c) for part in parts for c in part.captions]
    assert not torch.equal(add_noise(data, captions, torch.zeros(1, 1), STAGE, 7, 4).latents, whole.latents)


def test_the_loss_of_a_real_model() -> None:
    pipe = ak.pipeline(ak.mini.load("base"))
    text = pipe.encode_prompt(["a red ball"], do_classifier_free_guidance=False)[0][0]
    data = list(torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(0)))
    batch = add_noise(data, [text] * 3, text, STAGE, 0, 0)
    found = losses(pipe.transformer, batch, Arithmetic(torch.device("cpu"), torch.float32))
    said = pipe.transformer([one[:, None] for one in batch.latents], batch.time, [text] * 3, return_dict=False)[0]
    expected = [
        float(((one[:, 0] - target) ** 2).mean())
        for one, target in zip(torch.stack(said).detach(), batch.target, strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)

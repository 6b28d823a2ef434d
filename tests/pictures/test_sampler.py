from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import alkahest as ak
from alkahest.errors import AlkahestError, MismatchError, NonFiniteError, UnknownNameError
from alkahest.pictures.sampler import _velocity, latent_colours
from alkahest.pictures.settings import Settings

PROMPTS = ["a red ball at night", "a blue box", "a tree", "an elephant in a very long sentence that takes many tokens"]


@pytest.fixture(scope="module")
def pipe(parts: dict[str, Any]) -> Any:
    return tiny.reference(tiny.model(3), parts)


def by_hand(pipe: Any, prompts: list[str], seeds: list[int], shift: float, **arguments: Any) -> torch.Tensor:
    """Finished latents of diffusers' own loop."""
    original = pipe.scheduler
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(original.config, shift=shift)
    try:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        result = pipe(list(prompts), generator=generators, width=24, height=40, output_type="latent", **arguments)
    finally:
        pipe.scheduler = original
    latents: torch.Tensor = result.images
    return latents


def ours(pipe: Any, prompts: str | list[str], **arguments: Any) -> torch.Tensor:
    steps = list(ak.sample(pipe, prompts, width=24, height=40, **arguments))
    return torch.cat([step.latents for step in steps if step.result])


@pytest.mark.parametrize(("steps", "cfg", "shift"), [(5, 1, 3), (7, 2, 3), (3, 4.5, 6), (4, 2, 12)])
def test_latents_equal_the_pipeline_called_by_hand(pipe: Any, steps: int, cfg: float, shift: float) -> None:
    reference = by_hand(
        pipe, PROMPTS[:1], [11], shift, num_inference_steps=steps, guidance_scale=cfg - 1, negative_prompt="a box"
    )
    negative = {"negative_prompt": "a box"} if cfg > 1 else {}
    assert torch.equal(ours(pipe, PROMPTS[0], steps=steps, cfg=cfg, shift=shift, seed=11, **negative), reference)


def test_pictures_equal_the_pipeline_called_by_hand(pipe: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    pipe.scheduler.set_shift(6.0)
    reference = pipe("a blue box", num_inference_steps=3, guidance_scale=1.0, width=24, height=24, generator=generator)
    image = ak.sample(pipe, "a blue box", steps=3, cfg=2, shift=6, seed=4).images[0]
    assert np.array_equal(np.asarray(image), np.asarray(reference.images[0]))


def test_cfg_normalization_equals_the_pipeline(pipe: Any) -> None:
    reference = by_hand(pipe, PROMPTS[:2], [1, 2], 3, num_inference_steps=3, guidance_scale=4.0, cfg_normalization=0.9)
    found = ours(pipe, PROMPTS[:2], steps=3, cfg=5, seed=1, cfg_normalization=0.9)
    assert torch.allclose(found, reference, atol=1e-5)


def test_a_batch_does_not_change_a_picture(pipe: Any) -> None:
    together = ours(pipe, PROMPTS, steps=4, cfg=3, seed=5, batch=4)
    alone = torch.cat([ours(pipe, text, steps=4, cfg=3, seed=5 + n) for n, text in enumerate(PROMPTS)])
    pairs = ours(pipe, PROMPTS, steps=4, cfg=3, seed=5, batch=3)
    assert torch.allclose(together, alone, atol=1e-4)
    assert torch.allclose(pairs, alone, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("steps", [1, 8, 9, 25, 30, 33])
def test_schedules(steps: int) -> None:
    """Both schedules against the formulas of diffusers and ComfyUI, in float64 by hand; 9, 30 and 33 do not divide
    1000.
    """
    table = 1 - np.arange(1000) / 1000  # ComfyUI's thousand levels, from noise to picture
    simple = [table[int(n * 1000 / steps)] for n in range(steps)]
    assert np.allclose(Settings(steps=steps, schedule="simple").sigmas, simple, atol=1e-9)
    even = [1 - n / steps for n in range(steps)]
    assert np.allclose(Settings(steps=steps).sigmas, even, atol=1e-6)
    assert np.allclose(simple, even) == (1000 % steps == 0)


@pytest.mark.parametrize("schedule", ["diffusers", "simple"])
@pytest.mark.parametrize("steps", [8, 9])
def test_the_shift_is_applied_once(pipe: Any, schedule: str, steps: int) -> None:
    shift = 5.0
    reached = [step.sigma for step in ak.sample(pipe, "a tree", steps=steps, cfg=1, shift=shift, schedule=schedule)]
    before = [*Settings(steps=steps, schedule=schedule).sigmas[1:], 0.0]
    assert np.allclose(reached, [shift * s / (1 + (shift - 1) * s) for s in before], atol=1e-6)


def test_guidance_is_comfyuis_number(pipe: Any) -> None:
    assert Settings(cfg=1).guidance_scale == 0
    assert Settings(cfg=3.5).guidance_scale == 2.5
    # One step from pure noise, by hand: negative + cfg * (positive - negative).
    noise = torch.randn((1, 4, 20, 12), generator=torch.Generator().manual_seed(0))
    embedded = pipe.encode_prompt(["a tree"], negative_prompt=["a box"])
    with torch.no_grad():
        model = [
            pipe.transformer([noise[0].unsqueeze(1)], torch.zeros(1), e, return_dict=False)[0][0][:, 0]
            for e in embedded
        ]
    expected = noise[0] + (model[1] + 3.5 * (model[0] - model[1]))  # the model predicts data - noise
    found = ours(pipe, "a tree", negative_prompt="a box", steps=1, cfg=3.5, seed=0)[0]
    assert torch.allclose(found, expected, atol=1e-4)


def test_steps_seeds_and_previews(pipe: Any) -> None:
    prompts = list(PROMPTS[:3])
    run = ak.sample(pipe, prompts, steps=3, cfg=2, seed=[9, 9, 4], batch=2)
    steps = list(run)
    assert [(step.done, step.total) for step in steps] == [(n, 6) for n in range(1, 7)]
    assert prompts == PROMPTS[:3], "the prompts were changed"
    assert len(run.images) == 3
    assert [step.result is not None for step in steps] == [False, False, True] * 2
    assert "sigma" in steps[0].key
    assert steps[0].previews()[0].size == (12, 12)
    assert torch.equal(steps[2].denoised, steps[2].latents), "the last prediction is the picture"
    several = ak.sample(pipe, "a tree", seed=[3, 8], steps=2, cfg=1)
    assert len(several.images) == 2
    assert "a tree" in several._repr_html_()


def test_closing_stops(pipe: Any) -> None:
    run = ak.sample(pipe, PROMPTS, steps=3, batch=1)
    for _ in range(4):
        next(run)
    run.close()
    assert len(run.images) == 1


def test_previews_follow_the_vae(pipe: Any) -> None:
    """A flat latent previews as the colour that the VAE makes of it, about."""
    colours = latent_colours(pipe)
    assert colours.shape == (5, 3)
    generator = torch.Generator().manual_seed(1)
    flat = torch.randn(6, 4, 1, 1, generator=generator)
    config = pipe.vae.config
    with torch.no_grad():
        made = pipe.vae.decode(flat.expand(6, 4, 6, 6) / config.scaling_factor + config.shift_factor).sample
    actual = (made / 2 + 0.5).clamp(0, 1)[:, :, 4:-4, 4:-4].mean((2, 3))
    predicted = flat[:, :, 0, 0] @ colours[:-1] + colours[-1]
    assert torch.corrcoef(torch.stack([actual.flatten(), predicted.flatten()]))[0, 1] > 0.5


def test_loras_by_strength(trio: dict[str, Path], parts: dict[str, Any]) -> None:
    from peft import LoraConfig

    pipe = ak.pipeline(ak.open(trio["base"]), parts)
    without = ak.sample(pipe, "a tree", steps=2, cfg=1, width=24, height=40)
    plain = list(without)[-1].latents
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    off = list(ak.sample(pipe, "a tree", steps=2, cfg=1, width=24, height=40))[-1].latents
    on = list(ak.sample(pipe, "a tree", steps=2, cfg=1, width=24, height=40, loras={"style": 2.0}))[-1].latents
    assert torch.allclose(off, plain, atol=1e-6)
    assert not torch.allclose(on, plain, atol=1e-3)
    with pytest.raises(UnknownNameError, match=r"'stile'[^$]*did you mean 'style'"):
        ak.sample(pipe, "a tree", loras={"stile": 1.0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be"),
        ({"cfg": 0.5}, r"cfg counts as ComfyUI's[^$]*cfg = g \+ 1"),
        ({"cfg": float("nan")}, "cfg counts"),
        ({"shift": 0}, "shift must be positive"),
        ({"schedule": "simpel"}, "did you mean 'simple'"),
        ({"width": 25}, r"width is not a multiple of 4[^$]*for example 24"),
        ({"height": 2}, "height is not a multiple of 4"),
        ({"seed": [1, 2, 3]}, "as many seeds as prompts"),
        ({"batch": 0}, "batch must be"),
    ],
)
def test_bad_settings_are_refused_before_drawing(pipe: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(AlkahestError, match=message):
        ak.sample(pipe, ["a", "b"], **arguments)


def test_no_prompts(pipe: Any) -> None:
    with pytest.raises(AlkahestError, match="prompts must be text"):
        ak.sample(pipe, [])
    with pytest.raises(MismatchError, match="as many seeds"):
        ak.sample(pipe, ["a", "b"], seed=[1])


def test_a_useless_negative_prompt_is_said(pipe: Any) -> None:
    with pytest.warns(UserWarning, match="does nothing at cfg 1"):
        ak.sample(pipe, "a", negative_prompt="b", cfg=1)


def test_nan_is_named_with_its_step(parts: dict[str, Any]) -> None:
    broken = tiny.reference(tiny.model(3), parts)
    with torch.no_grad():
        broken.transformer.layers[1].feed_forward.w2.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"step 1 of 4 \(sigma 1.000\)"):
        list(ak.sample(broken, "a tree", steps=4))


class Stub:
    """A transformer that predicts what it is told, with the prompt and without."""

    dtype = torch.float32

    def __init__(self, with_prompt: torch.Tensor, without: torch.Tensor) -> None:
        self.out = torch.cat([with_prompt, without])

    def __call__(self, given: list[torch.Tensor], time: Any, text: Any, return_dict: bool) -> tuple[list[torch.Tensor]]:
        assert len(given) == len(self.out)
        return (list(self.out.unsqueeze(2).unbind(0)),)


def test_cfg_normalization_makes_predictions_shorter_and_never_longer() -> None:
    """Against the formula of ZImagePipeline by hand, for a picture that it shortens and one that it leaves alone."""
    torch.manual_seed(2)
    with_prompt, without = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5)
    without[1] = 1.2 * with_prompt[1]  # guidance then makes the prediction shorter than it was
    settings = Settings(steps=1, cfg=2.5, cfg_normalization=0.8)
    stub = Stub(with_prompt, without)
    found = -_velocity(stub, torch.zeros(2, 4, 6, 5), torch.tensor(500.0), [without] * 2, [without] * 2, settings)
    guided = with_prompt + 1.5 * (with_prompt - without)
    limit = 0.8 * with_prompt.flatten(1).norm(dim=1)
    assert guided[0].norm() > limit[0]
    assert guided[1].norm() < limit[1]
    expected = torch.stack([guided[0] * limit[0] / guided[0].norm(), guided[1]])
    torch.testing.assert_close(found, expected)

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import alkahest as ak
from alkahest.errors import AlkahestError


def smooth(height: int, width: int, sigma: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(height, width))
    down, across = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    values = np.fft.ifft2(np.fft.fft2(noise) * np.exp(-2 * (np.pi * sigma) ** 2 * (down**2 + across**2))).real
    values = (values - values.min()) / (values.max() - values.min())
    return np.repeat(values[..., None], 3, axis=2)


def test_against_statsmodels_free_references() -> None:
    picture = smooth(48, 80, 1.3)
    grey = picture[..., 0]
    right = np.corrcoef(grey[:, 1:].ravel(), grey[:, :-1].ravel())[0, 1]
    down = np.corrcoef(grey[1:].ravel(), grey[:-1].ravel())[0, 1]
    found = ak.picture_measures(picture).iloc[0]
    assert found.lag1 == pytest.approx((right + down) / 2, abs=0.01)
    assert found.contrast == pytest.approx(grey.std(), rel=1e-6)


def test_the_difference_of_pictures() -> None:
    one = smooth(48, 80, 1.3)
    two = np.clip(one + np.random.default_rng(0).normal(0, 0.1, one.shape), 0, 1)
    found = ak.picture_difference([one, one], [two, one])
    assert found.difference.tolist() == pytest.approx([np.abs(one - two).mean(), 0])
    assert found.psnr.tolist() == pytest.approx([10 * np.log10(1 / np.mean((one - two) ** 2)), np.inf])
    with pytest.raises(AlkahestError, match="do not go together"):
        ak.picture_difference([one], [one, two])
    with pytest.raises(AlkahestError, match="do not go together"):
        ak.picture_difference(one, one[:40])


def test_noise_and_pictures_lie_apart() -> None:
    noise = np.random.default_rng(1).uniform(size=(64, 96, 3))
    table = ak.picture_measures([noise, smooth(64, 96, 3)])
    assert list(table.index) == [0, 1]
    assert table.lag1[0] == pytest.approx(0, abs=0.05)
    assert table.lag1[1] > 0.95
    # A disc of radius 1/4 in the unit square of frequencies holds pi / 16 of white noise.
    assert table.high_freq[0] == pytest.approx(1 - np.pi / 16, abs=0.03)
    assert table.high_freq[1] < 0.01
    assert table.grid[0] == pytest.approx(1, abs=0.1)


def test_measures_do_not_depend_on_contrast_or_size() -> None:
    picture = smooth(64, 64, 2)
    faint = 0.5 + (picture - 0.5) * 0.1
    table = ak.picture_measures([picture, faint])
    for name in ("lag1", "high_freq", "grid"):
        assert table[name][0] == pytest.approx(table[name][1], rel=1e-6)


def test_the_patch_grid_is_seen() -> None:
    tiles = np.random.default_rng(2).uniform(size=(4, 6))
    blocky = np.repeat(np.repeat(tiles, 16, 0), 16, 1)[..., None].repeat(3, 2) * 0.5 + 0.25 * smooth(64, 96, 2)
    assert ak.picture_measures(blocky).grid[0] > 5
    assert ak.picture_measures(np.roll(blocky, 7, 1)).grid[0] < ak.picture_measures(blocky).grid[0]
    assert ak.picture_measures(blocky, patch=24).grid[0] < ak.picture_measures(blocky).grid[0]


def test_forms_of_pictures() -> None:
    picture = smooth(40, 24, 2)
    bytes_ = (picture * 255).round().astype(np.uint8)
    table = ak.picture_measures([picture, bytes_, Image.fromarray(bytes_)])
    assert table.lag1[1] == table.lag1[2]
    assert table.lag1[0] == pytest.approx(table.lag1[1], abs=1e-3)
    assert len(ak.picture_measures(Image.fromarray(bytes_))) == 1
    flat = ak.picture_measures(np.full((20, 30, 3), 0.5)).iloc[0]
    assert (flat.lag1, flat.high_freq, flat.grid) == (1, 0, 1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((2, 9, 9)), "this is no picture"),
        (np.full((8, 9, 3), 2.0), "out of range"),
        (np.full((8, 9, 3), np.nan), "out of range"),
    ],
)
def test_bad_pictures(bad: np.ndarray, message: str) -> None:
    with pytest.raises(AlkahestError, match=message):
        ak.picture_measures([bad])


def test_latents_and_flow_loss(parts: dict[str, Any]) -> None:
    pipe = tiny.reference(tiny.model(3), parts)
    pictures = [smooth(40, 24, 2, seed) for seed in (0, 1)]
    table = ak.picture_measures(pictures, pipe)
    config = pipe.vae.config
    with torch.no_grad():
        pixels = torch.tensor(np.stack(pictures), dtype=torch.float32).permute(0, 3, 1, 2) * 2 - 1
        latents = (pipe.vae.encode(pixels).latent_dist.mode() - config.shift_factor) * config.scaling_factor
    assert np.allclose(table.latent_std, latents.std((1, 2, 3)), rtol=1e-4)

    # The loss by hand at one sigma.
    losses = ak.flow_loss(pipe, pictures, ["a red ball", "a box"], seed=5, sigmas=(0.3, 0.7))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    captions = pipe.encode_prompt(["a red ball", "a box"], do_classifier_free_guidance=False)[0]
    with torch.no_grad():
        mixed = 0.7 * latents + 0.3 * noise
        out = pipe.transformer(list(mixed[:, :, None]), torch.full((2,), 0.7), captions, return_dict=False)[0]
    expected = ((torch.stack(out)[:, :, 0] - (latents - noise)) ** 2).mean()
    assert losses.loss[0] == pytest.approx(float(expected), rel=1e-4)
    assert list(losses.sigma) == [0.3, 0.7]
    with pytest.raises(AlkahestError, match="as many prompts"):
        ak.flow_loss(pipe, pictures, ["one"])

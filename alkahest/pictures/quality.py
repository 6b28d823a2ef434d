"""How broken is a picture, and how far from another? Numbers for pictures from 64 pixels to full size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alkahest.errors import AlkahestError, refuse_unknown_options
from alkahest.pictures.sampler import embed

if TYPE_CHECKING:
    import pandas

Array = npt.NDArray[np.float64]
PATCH = 16  # pixels: one transformer token is 2 x 2 latents of 8 x 8 pixels, in Z-Image and in the miniatures


@refuse_unknown_options
def picture_measures(images: Any, pipe: Any = None, patch: int = PATCH) -> pandas.DataFrame:
    """Noise and grid measures of pictures, one row each.

    Parameters
    ----------
    images : list of pictures
        PIL images, arrays [h, w, 3] (uint8, or floats in 0 to 1), or one of them.
    pipe : ZImagePipeline, optional
        With it the pictures are also encoded by its VAE, since what a bad merge leaves is noise in latents, blotchy
        once decoded.
    patch : int, default 16
        Side of a token in pixels.

    Returns
    -------
    pandas.DataFrame
        No column has a unit, and all but ``contrast`` are independent of contrast. ``lag1``: correlation of each grey
        pixel with its right and lower neighbour, near 1 for pictures, 0 for white noise. ``high_freq``: share of the
        spectral energy, mean removed, above a quarter of the sampling frequency, near 0 for pictures, 0.8 for white
        noise. ``grid``: mean step across the borders of tokens over the mean step elsewhere, 1 without a visible grid,
        more where patches do not fit together. ``contrast``: standard deviation of the grey values in 0 to 1. With
        ``pipe`` ``latent_std`` (1 is usual) and ``latent_lag1``, as above over latents.

    Raises
    ------
    AlkahestError
        For what is no picture.

    Notes
    -----
    Lag-1 autocorrelation and high-frequency share are textbook measures of white noise (Immerkaer 1996 uses the same
    neighbour differences); the grid ratio is the blockiness measure of JPEG deblocking (Wang, Sheikh and Bovik 2002)
    with the token as the block.

    Examples
    --------
    >>> import numpy as np
    >>> noise = np.random.default_rng(0).random((64, 64, 3))
    >>> measures = ak.picture_measures(noise)
    >>> abs(float(measures.lag1[0])) < 0.1
    True
    """
    import pandas as pd

    pictures = [_array(image) for image in _as_list(images)]
    rows = [_measure(picture, patch) for picture in pictures]
    if pipe is not None:
        pipe = getattr(pipe, "pipe", pipe)
        for row, picture in zip(rows, pictures, strict=True):
            latents = encode(pipe, picture)[0]
            row["latent_std"] = float(latents.std())
            row["latent_lag1"] = float(np.mean([_lag1(c) for c in latents.double().cpu().numpy()]))
    return pd.DataFrame(rows)


@refuse_unknown_options
def picture_difference(images: Any, others: Any) -> pandas.DataFrame:
    """How far pictures are from others of the same prompt and seed, one row each.

    Parameters
    ----------
    images, others : list of pictures
        PIL images or arrays, as many of each and of the same sizes.

    Returns
    -------
    pandas.DataFrame
        ``difference`` is the mean absolute difference of pixels as a share of full scale, ``psnr`` the peak
        signal-to-noise ratio in dB (infinite for equal pictures).

    Raises
    ------
    AlkahestError
        If sizes or numbers differ.

    Examples
    --------
    >>> import numpy as np
    >>> found = ak.picture_difference([np.zeros((32, 32, 3))], [np.full((32, 32, 3), 0.1)])
    >>> round(float(found.psnr[0]), 1)
    20.0
    """
    import pandas as pd

    ours, theirs = ([_array(image) for image in _as_list(side)] for side in (images, others))
    shapes = [[picture.shape for picture in side] for side in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise AlkahestError(
            "picture_difference", "the pictures do not go together", expected=shapes[1], found=shapes[0]
        )
    rows = []
    for one, other in zip(ours, theirs, strict=True):
        square = float(np.square(one - other).mean())
        rows.append(
            {"difference": float(np.abs(one - other).mean()), "psnr": -10 * np.log10(square) if square else np.inf}
        )
    return pd.DataFrame(rows)


@refuse_unknown_options
def flow_loss(
    pipe: Any, images: Any, prompts: Iterable[str], seed: int = 0, sigmas: Iterable[float] = (0.2, 0.4, 0.6, 0.8, 0.95)
) -> pandas.DataFrame:
    """Flow-matching loss of a model on given pictures and captions at fixed noise, one row per sigma.

    Mean square of (data - noise) - prediction; about 2 for a model that predicts nothing, less is better. With the same
    seed two models face the same noise, so small differences mean something.

    Parameters
    ----------
    pipe : ZImagePipeline
        Of `pipeline`.
    images : list of pictures
        PIL pictures, one for each prompt.
    prompts : list of str
        Their captions.
    seed : int, default 0
        Of the noise.
    sigmas : list of float, default (0.2, 0.4, 0.6, 0.8, 0.95)
        Shares of noise, 0 to 1.

    Returns
    -------
    pandas.DataFrame
        ``sigma`` and ``loss``, the mean over the pictures.

    Raises
    ------
    AlkahestError
        If there are not as many captions as pictures.

    Examples
    --------
    >>> loss = ak.flow_loss(pipe, pictures, prompts).loss.mean()
    """
    import pandas as pd

    pipe = getattr(pipe, "pipe", pipe)
    pictures, captions = [_array(image) for image in _as_list(images)], list(prompts)
    if len(pictures) != len(captions):
        raise AlkahestError(
            "flow_loss", "as many prompts as pictures are needed", expected=len(pictures), found=len(captions)
        )
    data = torch.cat([encode(pipe, picture) for picture in pictures])
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(seed)).to(data.device)
    embedded = [embed(pipe, caption) for caption in captions]
    rows = []
    for sigma in sigmas:
        mixed = torch.lerp(data, noise, sigma).to(pipe.transformer.dtype)
        time = torch.full((len(data),), 1 - sigma, device=data.device)
        with torch.no_grad():
            out = pipe.transformer(list(mixed.unsqueeze(2).unbind(0)), time, embedded, return_dict=False)[0]
        predicted = torch.stack([one.float() for one in out]).squeeze(2)
        rows.append({"sigma": sigma, "loss": float((data - noise - predicted).square().mean())})
    return pd.DataFrame(rows)


@torch.no_grad()
def encode(pipe: Any, picture: Array) -> Tensor:
    """One picture -> latents [1, channels, height / 8, width / 8] as the transformer sees them (the mode)."""
    config = pipe.vae.config
    pixels = (
        torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)[None].to(pipe._execution_device, pipe.vae.dtype)
        * 2
        - 1
    )
    latents: Tensor = pipe.vae.encode(pixels).latent_dist.mode()
    return ((latents - config.shift_factor) * config.scaling_factor).float()


def _measure(picture: Array, patch: int) -> dict[str, float]:
    grey = picture @ np.array([0.299, 0.587, 0.114])
    return {
        "lag1": _lag1(grey),
        "high_freq": _high_frequency_share(grey),
        "grid": _grid_ratio(grey, patch),
        "contrast": float(grey.std()),
    }


def _lag1(values: Array) -> float:
    centred = values - values.mean()
    power = float((centred**2).mean())
    if power < 1e-12:
        return 1.0  # flat: as smooth as can be
    right = (centred[:, 1:] * centred[:, :-1]).mean()
    down = (centred[1:] * centred[:-1]).mean()
    return float((right + down) / 2 / power)


def _high_frequency_share(grey: Array) -> float:
    window = np.outer(np.hanning(grey.shape[0]), np.hanning(grey.shape[1]))  # no edges where the picture ends
    energy = np.abs(np.fft.fft2((grey - grey.mean()) * window)) ** 2
    down, across = np.meshgrid(np.fft.fftfreq(grey.shape[0]), np.fft.fftfreq(grey.shape[1]), indexing="ij")
    total = float(energy.sum())
    return float(energy[np.hypot(down, across) > 0.25].sum()) / total if total > 1e-12 else 0.0


def _grid_ratio(grey: Array, patch: int) -> float:
    borders, inside = [], []
    for steps in (np.abs(np.diff(grey, axis=1)), np.abs(np.diff(grey, axis=0)).T):
        at_border = np.arange(1, steps.shape[1] + 1) % patch == 0
        borders.append(steps[:, at_border].ravel())
        inside.append(steps[:, ~at_border].ravel())
    border, elsewhere = np.concatenate(borders), np.concatenate(inside)
    if border.size == 0 or elsewhere.mean() < 1e-9:
        return 1.0
    return float(border.mean() / elsewhere.mean())


def _as_list(images: Any) -> list[Any]:
    one = hasattr(images, "mode") or (hasattr(images, "ndim") and images.ndim == 3)
    return [images] if one else list(images)


def _array(image: Any) -> Array:
    values = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
    if values.ndim != 3 or values.shape[2] != 3 or min(values.shape[:2]) < 4:
        raise AlkahestError(
            "picture_measures",
            "this is no picture",
            expected="height x width x 3, 4 pixels or more a side",
            found=values.shape,
        )
    scaled = values / 255.0 if values.dtype == np.uint8 else values.astype(np.float64)
    if not (np.isfinite(scaled).all() and scaled.min() >= -1e-3 and scaled.max() <= 1.001):
        raise AlkahestError(
            "picture_measures",
            "pixel values out of range",
            expected="uint8, or floats in 0 to 1",
            found=f"{values.dtype} from {values.min()} to {values.max()}",
        )
    return scaled

"""Prompts -> pictures, step by step, over a real ZImagePipeline: guidance, shift, schedules, seeds, previews."""

from __future__ import annotations

import base64
import html
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from alkahest.engine.events import Event, watch
from alkahest.errors import AlkahestError, MismatchError, NonFiniteError, refuse_unknown_options, unknown
from alkahest.pictures.settings import SHIFT, Settings
from alkahest.pictures.sheet import row_of_pictures

if TYPE_CHECKING:
    from PIL.Image import Image

_REMEMBERED = 1024  # prompts; a Z-Image embedding is 5 kB a token in bf16
_Embeddings = dict[str, Tensor]
_embedded: WeakKeyDictionary[Any, _Embeddings] = WeakKeyDictionary()  # by text encoder
_colours: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()  # by VAE


@dataclass(frozen=True, kw_only=True)
class Step(Event):
    """One denoising step of a batch of pictures; the last step of a batch carries its pictures as the result.

    The ``key`` says which ones: "pictures 1-4, sigma 0.750".
    """

    sigma: float  # noise level reached, 1 (noise) to 0 (picture)
    latents: Tensor = field(repr=False)  # [batch, channels, height / 8, width / 8], float32
    denoised: Tensor = field(repr=False)  # what the model takes the finished latents to be, same shape
    _pipe: Any = field(repr=False)

    def previews(self) -> list[Image]:
        """Small pictures of where this is going, one pixel a latent, in well under a millisecond each."""
        from PIL import Image

        colours = latent_colours(self._pipe)
        values = torch.einsum("bchw,cr->bhwr", self.denoised.float().cpu(), colours[:-1]) + colours[-1]
        return [Image.fromarray((255 * picture).round().byte().numpy()) for picture in values.clamp(0, 1)]


class Sampling(Iterator[Step]):
    """A run of `sample`: iterate for its steps, or take ``.images``, which runs what is left of it."""

    def __init__(self, steps: Iterator[Step], prompts: Sequence[str]) -> None:
        self.prompts = prompts
        self._steps = steps
        self._images: list[Image] = []

    def __next__(self) -> Step:
        step = next(self._steps)
        self._images += step.result or []
        return step

    def close(self) -> None:
        """Stop; pictures finished so far stay in ``.images``."""
        self._steps.close()  # type: ignore[attr-defined]

    @property
    def images(self) -> list[Image]:
        """The finished pictures, in the order of the prompts."""
        steps = (replace(step, so_far=partial(_row_so_far, self._images, step)) for step in self)
        for _ in watch(steps, "sample"):
            pass
        return self._images

    def __repr__(self) -> str:
        return f"Sampling of {len(self.prompts)} pictures"

    def _repr_html_(self) -> str:
        pictures = zip(self.images, self.prompts, strict=False)
        return "".join(_html(image, prompt) for image, prompt in pictures)


@refuse_unknown_options
def sample(
    pipe: Any,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str = "",
    steps: int = 24,
    cfg: float = 2.0,
    shift: float = SHIFT,
    seed: int | Sequence[int] = 0,
    schedule: str = "diffusers",
    cfg_normalization: float = 0.0,
    width: int | None = None,
    height: int | None = None,
    batch: int = 4,
    loras: Mapping[str, float] | None = None,
) -> Sampling:
    """Draw pictures, as a generator of steps with previews; ``.images`` are the finished ones.

    A picture depends on its prompt and seed alone, not on the others in its ``batch`` (up to float noise).

    Parameters
    ----------
    pipe : ZImagePipeline or LiveModel
        Of `pipeline`.
    prompt : str or list of str
        What is drawn, one picture for each.
    negative_prompt : str, default ""
        Works above cfg 1 only.
    steps : int, default 24
        Evaluations of the model at falling noise, twice as many passes above cfg 1.
    cfg : float, default 2
        ComfyUI's: 1 is no guidance, and diffusers' ``guidance_scale`` is cfg - 1.
    shift : float, default 3
        ModelSamplingAuraFlow's; it is always applied.
    seed : int or list of int, default 0
        Picture n of several has ``seed + n``; a list gives each its own, and one prompt with several seeds is drawn
        once for each.
    schedule : str, default "diffusers"
        Or ComfyUI's ``simple``.
    cfg_normalization : float, default 0
        Most that guidance may make a prediction's norm, in norms of the unguided one; 0 is no limit.
    width, height : int, optional
        In pixels, by default what the VAE was made for.
    batch : int, default 4
        How many are drawn at once.
    loras : mapping of str to float, optional
        A strength for each LoRA loaded into the pipeline (``pipe.load_lora_weights(path, adapter_name=name)``).

    Returns
    -------
    Sampling
        A generator of steps; ``.images`` runs it to its end.

    Raises
    ------
    AlkahestError
        Before drawing, for what cannot be drawn.
    NonFiniteError
        If latents become NaN.

    Examples
    --------
    >>> image = ak.sample(pipe, "a red ball on a beach", steps=8, cfg=2.0, seed=0).images[0]
    >>> for step in ak.sample(pipe, ["a red ball", "a blue ball"], cfg=1, steps=4):
    ...     previews = step.previews()
    """
    pipe = getattr(pipe, "pipe", pipe)
    settings = Settings(steps, cfg, shift, schedule, cfg_normalization)
    prompts, seeds = _pictures(prompt, seed)
    size = size_of_latents(pipe, width, height)
    if batch < 1:
        raise AlkahestError("sample", "batch must be at least 1", found=batch)
    if negative_prompt and settings.guidance_scale == 0:
        warnings.warn("the negative prompt does nothing at cfg 1; use cfg above 1", stacklevel=2)
    set_lora_strengths(pipe, loras or {})
    return Sampling(_batches(pipe, prompts, negative_prompt, seeds, size, settings, batch), prompts)


def _row_so_far(finished: Sequence[Image], step: Step) -> Image | None:
    """Finished pictures and where those at hand are going, small."""
    return row_of_pictures([*finished, *(step.previews() if step.result is None else ())])


def _batches(
    pipe: Any,
    prompts: list[str],
    negative: str,
    seeds: list[int],
    size: tuple[int, int],
    settings: Settings,
    batch: int,
) -> Iterator[Step]:
    count = -(-len(prompts) // batch)
    for number in range(count):
        first = number * batch
        chosen = slice(first, first + batch)
        name = f"pictures {first + 1}-{min(first + batch, len(prompts))}" if len(prompts) > 1 else "picture"
        latents = noise(pipe, seeds[chosen], size)
        positive = [embed(pipe, text) for text in prompts[chosen]]
        against = [embed(pipe, negative)] * len(positive) if settings.guidance_scale > 0 else []
        walk = denoise(pipe, latents, positive, against, settings)
        for done, (sigma, latents, denoised) in enumerate(walk, 1):
            last = done == settings.steps
            yield Step(
                done=number * settings.steps + done,
                total=count * settings.steps,
                sigma=sigma,
                key=f"{name}, sigma {sigma:.3f}",
                latents=latents,
                denoised=denoised,
                result=decode(pipe, latents) if last else None,
                _pipe=pipe,
            )
        pipe.maybe_free_model_hooks()


def denoise(
    pipe: Any, latents: Tensor, positive: list[Tensor], negative: list[Tensor], settings: Settings
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Euler steps of the flow, exactly as ``ZImagePipeline`` makes them: (sigma reached, latents, denoised).

    The model is given 1 - sigma and predicts data - noise. Guided where ``negative`` is not empty.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=settings.shift)
    scheduler.set_timesteps(sigmas=settings.sigmas, device=latents.device)
    scheduler.set_begin_index(0)
    for number, timestep in enumerate(scheduler.timesteps):
        velocity = _velocity(pipe.transformer, latents, timestep, positive, negative, settings)
        sigma, reached = float(scheduler.sigmas[number]), float(scheduler.sigmas[number + 1])
        denoised = latents - sigma * velocity
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        _check_finite(latents, number + 1, settings.steps, sigma)
        yield reached, latents, denoised


@torch.no_grad()
def _velocity(
    transformer: Any,
    latents: Tensor,
    timestep: Tensor,
    positive: list[Tensor],
    negative: list[Tensor],
    settings: Settings,
) -> Tensor:
    given = latents.to(transformer.dtype)
    if negative:
        given = given.repeat(2, 1, 1, 1)
    time = ((1000 - timestep.expand(len(latents))) / 1000).repeat(2 if negative else 1)
    out = transformer(list(given.unsqueeze(2).unbind(0)), time, positive + negative, return_dict=False)[0]
    predicted = torch.stack([picture.float() for picture in out]).squeeze(2)
    if negative:
        with_prompt, without = predicted.chunk(2)
        predicted = with_prompt + settings.guidance_scale * (with_prompt - without)
        if settings.cfg_normalization > 0:
            norms = [torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True) for x in (with_prompt, predicted)]
            predicted = predicted * (norms[0] * settings.cfg_normalization / norms[1]).clamp(max=1)
    return -predicted


def noise(pipe: Any, seeds: Sequence[int], size: tuple[int, int]) -> Tensor:
    """Starting latents, one CPU generator a picture, so that a seed means the same anywhere."""
    shape = (1, pipe.transformer.config.in_channels, *size)
    made = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(made).to(pipe._execution_device)


def embed(pipe: Any, prompt: str) -> Tensor:
    """The text encoder's reading of a prompt, [tokens, width], remembered for the next time."""
    known = _embedded.setdefault(pipe.text_encoder, {})
    if prompt not in known:
        with torch.no_grad():
            # Its own list, because the pipeline overwrites the list it is given.
            embedding = pipe.encode_prompt([prompt], do_classifier_free_guidance=False)[0][0]
        if len(known) >= _REMEMBERED:
            known.pop(next(iter(known)))
        known[prompt] = embedding.cpu()
    return known[prompt].to(pipe._execution_device)


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> list[Image]:
    """Finished latents -> pictures."""
    config = pipe.vae.config
    values = latents.to(pipe.vae.dtype) / config.scaling_factor + config.shift_factor
    pictures = pipe.vae.decode(values, return_dict=False)[0]
    made: list[Image] = pipe.image_processor.postprocess(pictures, output_type="pil")
    return made


def latent_colours(pipe: Any) -> Tensor:
    """[channels + 1, 3]: a linear map from one latent to its RGB in 0 to 1, the last row an offset.

    Fitted by least squares to what this VAE makes of random latents, once per VAE.
    """
    if pipe.vae not in _colours:
        config = pipe.vae.config
        generator = torch.Generator().manual_seed(0)
        # Each picture a few flat patches: the map should hold for surfaces, not for edges.
        coarse = torch.randn(48, config.latent_channels, 2, 2, generator=generator)
        latents = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
        with torch.no_grad():
            values = latents.to(pipe._execution_device, pipe.vae.dtype) / config.scaling_factor + config.shift_factor
            made = pipe.vae.decode(values, return_dict=False)[0].float().cpu() / 2 + 0.5
        pixels = torch.nn.functional.adaptive_avg_pool2d(made.clamp(0, 1), 8)
        points = latents.permute(0, 2, 3, 1).reshape(-1, config.latent_channels)
        points = torch.cat([points, torch.ones(len(points), 1)], dim=1)
        _colours[pipe.vae] = torch.linalg.lstsq(points, pixels.permute(0, 2, 3, 1).reshape(-1, 3)).solution
    return _colours[pipe.vae]


def set_lora_strengths(pipe: Any, loras: Mapping[str, float]) -> None:
    """Set the strength of each named LoRA; those not named are switched off."""
    loaded = [name for names in pipe.get_list_adapters().values() for name in names]
    for name in loras:
        if name not in loaded:
            raise unknown("sample", "no such LoRA in this pipeline", name, loaded)
    if loaded:
        names = list(dict.fromkeys(loaded))
        pipe.set_adapters(names, [float(loras.get(name, 0.0)) for name in names])


def _pictures(prompt: str | Sequence[str], seed: int | Sequence[int]) -> tuple[list[str], list[int]]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise AlkahestError("sample", "prompts must be text, at least one", found=repr(prompt)[:80])
    seeds = [seed + n for n in range(len(prompts))] if isinstance(seed, int) else [int(one) for one in seed]
    if len(prompts) == 1:
        prompts *= len(seeds)
    if len(prompts) != len(seeds):
        raise MismatchError("sample", "as many seeds as prompts are needed", expected=len(prompts), found=len(seeds))
    return prompts, seeds


def size_of_latents(pipe: Any, width: int | None, height: int | None) -> tuple[int, int]:
    """Height and width of the latents."""
    multiple = pipe.vae_scale_factor * 2
    default = int(pipe.vae.config.sample_size)
    found = {"height": height or default, "width": width or default}
    for name, pixels in found.items():
        if pixels % multiple or pixels < multiple:
            raise AlkahestError(
                "sample",
                f"{name} is not a multiple of {multiple}",
                found=pixels,
                fix=f"for example {max(1, round(pixels / multiple)) * multiple}",
            )
    return found["height"] // pipe.vae_scale_factor, found["width"] // pipe.vae_scale_factor


def _check_finite(latents: Tensor, number: int, steps: int, sigma: float) -> None:
    bad = [n for n, picture in enumerate(latents) if not torch.isfinite(picture).all()]
    if bad:
        raise NonFiniteError(
            "sample",
            f"the latents became NaN or infinite at step {number} of {steps} (sigma {sigma:.3f})",
            found=f"in {len(bad)} of {len(latents)} pictures of the batch",
            fix="a smaller multiplier or cfg, or dtype='fp32'; alkahest verify finds NaN in files",
        )


def _html(image: Image, prompt: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    scale = max(1, 256 // image.width)
    return (
        f'<figure style="display:inline-block;margin:4px"><img alt="{html.escape(prompt)}" '
        f'width="{image.width * scale}" style="image-rendering:pixelated" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(prompt)}</figcaption></figure>"
    )

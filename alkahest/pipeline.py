"""A diffusers pipeline around a checkpoint or an expression: the real ZImagePipeline, our weights in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alkahest import mini
from alkahest.architecture import infer
from alkahest.dtypes import FORMATS, FP8, storage_name
from alkahest.errors import FileFormatError, MismatchError, UnknownNameError, UnsupportedError, nearest
from alkahest.expr import Weights
from alkahest.live import load_into

if TYPE_CHECKING:
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

NAMES = ("text_encoder", "tokenizer", "vae", "scheduler")
_BIG = 1_000_000_000  # parameters; above this the default is bf16, because 6 billion in fp32 are 25 GB


def pipeline(
    weights: Weights,
    components: Any = None,
    *,
    dtype: str | None = None,
    storage: str | None = None,
    device: str = "cpu",
    offload: bool = False,
) -> ZImagePipeline:
    """A real ``ZImagePipeline`` whose transformer holds a checkpoint, or what an expression comes to.

    >>> pipe = ak.pipeline(bridge + 8 * delta, components="Tongyi-MAI/Z-Image")
    >>> pipe = ak.pipeline(ak.mini.load("base"))  # the miniature family brings its own components

    ``components`` gives text encoder, tokenizer, VAE and scheduler: a pipeline folder, a hub id, a
    pipeline to share them with, or a mapping from those names to loaded parts. ``dtype`` is that of
    the arithmetic: fp32 by default, bf16 above a billion parameters. ``storage="fp8_e4m3fn"`` keeps
    the transformer's Linears in fp8 and computes in ``dtype`` (diffusers' layerwise casting: half
    the memory of bf16). ``offload=True`` keeps each part on the CPU until it is needed (CUDA only).
    Raises MismatchError, before anything is loaded, if the parts do not fit the transformer.
    """
    from diffusers import ZImagePipeline

    if not isinstance(weights, Weights):
        raise MismatchError("pipeline", "weights are needed", found=type(weights).__name__, fix="ak.open(...) or bridge + k * delta")  # fmt: skip
    if offload and not torch.accelerator.is_available():
        raise UnsupportedError("pipeline", "offloading needs a GPU to offload from", fix="leave offload out")
    size = sum(torch.Size(shape).numel() for shape in weights.shapes.values())
    computed = FORMATS[_format(dtype or ("bf16" if size > _BIG else "fp32"), ("fp32", "bf16", "fp16"))].torch
    stored = None if storage is None else FORMATS[_format(storage, FP8)].torch
    parts = load_components(weights, components, computed)
    transformer = empty_transformer(weights, computed, stored, device="cpu" if offload else device)
    load_into(weights, transformer)
    pipe = ZImagePipeline(transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    if offload:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to(device)
    return pipe


def load_components(weights: Weights, components: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Text encoder, tokenizer, VAE and scheduler, checked against the weights."""
    from diffusers import DiffusionPipeline

    if components is None:
        components = _default(weights)
    if isinstance(components, DiffusionPipeline):
        parts = {name: getattr(components, name) for name in NAMES}
    elif isinstance(components, Mapping):
        for name in components:
            if name not in NAMES:
                raise UnknownNameError("components", "no such component", found=repr(name), fix=nearest(str(name), NAMES))  # fmt: skip
        parts = dict(components)
    else:
        parts = _from_folder(components, dtype)
    if absent := [name for name in NAMES if parts.get(name) is None]:
        raise FileFormatError("components", f"{', '.join(absent)} missing", found=components, expected=", ".join(NAMES))
    _check_fit(weights, parts)
    return parts


def empty_transformer(
    weights: Weights, dtype: torch.dtype, storage: torch.dtype | None = None, device: str = "cpu"
) -> ZImageTransformer2DModel:
    """A transformer of the weights' architecture with memory but no numbers yet."""
    from diffusers import ZImageTransformer2DModel

    config = weights.leading.config or infer(weights.shapes, weights.leading.name).diffusers_config()
    with torch.device("meta"):
        model = torch.nn.Module.to(ZImageTransformer2DModel.from_config(config), dtype).eval()
    if storage is not None:
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=dtype)
    return model.to_empty(device=device).requires_grad_(False)


def _default(weights: Weights) -> Path:
    if mini.is_miniature(weights.shapes):
        return mini.components()
    for leaf in weights.leaves():
        for reader in getattr(leaf, "files", ()):
            if (folder := reader.path.parent.parent).joinpath("model_index.json").is_file():
                return Path(folder)
    raise FileFormatError(
        "pipeline", "components are needed: text encoder, tokenizer, VAE and scheduler",
        fix='components="Tongyi-MAI/Z-Image" (a hub id) or a pipeline folder',
    )  # fmt: skip


def _from_folder(source: Any, dtype: torch.dtype) -> dict[str, Any]:
    from diffusers import ZImagePipeline

    path = Path(source)
    if not path.is_dir() and len(Path(str(source)).parts) != 2:
        raise FileFormatError("components", "no such folder", file=source, fix="a pipeline folder or a hub id")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise FileFormatError("components", "this folder is no diffusers pipeline", file=source, expected="model_index.json in it")  # fmt: skip
    if path.is_dir() and (absent := [name for name in NAMES if not (path / name).is_dir()]):
        raise FileFormatError("components", f"{', '.join(absent)} missing", file=source, expected=", ".join(NAMES))
    try:
        with quiet():
            loaded = ZImagePipeline.from_pretrained(str(source), transformer=None, torch_dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise FileFormatError("components", "these do not load", file=source, found=error, fix="a pipeline folder or a hub id") from error  # fmt: skip
    return {name: getattr(loaded, name) for name in NAMES}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of the libraries that load parts: ours is the caller's to show."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    were_on = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, on in zip(libraries, were_on, strict=True):
            if on:
                library.enable_progress_bar()


def _check_fit(weights: Weights, parts: Mapping[str, Any]) -> None:
    text = weights.shapes["cap_embedder.1.weight"][1]
    if (width := parts["text_encoder"].config.hidden_size) != text:
        raise MismatchError("pipeline", "the text encoder does not fit the transformer", key="cap_embedder.1.weight", expected=f"text width {text}", found=width)  # fmt: skip
    channels = weights.shapes["all_x_embedder.2-1.weight"][1] // 4
    if (found := parts["vae"].config.latent_channels) != channels:
        raise MismatchError("pipeline", "the VAE does not fit the transformer", key="all_x_embedder.2-1.weight", expected=f"{channels} latent channels", found=found)  # fmt: skip


def _format(name: str, allowed: tuple[str, ...]) -> str:
    found = storage_name(name)
    if found not in allowed:
        raise UnknownNameError("pipeline", "not a dtype for this", found=repr(name), fix=nearest(found, allowed))
    return found

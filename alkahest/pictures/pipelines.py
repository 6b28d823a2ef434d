"""A diffusers pipeline around a checkpoint or an expression: the real ZImagePipeline, our weights in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from alkahest.algebra.weights import Weights
from alkahest.errors import MismatchError, UnknownNameError, UnsupportedError, nearest, refuse_unknown_options
from alkahest.model.dtypes import FORMATS, FP8, storage_name
from alkahest.pictures.components import load_components

if TYPE_CHECKING:
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

_BIG = 1_000_000_000  # parameters; above this the default is bf16, because 6 billion in fp32 are 25 GB


@refuse_unknown_options
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

    Parameters
    ----------
    weights : Weights
        A checkpoint or an expression; named scalars stand at their defaults.
    components : optional
        Text encoder, tokenizer, VAE and scheduler: a pipeline folder, a hub id, a pipeline to share them with, or a
        mapping from those names to loaded parts or ComfyUI's files: ``{"text_encoder": "qwen_3_4b.safetensors", "vae":
        "ae.safetensors", "tokenizer": "qwen25_tokenizer/"}``. The miniature family brings its own.
    dtype : str, optional
        Of the arithmetic: fp32 by default, bf16 above a billion parameters.
    storage : str, optional
        ``"fp8_e4m3fn"`` keeps the transformer's Linears in fp8 and computes in ``dtype`` (diffusers' layerwise casting:
        half the memory of bf16).
    device : str, default "cpu"
        Where models run: ``cpu``, ``cuda`` or ``mps``.
    offload : bool, default False
        Keep each part on the CPU until it is needed (CUDA only).

    Returns
    -------
    ZImagePipeline

    Raises
    ------
    MismatchError
        Before the transformer is loaded, if the parts do not fit it.

    Examples
    --------
    >>> pipe = ak.pipeline(bridge.protect("refiner") + 8 * (variant - base))
    """
    from diffusers import ZImagePipeline

    if not isinstance(weights, Weights):
        raise MismatchError(
            "pipeline", "weights are needed", found=type(weights).__name__, fix="ak.open(...) or bridge + k * delta"
        )
    if offload and not torch.accelerator.is_available():
        raise UnsupportedError("pipeline", "offloading needs a GPU to offload from", fix="leave offload out")
    size = sum(torch.Size(shape).numel() for shape in weights.shapes.values())
    computed = FORMATS[_format(dtype or ("bf16" if size > _BIG else "fp32"), ("fp32", "bf16", "fp16"))].torch
    stored = None if storage is None else FORMATS[_format(storage, FP8)].torch
    parts = load_components(weights, components, computed)
    transformer = empty_transformer(weights, computed, stored, device="cpu" if offload else device)
    weights.load_into(transformer)
    pipe = ZImagePipeline(transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    if offload:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to(device)
    return pipe


def empty_transformer(
    weights: Weights, dtype: torch.dtype, storage: torch.dtype | None = None, device: str = "cpu"
) -> ZImageTransformer2DModel:
    """A transformer of the weights' architecture with memory but no numbers yet."""
    from diffusers import ZImageTransformer2DModel

    config = weights.leading.config or weights.leading.architecture.diffusers_config()
    with torch.device("meta"):
        model = torch.nn.Module.to(ZImageTransformer2DModel.from_config(config), dtype).eval()
    if storage is not None:
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=dtype)
    return model.to_empty(device=device).requires_grad_(False)


def _format(name: str, allowed: tuple[str, ...]) -> str:
    found = storage_name(name)
    if found not in allowed:
        raise UnknownNameError("pipeline", "not a dtype for this", found=repr(name), fix=nearest(found, allowed))
    return found

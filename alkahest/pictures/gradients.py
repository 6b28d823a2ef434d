"""The sign of the flow loss' gradient on a handful of pictures, for every weight of a bridge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alkahest.algebra.weights import Weights
from alkahest.engine.events import Event, result_of
from alkahest.engine.load import slices
from alkahest.errors import NonFiniteError, UnsupportedError, refuse_unknown_options
from alkahest.measure.placed import require_weights
from alkahest.pictures.evidence import PictureOptions, batch_of, stream_examples
from alkahest.pictures.flow import Arithmetic, losses
from alkahest.pictures.live import LiveModel, told_out_of_memory
from alkahest.pictures.settings import SHIFT
from alkahest.sources.signs import Signs


@refuse_unknown_options
def gradient_signs(
    on: Weights,
    pictures: Any = None,
    prompts: Sequence[str] | None = None,
    *,
    variant: Weights | None = None,
    components: Any = None,
    count: int = 24,
    seed: int = 0,
    steps: int = 12,
    cfg: float = 2.0,
    shift: float = SHIFT,
    width: int | None = None,
    height: int | None = None,
    batch: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
) -> Signs:
    """The sign of the flow loss' gradient for every weight of ``on``, over pictures of the new thing.

    One backward pass with gradient checkpointing over ``batch`` noised latents at a time. Each tensor's gradient is
    added to its sum on the CPU and freed as soon as it is known, so that a device holds the weights and one gradient:
    12.3 GB and activations for the real model in bf16, on the CPU 24.6 GB of sums, or none if one batch holds
    everything (6.15 billion made-up parameters on a CPU peaked at 15.2 GB, the mapped file included). A sign is a bit:
    positive, or not.

    Parameters
    ----------
    on : Weights
        What a delta is to be added to.
    pictures : list of pictures or folder, optional
        Of the new thing, with their captions as ``prompts``, or a folder with a caption beside each.
    prompts : list of str, optional
        What the ``variant`` draws, or the captions of ``pictures``.
    variant : Weights, optional
        Draws ``count`` of the ``prompts`` where no pictures are given.
    components : optional
        As in `pipeline`.
    count : int, default 24
        How many pictures of each kind.
    seed : int, default 0
        Of pictures and noise.
    steps : int, default 12
        Steps of each picture that is drawn.
    cfg : float, default 2
        Guidance of what is drawn, as in `sample`: 1 is none.
    shift : float, default 3
        Of the noise levels of what is drawn, as in `sample`.
    width, height : int, optional
        How pictures are drawn, as in `sample`.
    batch : int, optional
        Pictures looked at together, by default about 1.5 megapixels.
    dtype : str, optional
        In what a file in fp8 is computed with.
    device : str, default "cpu"
        Where models run: ``cpu``, ``cuda`` or ``mps``.

    Returns
    -------
    Signs
        For ``delta.agreeing``; ``save`` writes them.

    Raises
    ------
    AlgebraError
        Without pictures.
    NonFiniteError
        For a gradient that is NaN.
    UnsupportedError
        If memory is short.

    Examples
    --------
    >>> signs = ak.gradient_signs(bridge, prompts=prompts, variant=variant, count=3, steps=4)
    >>> merged = bridge.protect("refiner") + 1.2 * (variant - base).agreeing(signs)
    """
    options = PictureOptions(
        prompts=prompts,
        pictures=pictures,
        components=components,
        count=count,
        seed=seed,
        steps=steps,
        cfg=cfg,
        shift=shift,
        width=width,
        height=height,
        batch=batch,
        dtype=dtype,
        device=device,
    )
    found: Signs = result_of(stream_gradient_signs(on, options, variant), "gradient_signs")
    return found


def stream_gradient_signs(on: Weights, options: PictureOptions, variant: Weights | None = None) -> Iterator[Event]:
    """`gradient_signs` as a generator of events."""
    options.require("gradient_signs", with_ordinary=False)
    require_weights("gradient_signs", on, "on")
    if variant is not None:
        require_weights("gradient_signs", variant, "variant")
    if options.pictures is None and variant is None:
        raise UnsupportedError(
            "gradient_signs",
            "prompts alone are no pictures",
            fix="pictures=..., or variant=: the model that draws them",
        )
    if options.pictures is not None and variant is not None:
        raise UnsupportedError(
            "gradient_signs",
            "pictures are given, so that nothing is drawn",
            found="variant",
            fix="leave one of them out",
        )
    with told_out_of_memory("gradient_signs", "batch=1, width=512, height=512, or dtype='bf16'"):
        yield from _stream(on, variant, options)


def _stream(on: Weights, variant: Weights | None, options: PictureOptions) -> Iterator[Event]:
    live = LiveModel(on, options.components, **options.held)
    if variant is not None:
        live.become(variant)
    for event in stream_examples(live.pipe, "the new thing", options, "gradient_signs"):
        if event.result is None:
            yield event.moved(event.done, 2 * event.total)
    examples, _, notes = event.result
    live.become(on)
    size = batch_of(live.pipe, options)
    total = len(examples) * len(examples.levels)
    model = live.pipe.transformer
    sums = _Sums(model, kept=total > size)
    how = Arithmetic(live.pipe._execution_device, model.dtype)
    with sums:
        for rows, one in examples.batches(size):
            torch.autograd.backward(losses(model, one, how).sum())
            yield Event(total + rows.stop, 2 * total, "gradient")
    packed, unreached = sums.by_key(on)
    about = {"of": on.text(), "pictures": len(examples), "levels": list(examples.levels)}
    about |= {name: told for name, told in (("notes", notes), ("not reached", unreached)) if told}
    shapes = {key: on.shapes[key] for key in packed}
    yield Event(2 * total, 2 * total, "done", Signs(shapes, packed, about=about))


class _Sums:
    """Gradients of a module's parameters, each moved away as soon as it is known: as sums, or at once as signs."""

    def __init__(self, model: Any, kept: bool) -> None:
        self.model, self.kept = model, kept
        self.found: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> _Sums:
        self.model.requires_grad_(True)
        if hasattr(self.model, "enable_gradient_checkpointing"):
            self.model.enable_gradient_checkpointing()
        for name, parameter in self.model.named_parameters():
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._taker(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        if hasattr(self.model, "disable_gradient_checkpointing"):
            self.model.disable_gradient_checkpointing()
        self.model.requires_grad_(False)

    def _taker(self, name: str) -> Any:
        def take(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None  # the hook runs when it is there
            if not torch.isfinite(gradient).all():
                raise NonFiniteError(
                    "gradient_signs", "a gradient is NaN or infinite", key=name, fix="dtype='fp32', or other pictures"
                )
            if not self.kept:
                self.found[name] = _packed(gradient)
                return
            moved = gradient.float().cpu()
            self.found[name] = moved if name not in self.found else self.found[name].add_(moved)

        return take

    def by_key(self, on: Weights) -> tuple[dict[str, Tensor], list[str]]:
        """Packed signs by canonical name, and the tensors that no picture reached: they count as not positive."""
        places = slices(on, self.model)
        names = {parameter.data_ptr(): name for name, parameter in self.model.named_parameters()}
        packed, unreached = {}, []
        for key, target in places.items():
            found = self.found.get(names.get(target.data_ptr(), ""))
            if found is None:
                unreached.append(key)
                found = torch.zeros(target.numel())
            packed[key] = found if found.dtype == torch.uint8 else _packed(found)
        return packed, unreached


def _packed(gradient: Tensor) -> Tensor:
    """Which are positive, eight in a byte."""
    return torch.from_numpy(np.packbits((gradient > 0).flatten().cpu().numpy(), bitorder="little"))

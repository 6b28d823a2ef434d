"""Expression -> the parameters of a live module, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from alkahest.engine.events import Event
from alkahest.engine.options import Options
from alkahest.engine.readable import Workspace
from alkahest.engine.scalars import Rules
from alkahest.engine.terms import Computable, Term
from alkahest.engine.workers import Job, Run, blocks
from alkahest.errors import MismatchError
from alkahest.model.dtypes import FORMAT_OF


def stream_into(expression: Computable, module: torch.nn.Module, options: Options) -> Iterator[Event]:
    """Compute an expression into the parameters of a module, in place: a generator of events, one per canonical tensor.

    The module's names may be native or diffusers'. Values are rounded once to each parameter's dtype, on its device.
    Raises MismatchError, before anything is changed, if names, shapes or dtypes do not fit.
    """
    rules = Rules(comfy_compatible=options.comfy_compatible)
    terms = {key: expression.at(key, rules) for key in expression.shapes}
    # Every key of the expression's shapes has a term.
    yield from fill({key: term for key, term in terms.items() if term is not None}, slices(expression, module), options)


def fill(
    terms: Mapping[str, Term], targets: Mapping[str, torch.Tensor], options: Options, often: bool = False
) -> Iterator[Event]:
    """Compute terms into the tensors of the same names, in place; ``often`` as for `Run`."""
    run = Run(options, often)
    jobs = []
    for key, term in terms.items():
        target = targets[key]
        jobs.append(Job(key, target.nbytes, _fill(run, key, term, target)))
    yield from run.progress(jobs)


def _fill(run: Run, key: str, term: Term, target: torch.Tensor) -> Callable[[Workspace], None]:
    flat = target.view(-1)

    def work(workspace: Workspace) -> None:
        for start, stop in blocks(term, flat.numel()):
            run.compute(term, key, start, stop, workspace, flat[start:stop])

    return work


def slices(expression: Computable, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Canonical name -> the part of a module's parameters that holds it; LoRA adapters are looked through."""
    if not isinstance(module, torch.nn.Module):
        raise MismatchError("load_into", "a torch.nn.Module is needed", found=type(module).__name__)
    slices: dict[str, torch.Tensor] = {}
    for wrapped, parameter in module.state_dict(keep_vars=True).items():
        if ".lora_" in wrapped:
            continue
        name, values = wrapped.replace(".base_layer.", "."), parameter.detach()
        if values.is_meta or not values.is_contiguous() or values.dtype not in FORMAT_OF:
            raise MismatchError(
                "load_into",
                "this parameter cannot be written in place",
                key=name,
                expected="a contiguous float tensor in memory",
                found=f"{values.dtype} on {values.device}",
            )
        family = expression.leading.family
        keys = family.canonical(name)
        rows = family.rows(keys, len(values)) if len(keys) > 1 else None
        slices |= dict(zip(keys, values.split(list(rows)), strict=True)) if rows else {keys[0]: values}
    for key, shape in expression.shapes.items():
        found = tuple(slices[key].shape) if key in slices else "no such parameter"
        if found != shape:
            raise MismatchError("load_into", "the module does not fit", key=key, expected=shape, found=found)
    if extra := [key for key in slices if key not in expression.shapes]:
        raise MismatchError("load_into", "the module has a parameter that the weights lack", key=extra[0])
    return {key: slices[key] for key in expression.shapes}

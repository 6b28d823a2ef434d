"""How the numbers in two models' streams map to each other: after their refiners, and after every block."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alkahest.algebra.weights import Weights
from alkahest.engine.events import Event, result_of
from alkahest.errors import AlgebraError, MismatchError, refuse_unknown_options
from alkahest.measure.text import lines_under, lines_under_html
from alkahest.model.families import Family
from alkahest.pictures.encoded import MULTIPLE
from alkahest.pictures.evaluation import EvaluationSet
from alkahest.pictures.evidence import PictureOptions, stream_examples
from alkahest.pictures.flow import Arithmetic, Noised, velocity
from alkahest.pictures.live import told_out_of_memory
from alkahest.pictures.pipelines import pipeline
from alkahest.pictures.settings import SHIFT
from alkahest.pictures.stream_maps import affine_map, cka, orthogonal_map, r_squared, with_one

if TYPE_CHECKING:
    import pandas

_MANY = 24  # pictures from which on maps are about what they will be
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.85, 1.0)  # sigma: all that a sampler goes through
# Shares of the mean variance: what keeps directions that few pictures show from being made up. Other pictures choose.
_RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
# Column -> what it is. X are one model's numbers at a place of the stream, Y the other's, token by token; R^2 is 1 less
# the share of Y's variance that is left, on pictures that the maps were not fitted on.
ALIGNMENT = {
    "place": "after which block",
    "stream": "image or text tokens",
    "tokens": "how many, without padding",
    "as it is": "R^2 of X itself",
    "orthogonal": "R^2 of the best rotation, scale and shift of X (Schoenemann 1966)",
    "linear": "R^2 of the best affine map of X",
    "cka": "linear CKA of X and Y (Kornblith et al. 2019, arXiv:1905.00414)",
}


@dataclass(frozen=True, repr=False)
class Alignment:
    """Maps from one model's streams to another's: ``table`` (columns: `ALIGNMENT`), and ``maps`` for the streams that
    enter the main stack: name of the stack to (matrix [width + 1, width], the last row a shift).
    """

    table: pandas.DataFrame  # columns: `ALIGNMENT`
    maps: Mapping[str, Tensor]  # stream -> (matrix [width + 1, width], its last row a shift)
    models: tuple[Weights, Weights] = field(repr=False)  # whose streams they are
    components: Any = None  # text encoder, tokenizer and VAE of both
    notes: tuple[str, ...] = ()  # what was odd about the pictures

    def __repr__(self) -> str:
        return lines_under(self._title(), self._lines())

    def _repr_html_(self) -> str:
        from alkahest.measure.measured_table import small_html

        table = small_html(self.table, 3)
        return lines_under_html(f"<b>{html.escape(self._title())}</b>", self._lines()) + table

    def _title(self) -> str:
        a, b = self.models
        return f"{a.text()} -> {b.text()}"

    def _lines(self) -> list[str]:
        shown = self.table.head(len(self.maps))
        return [*self.notes] + [
            f"{row.stream} {row.place}: R^2 {row[4]:.2f} as it is, {row.orthogonal:.2f} rotated, {row.linear:.2f} by a "
            "linear map"
            for row in shown.itertuples()
        ]

    def pipeline(self, mapped: bool = True, device: str = "cpu") -> Any:
        """The first model's refiners, the maps, and the second model's layers, as a pipeline that draws.

        >>> ak.sample(ak.alignment(base, deturbo, prompts=prompts).pipeline(), "a red ball").images[0]

        With ``mapped=False`` the streams go over as they are. Both models are held.
        """
        first, second = (pipeline(one, self.components, device=device) for one in self.models)
        maps = self.maps if mapped else {}
        _join(first.transformer, second.transformer, self.models[0].family, maps)
        return second


@refuse_unknown_options
def alignment(
    a: Weights,
    b: Weights,
    pictures: Any = None,
    prompts: Sequence[str] | None = None,
    *,
    components: Any = None,
    count: int = 24,
    seed: int = 0,
    steps: int = 12,
    cfg: float = 2.0,
    shift: float = SHIFT,
    width: int | None = None,
    height: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
) -> Alignment:
    """Fit maps from the streams of ``a`` to those of ``b``: after their refiners and after every block.

    Both see the same noised pictures. Maps are fitted on two thirds of the pictures and judged on the third. If the
    streams that enter the main stack agree as they are, a delta of one model means the same in the other; if only a
    linear map makes them agree, it means the same after that map. Both models are held at once.

    Parameters
    ----------
    a, b : Weights
        Models of one architecture, held at once.
    pictures : list of pictures or folder, optional
        With captions as ``prompts``, or a folder with a caption beside each. Without them ``a`` draws ``prompts``.
    prompts : list of str, optional
        What ``a`` draws, or the captions of ``pictures``.
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
    dtype : str, optional
        Of the arithmetic, as in `pipeline`.
    device : str, default "cpu"
        As in `pipeline`.

    Returns
    -------
    Alignment
        ``table`` (`ALIGNMENT` of `alkahest.pictures.alignments` says what its columns are) and ``maps``.

    Raises
    ------
    MismatchError
        For models of different widths.
    AlgebraError
        For fewer than three pictures.

    Examples
    --------
    >>> found = ak.alignment(base, bridge, prompts=prompts, count=3, steps=4)
    >>> table = found.table
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
        dtype=dtype,
        device=device,
    )
    found: Alignment = result_of(stream_alignment(a, b, options), "alignment")
    return found


def stream_alignment(a: Weights, b: Weights, options: PictureOptions) -> Iterator[Event]:
    """`alignment` as a generator of events."""
    options.require("alignment", with_ordinary=False)
    for one in (a, b):
        if not isinstance(one, Weights):
            raise AlgebraError("alignment", "two complete models are needed", found=type(one).__name__)
    widths = [one.leading.architecture.width for one in (a, b)]
    if a.family is not b.family or widths[0] != widths[1]:
        raise MismatchError("alignment", "the models are of different widths", expected=widths[0], found=widths[1])
    with told_out_of_memory("alignment", "dtype='bf16', width=512, height=512: both models are held at once"):
        yield from _stream(a, b, options)


def _stream(a: Weights, b: Weights, options: PictureOptions) -> Iterator[Event]:
    pipes = [pipeline(one, options.components, dtype=options.dtype, device=options.device) for one in (a, b)]
    for event in stream_examples(pipes[0], "the pictures", options, "alignment"):
        if event.result is None:
            yield event.moved(event.done, 2 * event.total)
    examples, _, told = event.result
    if len(examples) < 3:
        found = f"{len(examples)} pictures"
        raise AlgebraError("alignment", "pictures are needed to fit on, to choose by and to judge by", found=found)
    examples = EvaluationSet(examples.latents, examples.captions, options.seed, LEVELS, examples.name)
    total = 2 * len(examples)
    taken: list[list[_Streams]] = [[], []]
    for number, pipe in enumerate(pipes):
        for rows, batch in examples.batches(len(LEVELS)):
            taken[number].append(_streams(pipe, batch, a.family))
            yield Event(total + number * len(examples) + rows.stop // len(LEVELS), 2 * total, "streams")
    table, maps = _fit(taken[0], taken[1], a.family)
    few = len(examples) < _MANY
    why = f"by {len(examples)} pictures: rotations and maps are fitted to too few, and come out worse than they are"
    notes = (*told, f"{why}; take {_MANY} or more") if few else tuple(told)
    yield Event(2 * total, 2 * total, "done", Alignment(table, maps, (a, b), options.components, notes))


_Streams = dict[tuple[str, str], tuple[Tensor, Tensor]]  # (place, stream) -> tokens [n, width], and which are padding


@torch.no_grad()
def _streams(pipe: Any, batch: Noised, family: Family) -> _Streams:
    """What stands in the streams after every block, for one picture at all its noise levels."""
    seen: dict[str, Tensor] = {}
    model = pipe.transformer

    def watch(place: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen.update({place: output.detach().float().cpu()})

    with ExitStack() as hooks:
        for stack in (*family.streams, family.main):
            blocks = getattr(model, stack)
            for number, block in enumerate(blocks):
                if stack == family.main or number == len(blocks) - 1:
                    hooks.callback(block.register_forward_hook(watch(f"{stack}.{number}")).remove)
        velocity(model, batch, Arithmetic(pipe._execution_device, model.dtype))
    height, width = batch.latents.shape[-2:]
    real = {"image": height * width // family.patch**2, "text": len(batch.captions[0])}
    found: _Streams = {}
    for place, values in seen.items():
        stack = place.rpartition(".")[0]
        first = 0
        for stream in family.streams.values() if stack == family.main else (family.streams[stack],):
            length = -(-real[stream] // MULTIPLE) * MULTIPLE
            tokens = values[:, first : first + length]
            padding = torch.arange(tokens.shape[1]) >= real[stream]
            found[place, stream] = tokens.flatten(0, 1), padding.repeat(len(tokens))
            first += length
    return found


def _fit(left: list[_Streams], right: list[_Streams], family: Family) -> tuple[pandas.DataFrame, dict[str, Tensor]]:
    import pandas as pd

    rows: list[dict[str, Any]] = []
    maps: dict[str, Tensor] = {}
    for place, stream in left[0]:
        stack = place.rpartition(".")[0]
        thirds = [[_tokens(some[n::3], (place, stream), padded=False) for some in (left, right)] for n in range(3)]
        ridge = _best_ridge(*thirds[0], *thirds[1])
        tokens = sum(len(x) for x, _ in thirds)
        fitted = [torch.cat(both) for both in zip(thirds[0], thirds[1], strict=True)]
        agreement = _agreement(fitted[0], fitted[1], thirds[2][0], thirds[2][1], ridge)
        rows.append({"place": place, "stream": stream, "tokens": tokens, **agreement})
        if stack in family.streams:
            x, y = (_tokens(some, (place, stream), padded=True) for some in (left, right))
            maps[stack] = affine_map(x, y, ridge).float()
    order = {stack: number for number, stack in enumerate((*family.streams, family.main))}
    rows.sort(key=lambda row: (order[row["place"].rpartition(".")[0]], int(row["place"].rpartition(".")[2])))
    return pd.DataFrame(rows, columns=list(ALIGNMENT)), maps


def _tokens(some: list[_Streams], where: tuple[str, str], padded: bool) -> Tensor:
    """The tokens of several pictures, with or without those that only fill up."""
    return torch.cat([values if padded else values[~padding] for values, padding in (one[where] for one in some)])


def _best_ridge(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> float:
    """The ridge whose map does best on tokens of other pictures."""
    given = with_one(x_test)
    return max(_RIDGES, key=lambda ridge: r_squared(given @ affine_map(x, y, ridge), y_test))


def _agreement(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, ridge: float) -> dict[str, float]:
    turned = orthogonal_map(x, y)
    fitted = affine_map(x, y, ridge)
    return {
        "as it is": r_squared(x_test, y_test),
        "orthogonal": r_squared(turned(x_test), y_test),
        "linear": r_squared(with_one(x_test) @ fitted, y_test),
        "cka": cka(x_test, y_test),
    }


def _join(first: Any, second: Any, family: Family, maps: Mapping[str, Tensor]) -> None:
    """Let the second model's main stack see what the first model's refiners say, mapped."""
    seen: dict[str, Tensor] = {}

    class Enough(Exception):
        pass

    def stop(module: Any, inputs: Any, kwargs: Any) -> None:
        raise Enough

    getattr(first, family.main)[0].register_forward_pre_hook(stop, with_kwargs=True)
    for stack in family.streams:
        block = getattr(first, stack)[-1]
        block.register_forward_hook(lambda module, inputs, output, stack=stack: seen.update({stack: output}))

    def before(module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            first(*inputs, **kwargs)
        except Enough:
            return

    def replaced(stack: str) -> Callable[..., Tensor]:
        def give(module: Any, inputs: Any, output: Tensor) -> Tensor:
            found = seen[stack]
            if stack not in maps:
                return found.to(output.dtype)
            matrix = maps[stack].to(found.device)
            return (found.float() @ matrix[:-1] + matrix[-1]).to(output.dtype)

        return give

    second.register_forward_pre_hook(before, with_kwargs=True)
    for stack in family.streams:
        getattr(second, stack)[-1].register_forward_hook(replaced(stack))

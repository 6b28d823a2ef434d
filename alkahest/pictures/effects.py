"""What a delta does to what models say: on its own base and on a bridge, as a whole and block by block."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from alkahest.algebra.deltas import Delta, Difference
from alkahest.algebra.expression import Expression
from alkahest.algebra.weights import Weights, ends
from alkahest.engine.events import Event, result_of
from alkahest.engine.readable import Workspace
from alkahest.engine.scalars import Rules
from alkahest.errors import AlgebraError, refuse_unknown_options
from alkahest.measure.lineage import check_if_known
from alkahest.measure.placed import not_protected, require_delta, require_weights
from alkahest.measure.spectrum import matrix_of
from alkahest.measure.table import names_of, stream_delta_table
from alkahest.measure.text import lines_under, lines_under_html, percent
from alkahest.pictures.evaluation import EvaluationSet, predictions, share_along
from alkahest.pictures.evidence import FEW, LESS_MEMORY, Evidence, PictureOptions, batch_of, stream_evidence
from alkahest.pictures.flow import Arithmetic, velocity
from alkahest.pictures.live import LiveModel, told_out_of_memory
from alkahest.pictures.settings import SHIFT

if TYPE_CHECKING:
    import pandas

# Column -> what it is. e is what the delta changes of predictions on its own base, f what it changes on the model that
# it is added to, both on pictures of the new thing; g what it changes there on ordinary ones. |x| is a norm over all.
EFFECT = {
    "part": "all, or the part whose share of the delta is added alone",
    "block": "number of the block within its part, -1 outside of blocks",
    "weights": "|d| / |w|, what the weights say",
    "size": "|f| / |e|",
    "cosine": "of the angle between f and e: 1 if the delta means the same here",
    "along": "f . e / |e|^2: how much of what it does on its own base it does here",
    "leak": "|g| / |f|: what it does to everything else, for what it does to the new thing",
}


@dataclass(frozen=True, repr=False)
class Effect:
    """What a delta does: ``table`` with a row for all of it and one for each block alone (columns: `EFFECT`),
    ``tensors`` with what flows through each matrix, ``evidence`` with the pictures it was measured on.
    """

    k: float  # the multiplier
    table: pandas.DataFrame  # columns: `EFFECT`
    tensors: pandas.DataFrame  # what flows through each matrix
    evidence: Evidence  # the pictures that it was measured on
    title: str = ""  # the recipe in words

    def __repr__(self) -> str:
        return lines_under(self._title(), self._lines())

    def _repr_html_(self) -> str:
        from alkahest.measure.measured_table import small_html

        table = small_html(self.table, 3)
        return lines_under_html(f"<b>{html.escape(self._title())}</b>", self._lines()) + table

    def _title(self) -> str:
        whole = self.table.iloc[0]
        return (
            f"{self.k:g} x {self.title} does {percent(whole.along, 0)} of what it does on its own base (cosine "
            f"{whole.cosine:.2f})"
        )

    def _lines(self) -> list[str]:
        whole, blocks = self.table.iloc[0], self.table.iloc[1:]
        lines = [
            f"size {whole['size']:.2f} of its own, on pictures of the new thing; leak {whole.leak:.2f}: on ordinary "
            "pictures for that"
        ]
        if len(blocks):
            top = blocks.nlargest(3, "along")
            named = ", ".join(f"{block_name(row.part, row.block)} {percent(row.along, 0)}" for row in top.itertuples())
            lines.append(f"carried by {named}; the blocks alone add up to {percent(blocks.along.sum(), 0)}")
        if len(self.evidence.new) < FEW:
            lines.append(f"by {len(self.evidence.new)} pictures of the new thing: {FEW} or more make this surer")
        return [*lines, *self.evidence.notes]


@refuse_unknown_options
def effect(
    delta: Delta,
    on: Weights,
    *,
    base: Weights | None = None,
    k: float = 1.0,
    by_block: bool = True,
    prompts: Sequence[str] | None = None,
    pictures: Any = None,
    ordinary: Sequence[str] | None = None,
    components: Any = None,
    count: int = 24,
    seed: int = 0,
    steps: int = 12,
    cfg: float = 2.0,
    shift: float = SHIFT,
    width: int | None = None,
    height: int | None = None,
    batch: int | None = None,
    memory: int | str = "2GB",
    dtype: str | None = None,
    storage: str | None = None,
    device: str = "cpu",
    offload: bool = False,
) -> Effect:
    """What ``k * delta`` does to what a model says, on its own base and on ``on``, as a whole and block by block.

    The variant draws ``prompts`` (or ``pictures`` of the new thing are given, with captions); the model that the delta
    is added to draws as many of ``ordinary`` prompts. Both are mixed with noise at three levels, and predictions are
    compared.

    Parameters
    ----------
    delta : Delta
        What is added, times ``k``.
    on : Weights
        What it is added to; protected tensors stay.
    base : Weights, optional
        The delta's own unless it has none (a LoRA, a sum).
    k : float, default 1
        Multiplier.
    by_block : bool, default True
        Add each block's share of the delta alone besides.
    prompts : list of str, optional
        What the variant draws; they should ask for what it learned. Or the captions of ``pictures``.
    pictures : list of pictures or folder, optional
        Of the new thing, in a folder with a caption beside each.
    ordinary : list of str, optional
        What the model that is added to draws, for everything else; by default general prompts.
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
    memory : int or str, default "2GB"
        Most that is kept of the files, in bytes or as text, as in `LiveModel`.
    dtype, storage : str, optional
        Of the arithmetic and of what the transformer holds, as in `pipeline`.
    device : str, default "cpu"
        Where models run: ``cpu``, ``cuda`` or ``mps``.
    offload : bool, default False
        As in `LiveModel`.

    Returns
    -------
    Effect
        ``table``: `EFFECT` of `alkahest.pictures.effects` says what its columns are. ``tensors`` has ``|dW x| / |W x|``
        by matrix, over the inputs x that it really gets.

    Raises
    ------
    AlgebraError
        Without a base, or for a delta that is protected everywhere.
    NonFiniteError
        If a model says NaN.

    Examples
    --------
    >>> found = ak.effect(variant - base, bridge.protect("refiner"), prompts=prompts, count=3, steps=4)
    >>> strongest = found.table.nlargest(5, "along")[["part", "block", "along", "leak"]]
    """
    found: Effect = result_of(
        stream_effect(
            delta,
            on,
            base=base,
            k=k,
            by_block=by_block,
            options=PictureOptions(
                prompts,
                pictures,
                ordinary,
                components,
                count,
                seed,
                steps,
                cfg,
                shift,
                width,
                height,
                batch,
                memory,
                dtype,
                storage,
                device,
                offload,
            ),
        ),
        "effect",
    )
    return found


def stream_effect(
    delta: Delta,
    on: Weights,
    *,
    base: Weights | None = None,
    k: float = 1.0,
    by_block: bool = True,
    options: PictureOptions,
    live: LiveModel | None = None,
) -> Iterator[Event]:
    """`effect` as a generator of events; a ``live`` model of the same tensors is used, and holds ``on`` in the end."""
    require_delta("effect", delta)
    options.require("effect")
    require_weights("effect", on, "on")
    if not k:
        raise AlgebraError("effect", "0 times a delta does nothing", fix="k=1, or what ak.needed_multiplier says")
    variant, base = models_of(delta, base, "effect")
    for event in stream_delta_table(delta, on, device=options.device):
        table = event.result
        yield event.moved(event.done, 20 * event.total)
    with told_out_of_memory("effect", LESS_MEMORY):
        yield from _measure(delta, on, (variant, base), k, options, table, by_block, live)


def _measure(
    delta: Delta,
    on: Weights,
    models: tuple[Weights, Weights],
    k: float,
    options: PictureOptions,
    table: pandas.DataFrame,
    by_block: bool,
    live: LiveModel | None,
) -> Iterator[Event]:
    variant, base = models
    added = added_rows(table, delta, on, "effect")
    places = places_of(added) if by_block else []
    live = LiveModel(on, options.components, **options.held) if live is None else live
    for event in stream_evidence(live, variant, on, options, "effect"):
        if event.result is None:
            yield event
    found: Evidence = event.result
    check = check_if_known(table)
    evidence = replace(found, notes=(*found.notes, check.objection)) if check and check.objection else found
    before, total = event.total, event.total + 4 + len(places)
    batch = batch_of(live.pipe, options)

    def said(expression: Weights) -> tuple[Tensor, Tensor]:
        live.become(expression)
        return predictions(live.pipe, evidence.new, batch), predictions(live.pipe, evidence.rest, batch)

    yield Event(before, total, "its own base")
    live.become(base)
    without = predictions(live.pipe, evidence.new, batch)
    live.become(base + delta)
    own = predictions(live.pipe, evidence.new, batch) - without
    del without
    yield Event(before + 2, total, "the model it is added to")
    start = said(on)
    rows = [_row("all", -1, abs(k) * _relative(added), own, start, said(on + k * delta))]
    for number, (part, block) in enumerate(places):
        yield Event(before + 4 + number, total, block_name(part, block))
        one = k * delta.only(block_name(part, block))
        here = added[(added.part == part) & (added.block == block)]
        rows.append(_row(part, block, abs(k) * _relative(here), own, start, said(on + one)))
    live.become(on)
    tensors = _flow_through(live, evidence.new, k * delta, on, batch) if by_block else _no_tensors()
    import pandas as pd

    yield Event(total, total, "done", Effect(k, pd.DataFrame(rows), tensors, evidence, delta.text()))


def models_of(delta: Delta, base: Weights | None, operation: str) -> tuple[Weights, Weights]:
    """What draws the new thing, and the base that a delta is a difference from. AlgebraError if that is not known."""
    variant, its_base = ends(delta)
    its_base = its_base or _common_base(delta)
    base = its_base if base is None else base
    if base is None:
        raise AlgebraError(
            operation,
            "this delta does not say what it is a difference from",
            found=delta.text(),
            fix="base=: the model that it was made for; on the command line --made-for",
        )
    return base + delta if variant is None or base is not its_base else variant, base


def _common_base(delta: Expression) -> Weights | None:
    """The base of all the differences in a delta, if they have one."""
    if isinstance(delta, Difference):
        return delta.base if isinstance(delta.base, Weights) else None
    bases = {_common_base(child) for child in delta.children}
    return bases.pop() if len(bases) == 1 and delta.children else None


def block_name(part: str, block: int) -> str:
    """A block, or a part outside of blocks, as a pattern."""
    return part if block < 0 else f"{part}.{block}"


def added_rows(table: pandas.DataFrame, delta: Delta, on: Weights, operation: str) -> pandas.DataFrame:
    """The rows of a delta table whose tensors really change on ``on``. AlgebraError if all of them are protected."""
    kept = not_protected(delta, on)
    changed = table[table.delta_norm > 0]
    added = changed if kept is None else changed[changed.tensor.isin(kept)]
    if not len(added):
        raise AlgebraError(operation, "all that the delta changes is protected", fix="protect less, or .everywhere()")
    return added


def places_of(added: pandas.DataFrame) -> list[tuple[str, int]]:
    """Blocks, and parts outside of blocks, among the rows of a delta table, in the order of the data."""
    return list(dict.fromkeys((str(part), int(block)) for part, block in zip(added.part, added.block, strict=True)))


def _row(
    part: str,
    block: int,
    relative: float,
    own: Tensor,
    start: tuple[Tensor, Tensor],
    said: tuple[Tensor, Tensor],
) -> dict[str, Any]:
    new, rest = (there - before for there, before in zip(said, start, strict=True))
    size = math.sqrt(float(new.double().square().sum()))
    leak = math.sqrt(float(rest.double().square().mean()))
    typical = math.sqrt(float(new.double().square().mean()))
    length = math.sqrt(float(own.double().square().sum()))
    along = share_along(new, own) if length else math.nan
    return {
        "part": part,
        "block": block,
        "weights": relative,
        "size": size / length if length else math.nan,
        "cosine": along * length / size if size and length else math.nan,
        "along": along,
        "leak": leak / typical if typical else math.nan,
    }


def _relative(rows: pandas.DataFrame) -> float:
    """|d| / |w| over rows of a delta table."""
    weights = float(rows.on_norm.pow(2).sum())
    return math.sqrt(float(rows.delta_norm.pow(2).sum()) / weights) if weights else math.nan


def _flow_through(live: LiveModel, examples: EvaluationSet, delta: Delta, on: Weights, batch: int) -> pandas.DataFrame:
    """``|dW x| / |W x|`` of every matrix of a Linear, over the inputs that reach it in one batch."""
    import pandas as pd

    model, rules, kept = live.pipe.transformer, Rules(), not_protected(delta, on)
    found: dict[str, tuple[float, float, float]] = {}

    def watch(key: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            x = inputs[0].detach().float().flatten(0, -2)
            workspace = Workspace(x.device)
            terms = {"delta": delta.at(key, rules), "on": on.at(key, rules)}
            matrices = {n: matrix_of(t, delta.shapes[key], workspace) for n, t in terms.items() if t is not None}
            moved, kept_size = (float((x @ matrices[name].T).double().norm()) for name in ("delta", "on"))
            found[key] = moved, kept_size, float(matrices["delta"].norm() / matrices["on"].norm())

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            key = f"{name}.weight"
            if not isinstance(module, nn.Linear) or key not in delta.shapes or (kept is not None and key not in kept):
                continue
            if delta.at(key, rules) is not None and on.at(key, rules) is not None:
                hooks.callback(module.register_forward_hook(watch(key)).remove)
        _, first = next(examples.batches(min(batch, 32)))
        with torch.no_grad():
            velocity(model, first, Arithmetic(live.pipe._execution_device, model.dtype))
    rows = [
        {**names_of(key, delta.family), "weights": weights, "flow": moved / size if size else math.nan}
        for key, (moved, size, weights) in found.items()
        if weights > 0
    ]
    return pd.DataFrame(rows, columns=_TENSORS)


_TENSORS = ["tensor", "part", "block", "module", "weights", "flow"]


def _no_tensors() -> pandas.DataFrame:
    import pandas as pd

    return pd.DataFrame(columns=_TENSORS)

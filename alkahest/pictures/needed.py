"""The multiplier that a delta needs: on weights alone by one of several bases, or by what pictures say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from alkahest.algebra.deltas import Delta
from alkahest.algebra.weights import Weights, ends
from alkahest.engine.events import Event, in_turn, result_of
from alkahest.errors import AlgebraError, refuse_unknown_options
from alkahest.measure.bases import multiplier_of, sort_matrices, target_of, weight_bases
from alkahest.measure.concentration import strongest
from alkahest.measure.multiplier import Multiplier
from alkahest.measure.placed import not_protected, require_delta
from alkahest.measure.spectrum import stream_delta_spectra
from alkahest.measure.table import stream_delta_table
from alkahest.pictures.by_pictures import multiplier_by, stream_curve
from alkahest.pictures.evidence import PictureOptions
from alkahest.pictures.settings import SHIFT

if TYPE_CHECKING:
    import pandas


@refuse_unknown_options
def needed_multiplier(
    delta: Delta,
    on: Weights | None = None,
    basis: str | None = None,
    target: float | None = None,
    reference: Delta | None = None,
    dtype: str | None = None,
    *,
    base: Weights | None = None,
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
    storage: str | None = None,
    offload: bool = False,
    device: str = "cpu",
    threads: int | None = None,
) -> Multiplier:
    """The k with which ``on + k * delta`` takes effect: by pictures, or on weights alone by one of several bases.

    **By pictures**, the default where ``prompts`` or ``pictures`` are given: the variant draws ``count`` pictures of
    the ``prompts``, or ``pictures`` are given; the bridge draws as many of ``ordinary`` prompts. All are mixed with
    fixed noise at three levels, and the flow's loss (Lipman et al. 2023, arXiv:2210.02747) is measured over k, first by
    doubling and then around the minimum. Recommended is the minimum times ``cfg``, at most twice it: guidance draws
    best there (experiments/17-which-multiplier). A delta that does not come over gets 0 and the reason. Curves are
    remembered (`cached`).

    On the real model plan for the transformer (12.3 GB in bf16, 6.2 GB with ``storage="fp8_e4m3fn"``) and text encoder
    and VAE beside it (8.4 GB, or on the CPU with ``offload=True``), which fits 24 GB (a plan: no card was at hand; on a
    CPU, all 6.15 billion parameters made up and one small picture of each kind, it peaked at 8.4 GB). In time,
    evaluations of the model: 1152 to draw 48 pictures in 12 steps with guidance, and about 1500 to 2200 for their
    losses at nine to fourteen k (1512 counted for cyan on TB-1).

    **On weights**, else: norms are over the matrices that ``on`` does not protect and that the delta changes by more
    than rounding of the variant's file. Where a delta is longer than the basis asks for it says nothing: the number is
    then 1, and says so, unless the ``target`` was asked for. Nobody published the formula of the article's own node.

    Parameters
    ----------
    delta : Delta
        What is to be added, a difference of two models or a LoRA.
    on : Weights, optional
        What it is to be added to, by default its base.
    basis : str, optional
        ``pictures``; or on weights ``relative``, which reaches ``target`` of the bridge's norm, ``reference``, the
        magnitude of another delta that is known to work, ``survival``, which outlives rounding, or ``bridge``, a
        diagnostic: `alkahest.measure.bases.BASES`. By default ``pictures`` where some are given, else ``relative``.
    target : float, optional
        Of ``relative``, 0.02 unless it is given.
    reference : Delta, optional
        Of ``reference``.
    dtype : str, optional
        By pictures that of the arithmetic; of ``survival`` what is rounded to, by default the bridge's own.
    base : Weights, optional
        For a delta that does not say what it is a difference from (a LoRA, a sum): the model that it was made for.
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
    storage : str, optional
        Of what the transformer holds, as in `pipeline`.
    device : str, default "cpu"
        Where models run: ``cpu``, ``cuda`` or ``mps``.
    offload : bool, default False
        As in `LiveModel`.
    threads : int, optional
        On weights.

    Returns
    -------
    Multiplier
        A float with its basis and formula, ``range`` (from resampling the pictures), ``curve`` (the losses of both
        sets), every other basis, and warnings.

    Raises
    ------
    AlgebraError
        For a delta that is exactly zero, protected everywhere or none of a known base, and for options of the other
        kind of basis.
    MismatchError
        For pictures without captions.
    NonFiniteError
        If a model says NaN.
    UnsupportedError
        If memory is short, with what would fit.

    Examples
    --------
    >>> k = ak.needed_multiplier(variant - base, on=bridge, prompts=prompts, count=3, steps=4)
    >>> saved = (bridge.protect("refiner") + float(k or 1) * (variant - base)).save("merged.safetensors")
    >>> by_norms = ak.needed_multiplier(variant - base, on=bridge)
    """
    found: Multiplier = result_of(
        stream_needed_multiplier(
            delta,
            on,
            basis,
            target,
            reference,
            dtype,
            base=base,
            prompts=prompts,
            pictures=pictures,
            ordinary=ordinary,
            components=components,
            count=count,
            seed=seed,
            steps=steps,
            cfg=cfg,
            shift=shift,
            width=width,
            height=height,
            batch=batch,
            memory=memory,
            storage=storage,
            offload=offload,
            device=device,
            threads=threads,
        ),
        "needed_multiplier",
    )
    return found


@refuse_unknown_options
def stream_needed_multiplier(
    delta: Delta,
    on: Weights | None = None,
    basis: str | None = None,
    target: float | None = None,
    reference: Delta | None = None,
    dtype: str | None = None,
    *,
    base: Weights | None = None,
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
    storage: str | None = None,
    offload: bool = False,
    device: str = "cpu",
    threads: int | None = None,
) -> Iterator[Event]:
    """`needed_multiplier` as a generator of events."""
    options = PictureOptions(
        prompts=prompts,
        pictures=pictures,
        ordinary=ordinary,
        components=components,
        count=count,
        seed=seed,
        steps=steps,
        cfg=cfg,
        shift=shift,
        width=width,
        height=height,
        batch=batch,
        memory=memory,
        storage=storage,
        device=device,
        offload=offload,
    )
    if basis is None:
        basis = "relative" if prompts is None and pictures is None else "pictures"
    for one in (delta, reference):
        if one is not None:
            require_delta("needed_multiplier", one)
    if on is not None and not isinstance(on, Weights):
        raise AlgebraError(
            "needed_multiplier", "on= is the model that the delta is added to", found=type(on).__name__, fix="on=bridge"
        )
    on = ends(delta)[1] if on is None else on
    running = {"device": device, "threads": threads}
    if basis == "pictures":
        _require_unset(basis, {"target": target, "reference": reference, "dtype": dtype})
        return _by_pictures(delta, on, base, options.require("needed_multiplier"), running)
    _require_unset(basis, {"base": base, **options.set_apart_from(device=device)})
    target_of(basis, target)
    if (basis == "reference") != (reference is not None):
        what = (
            "this basis compares with a delta that is known to work"
            if reference is None
            else "a reference is for its basis"
        )
        fix = "name one as the reference" if reference is None else "the basis 'reference'"
        raise AlgebraError("needed_multiplier", what, fix=fix)
    return _by_weights(delta, on, basis, target, reference, dtype, running)


def _by_pictures(
    delta: Delta, on: Weights | None, base: Weights | None, options: PictureOptions, running: dict[str, Any]
) -> Iterator[Event]:
    if on is None:
        raise AlgebraError("needed_multiplier", "what is the delta added to?", found=delta.text(), fix="on=bridge")
    for event in stream_delta_table(delta, on, **running):
        table = event.result
        yield event.moved(event.done, 20 * event.total)
    matrices = sort_matrices(table, not_protected(delta, on), or_vectors=True)
    scale = weight_bases(matrices)["relative"]
    for event in stream_curve(delta, on, base, scale, options):
        yield event.moved(event.total + 19 * event.done, 20 * event.total)
    curve, notes = event.result
    on_its_base = on is ends(delta)[1]
    if on_its_base:
        notes = (*notes, "added to its own base, where k = 1 is the variant: on= is the bridge")
    yield Event(event.total, event.total, "done", multiplier_by(curve, notes, matrices, options, on_its_base))


def _by_weights(
    delta: Delta,
    on: Weights | None,
    basis: str,
    target: float | None,
    reference: Delta | None,
    dtype: str | None,
    running: dict[str, Any],
) -> Iterator[Event]:
    added = not_protected(delta, on)
    tables: list[pandas.DataFrame] = []
    deltas = [one for one in (delta, reference) if one is not None]
    before = 0
    for event in in_turn([stream_delta_table(one, on, 1.0, dtype, **running) for one in deltas], lambda *all: all):
        before, tables = event.total, event.result
        yield event.moved(event.done, event.total)
    names = strongest(sort_matrices(tables[0], added).counted)
    for event in stream_delta_spectra(delta.only(", ".join(names)), on, 8, **running):
        spectra = event.result
        yield event.moved(before + event.done, before + event.total)
    spectra = spectra[spectra.tensor.isin(names)]
    found = multiplier_of(tables[0], basis, target, tables[1] if reference is not None else None, added, spectra)
    yield Event(before + event.total, before + event.total, "done", found)


def _require_unset(basis: str, given: dict[str, Any]) -> None:
    """Raise AlgebraError for options that would mean nothing to a basis."""
    told = {"base": "base (on the command line --made-for)"}
    if named := [told.get(name, name) for name, value in given.items() if value is not None]:
        other = "one on weights, such as relative" if basis == "pictures" else "pictures, given or drawn of prompts"
        raise AlgebraError(
            "needed_multiplier",
            f"{', '.join(named)} mean{'s' if len(named) == 1 else ''} nothing to the basis {basis}",
            fix=f"leave out, or take another basis: {other}",
        )

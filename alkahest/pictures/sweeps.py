"""Grids of pictures over named scalars and sampling settings: cached cells, any executor, one table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from alkahest.engine.events import Event, result_of
from alkahest.engine.workers import spread
from alkahest.errors import AlkahestError, MismatchError, unknown
from alkahest.files.cache import KINDS, cache_folder
from alkahest.files.hashes import blake3_of
from alkahest.files.whole import write_file
from alkahest.pictures.live import LiveModel
from alkahest.pictures.quality import picture_measures
from alkahest.pictures.sampler import sample
from alkahest.pictures.sheet import contact_sheet, png_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

SETTINGS = ("steps", "cfg", "shift", "schedule", "cfg_normalization", "negative_prompt", "width", "height")

_SMALL = 128  # pixels, of a picture in a sheet that fills


@dataclass(frozen=True)
class Cell:
    """One picture to draw."""

    scalars: Mapping[str, float]
    settings: Mapping[str, Any]
    prompt: str
    seed: int
    path: Path

    @property
    def row(self) -> dict[str, Any]:
        return {**self.scalars, **self.settings, "prompt": self.prompt, "seed": self.seed}


class Cells(pd.DataFrame):  # type: ignore[misc]
    """The table of a sweep: a DataFrame with a row a picture, which can show itself as a contact sheet."""

    @property
    def _constructor(self) -> type[Cells]:
        return Cells

    def contact_sheet(
        self,
        rows: str | Sequence[str] | None = None,
        columns: str | Sequence[str] | None = None,
        size: int | None = None,
    ) -> Image:
        """Pictures side by side, labelled; ``rows`` and ``columns`` name columns of the table.

        By default one row a prompt and seed and one column a setting. A cell that failed is grey and
        says so. ``size`` is the width of a picture in pixels, by default at least 128.
        """
        down = [rows] if isinstance(rows, str) else list(rows or ("prompt", "seed"))
        varying = [name for name in self.columns[: list(self.columns).index("seed")] if self[name].nunique() > 1]
        across = [columns] if isinstance(columns, str) else list(columns or [v for v in varying if v not in down])
        return contact_sheet(self, [d for d in down if len(down) == 1 or self[d].nunique() > 1], across, size)


def sweep(
    live: LiveModel,
    prompts: str | Sequence[str],
    over: Mapping[str, Sequence[Any]],
    *,
    seeds: Sequence[int] = (0,),
    executor: Executor | None = None,
    folder: str | Path | None = None,
    batch: int = 4,
    steps: int | None = None,
    cfg: float | None = None,
    shift: float | None = None,
    schedule: str | None = None,
    cfg_normalization: float | None = None,
    negative_prompt: str | None = None,
    width: int | None = None,
    height: int | None = None,
    **scalars: float,
) -> Cells:
    """Draw every combination of values.

    A cell that was drawn before is not drawn again, so a sweep that was stopped goes on. One that fails has its reason
    in the column ``error``, and the rest goes on.

    Parameters
    ----------
    live : LiveModel
        The model, with the named scalars that are moved.
    prompts : str or list of str
        What each cell draws, one picture each.
    over : mapping of str to list
        Values for named scalars of the model (LoRA strengths too) and sampling settings (``steps``, ``cfg``, ``shift``,
        ``schedule``, ``cfg_normalization``, ``negative_prompt``, ``width``, ``height``).
    seeds : list of int, default (0,)
        Of the pictures: each prompt is drawn once with each.
    executor : concurrent.futures.Executor, optional
        dask's ``client.get_executor()`` is one.
    folder : str or path, optional
        For the pictures, by default in the user's cache.
    batch : int, default 4
        How many are drawn at once.
    steps : int, optional
        Steps of each picture, by default those of `sample`, as for the rest.
    cfg : float, optional
        Guidance; 1 is none.
    shift : float, optional
        Of the noise levels.
    schedule : str, optional
        ``diffusers`` or ComfyUI's ``simple``.
    cfg_normalization : float, optional
        Most that guidance may make a prediction's norm, in norms of the unguided one; 0 is no limit.
    negative_prompt : str, optional
        Works above cfg 1 only.
    width, height : int, optional
        Settings that stay, by default those of `sample`.
    scalars : float
        Named scalars that stay, such as ``k=5``.

    Returns
    -------
    Cells
        A DataFrame with a row a picture: values, seed, measures, path; ``contact_sheet`` shows them.

    Raises
    ------
    UnknownNameError
        For a name that is neither a scalar nor a setting, before anything is drawn.

    Examples
    --------
    >>> table = ak.sweep(live, ["a red ball at night"], over={"k": [0, 5], "cfg": [1, 2]}, steps=4)
    >>> sheet = table.contact_sheet(rows="cfg", columns="k")
    """
    cells: Cells = result_of(
        stream_sweep(
            live,
            prompts,
            over,
            seeds=seeds,
            executor=executor,
            folder=folder,
            batch=batch,
            steps=steps,
            cfg=cfg,
            shift=shift,
            schedule=schedule,
            cfg_normalization=cfg_normalization,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            **scalars,
        ),
        "sweep",
    )
    return cells


def stream_sweep(
    live: LiveModel,
    prompts: str | Sequence[str],
    over: Mapping[str, Sequence[Any]],
    *,
    seeds: Sequence[int] = (0,),
    executor: Executor | None = None,
    folder: str | Path | None = None,
    batch: int = 4,
    steps: int | None = None,
    cfg: float | None = None,
    shift: float | None = None,
    schedule: str | None = None,
    cfg_normalization: float | None = None,
    negative_prompt: str | None = None,
    width: int | None = None,
    height: int | None = None,
    **scalars: float,
) -> Iterator[Event]:
    """`sweep` as a generator of events, one per finished cell."""
    if batch < 1:
        raise AlkahestError("sweep", "batch must be at least 1", found=batch)
    place = Path(folder) if folder is not None else cache_folder() / "sweeps"
    settings = settings_given(steps, cfg, shift, schedule, cfg_normalization, negative_prompt, width, height)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    cells = cells_of(live, texts, over, seeds, {**settings, **scalars}, place)
    return _events(live, cells, executor, batch)


def _events(live: LiveModel, cells: list[Cell], executor: Executor | None, batch: int) -> Iterator[Event]:
    records: dict[Path, dict[str, Any]] = {}
    before = live.params

    def sheet() -> Image:
        return _table_of(cells, records).contact_sheet(size=_SMALL)

    try:
        for cell, record in draw_cells(live, cells, executor, batch):
            records[cell.path] = record
            said = ", ".join(f"{k}={v}" for k, v in cell.row.items())
            yield Event(len(records), len(cells), said, so_far=sheet)
    finally:
        live.set(before)
    yield Event(len(cells), len(cells), "done", _table_of(cells, records))


def _table_of(cells: Sequence[Cell], records: Mapping[Path, Mapping[str, Any]]) -> Cells:
    """The table of a sweep, also before all of its cells are there."""
    waits = {"path": None, "error": "not drawn yet"}
    return Cells([cell.row | dict(records.get(cell.path, waits)) for cell in cells])


def settings_given(*values: Any) -> dict[str, Any]:
    """Those of `SETTINGS` that were given, by name; None stands for one that was not."""
    return {name: value for name, value in zip(SETTINGS, values, strict=True) if value is not None}


def require_live(live: object, operation: str) -> None:
    """Raise MismatchError for anything that is no live model."""
    if not isinstance(live, LiveModel):
        fix = "ak.LiveModel(expression, components)"
        raise MismatchError(operation, "a LiveModel is needed", found=type(live).__name__, fix=fix)


def require_names(names: Iterable[str], known: Mapping[str, float], operation: str) -> None:
    """Raise UnknownNameError for what is neither one of a live model's scalars nor a sampling setting."""
    for name in names:
        if name not in known and name not in SETTINGS:
            raise unknown(operation, "no such named scalar or setting", name, [*known, *SETTINGS])


def cells_of(
    live: LiveModel,
    prompts: list[str],
    over: Mapping[str, Sequence[Any]],
    seeds: Sequence[int],
    fixed: Mapping[str, Any],
    folder: Path,
    operation: str = "sweep",
) -> list[Cell]:
    """A cell for every combination of axes, prompts and seeds. UnknownNameError for other names."""
    require_live(live, operation)
    known = live.params
    require_names([*over, *fixed], known, operation)
    axes = {name: [values] if isinstance(values, str) else list(values) for name, values in over.items()}
    if empty := [name for name, values in axes.items() if not values]:
        raise AlkahestError(operation, "an axis has no values", found=empty[0])
    identity = identity_of(live)
    cells = []
    for values in product(*axes.values()):
        chosen = {**known, **fixed, **dict(zip(axes, values, strict=True))}
        scalars = {name: float(value) for name, value in chosen.items() if name in known}
        settings = {name: value for name, value in chosen.items() if name in SETTINGS}
        for prompt, seed in product(prompts, seeds):
            text = json.dumps([KINDS["sweeps"].format(), identity, scalars, settings, prompt, seed], sort_keys=True)
            name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
            cells.append(Cell(scalars, settings, prompt, int(seed), folder / f"{name}.png"))
    return cells


def draw_cells(
    live: LiveModel, cells: list[Cell], executor: Executor | None, batch: int
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Every cell with its record, those that are kept already first; one batch after the other, or on an executor."""
    todo: dict[Path, Cell] = {}
    for cell in cells:
        record = _recall(cell.path)
        if record is None:
            todo[cell.path] = cell
        else:
            yield cell, record
    groups: dict[str, list[Cell]] = {}
    for cell in todo.values():
        groups.setdefault(repr((cell.scalars, cell.settings)), []).append(cell)
    batches = [group[n : n + batch] for group in groups.values() for n in range(0, len(group), batch)]
    if executor is None:
        for chosen in batches:
            yield from _keep(chosen, draw(live, chosen))
        return
    for number, drawn in spread(executor, draw, {number: (live, chosen) for number, chosen in enumerate(batches)}):
        yield from _keep(batches[number], drawn)


def draw(live: LiveModel, cells: Sequence[Cell]) -> list[tuple[bytes, dict[str, Any]]]:
    """Draw cells that share all but prompt and seed: PNG bytes and a record each. Runs in any process."""
    with live.lock:
        try:
            live.set(cells[0].scalars)
            settings = {"negative_prompt": "", **cells[0].settings}
            seeds = [cell.seed for cell in cells]
            run = sample(live, [cell.prompt for cell in cells], seed=seeds, batch=len(cells), **settings)
            return [(png_bytes(image), _measures(image)) for image in run.images]
        except (AlkahestError, ValueError, RuntimeError) as error:
            if len(cells) == 1:
                return [(b"", {"error": str(error).replace("\n", "; ")})]
    return [draw(live, [cell])[0] for cell in cells]  # so that one bad cell does not take its neighbours along


def _measures(image: Image) -> dict[str, Any]:
    return {**picture_measures(image).iloc[0].to_dict(), "error": None}


def _keep(
    cells: Sequence[Cell], drawn: Sequence[tuple[bytes, dict[str, Any]]]
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    for cell, (png, record) in zip(cells, drawn, strict=True):
        if png:  # a failure is not kept: it is tried again next time
            cell.path.parent.mkdir(parents=True, exist_ok=True)
            write_file(cell.path, png)
            kept = {"record": record, "picture": _digest(png)}
            write_file(cell.path.with_suffix(".json"), json.dumps({**kept, "sum": _sum_of(cell.path, kept)}).encode())
        yield cell, {**record, "path": str(cell.path) if png else None}


def _recall(path: Path) -> dict[str, Any] | None:
    """What is kept of a cell, if record and picture are both whole."""
    try:
        found = json.loads(path.with_suffix(".json").read_bytes())
        kept = {name: found[name] for name in ("record", "picture")}
        if found["sum"] != _sum_of(path, kept) or kept["picture"] != _digest(path.read_bytes()):
            return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return {**kept["record"], "path": str(path)}


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _sum_of(path: Path, kept: Mapping[str, Any]) -> str:
    return _digest(json.dumps([path.stem, kept], sort_keys=True).encode())


def identity_of(live: LiveModel) -> list[str]:
    """What pictures depend on beside a cell's own values: inputs, expression, components, dtype."""
    bare = live.expression.bind(**dict.fromkeys(live.expression.params, 0.0))
    hashes = [digest for leaf in bare.leaves() for digest in blake3_of(leaf.files)]
    parts = [
        _fingerprint(live.pipe.text_encoder),
        _fingerprint(live.pipe.vae),
        _fingerprint(live.pipe.transformer, ".lora_"),
    ]
    return [
        bare.text(),
        *bare.definitions(),
        *hashes,
        *parts,
        live.pipe.tokenizer.chat_template or "",
    ]


def _fingerprint(module: Any, among: str = "") -> str:
    """A hash of a model's configuration and of a few numbers of each tensor: quick, and enough to tell models apart."""
    found = hashlib.blake2b(str(module.config).encode(), digest_size=16)
    for name, tensor in module.state_dict().items():
        # The transformer's own numbers follow from the expression and change while a sweep runs.
        values = tensor.flatten()[: 64 if among in name else 0]
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {values.float().cpu().tolist()}".encode())
    return found.hexdigest()

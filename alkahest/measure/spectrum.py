"""The shape of a delta, tensor by tensor: singular values, ranks, rows, and sizes beside the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from alkahest.algebra.deltas import Delta
from alkahest.algebra.expression import require_same
from alkahest.algebra.weights import Weights, ends
from alkahest.engine.evaluate import evaluate, why_nonfinite
from alkahest.engine.events import Event, result_of
from alkahest.engine.options import Options
from alkahest.engine.readable import Workspace
from alkahest.engine.scalars import Rules
from alkahest.engine.terms import Term
from alkahest.engine.workers import Run, blocks, place_of
from alkahest.errors import AlgebraError, refuse_unknown_options
from alkahest.measure.remembered import Kind, stream_table
from alkahest.measure.table import names_of
from alkahest.measure.tally import sum_of_squares
from alkahest.model import seeded
from alkahest.model.families import Family

if TYPE_CHECKING:
    import pandas

# Column -> what it is, beside the names that a delta table has. d is the delta's matrix, w the weight's, s the
# singular values of d in falling order, m and n its sides, F its Frobenius norm.
SPECTRUM = {
    "singular_values": "the leading s",
    "spectral_norm": "s1, the most that d stretches a vector by",
    "delta_norm": "F",
    "stable_rank": "F^2 / s1^2 (Rudelson and Vershynin 2007)",
    "effective_rank": "exp(entropy of s / sum(s)) (Roy and Vetterli 2007); if only the leading s are known, the "
    "most it can be: what is left of F^2 is taken to be spread evenly",
    "noise_edge": "F / sqrt(m n) * (sqrt(m) + sqrt(n)): the s1 of noise with this norm (Marchenko and Pastur 1967)",
    "above_edge": "s1 / noise_edge: about 1 for noise (0.95 where s is found by iteration), more for a change with a "
    "direction",
    "row_norms": "the norm of each row (output) of d",
    "ratios": "how many of |d| / |w| fall into each bin, one an octave from 2^-24 to 2^8, the outer ones taking "
    "the rest; where d or w is 0 in none",
}
KIND = Kind("delta_spectra", 1, SPECTRUM, objects=("singular_values", "row_norms", "ratios"), packages=("torch",))
RATIOS = 2.0 ** np.arange(-24, 9)  # lower edges of the bins, one an octave; the outer ones take the rest
_EXACT_SIDE = 1024  # a matrix with a side up to this is decomposed in full: at most about a second
_POWER = 4  # power iterations: of pure noise, the slowest to fall, s comes out 5 % low (Halko et al. 2011, section 6.3)
_OVERSAMPLED = 10  # more directions than asked for (the same, section 4.2)


@refuse_unknown_options
def delta_spectra(
    delta: Delta,
    on: Weights | None = None,
    values: int = 32,
    seed: int = 0,
    exact: bool = False,
    *,
    device: str = "cpu",
    threads: int | None = None,
) -> pandas.DataFrame:
    """Decompose every matrix of a delta: a DataFrame with a row for each.

    A matrix of 3840 x 10240 takes half a second and 500 MB, in full five seconds and 900 MB.

    Parameters
    ----------
    delta : Delta
        The difference whose singular values are wanted.
    on : Weights, optional
        What the sizes are beside, by default the delta's base.
    values : int, default 32
        How many singular values are found, by seeded randomised iteration (Halko, Martinsson and Tropp 2011).
    seed : int, default 0
        Of that iteration.
    exact : bool, default False
        Find all, in full, as is done where a side is at most 1024.
    device : str, default "cpu"
        What works on it.
    threads : int, optional
        How many, by default all cores.

    Returns
    -------
    pandas.DataFrame
        `SPECTRUM` of `alkahest.measure.spectrum` says what its columns are. Untouched matrices are left out.

    Raises
    ------
    MismatchError
        If tensors do not fit.
    NonFiniteError
        For NaN and infinity.

    Examples
    --------
    >>> spectra = ak.delta_spectra((variant - base).only("layers.0-1"))
    >>> shown = spectra[["tensor", "spectral_norm", "stable_rank", "above_edge"]]
    """
    table: pandas.DataFrame = result_of(
        stream_delta_spectra(delta, on, values, seed, exact, device=device, threads=threads), "delta_spectra"
    )
    return table


@refuse_unknown_options
def stream_delta_spectra(
    delta: Delta,
    on: Weights | None = None,
    values: int = 32,
    seed: int = 0,
    exact: bool = False,
    *,
    device: str = "cpu",
    threads: int | None = None,
) -> Iterator[Event]:
    """`delta_spectra` as a generator of events."""
    run = Run(Options(device=device, threads=threads).require("delta_spectra"))
    if not isinstance(delta, Delta):
        raise AlgebraError("delta_spectra", "a delta is needed", found=type(delta).__name__, fix="variant - base")
    if values < 1:
        raise AlgebraError("delta_spectra", "at least one singular value", found=values)
    if seed and exact:
        fix = "leave the seed out, or exact=True"
        raise AlgebraError("delta_spectra", "exact spectra have no seed", found=f"seed={seed}", fix=fix)
    on = ends(delta)[1] if on is None else on
    if on is not None:
        require_same("delta_spectra", on, delta)
    return stream_table(KIND, [delta, on], [values, seed, exact], run, lambda: _tasks(delta, on, values, seed, exact))


def _tasks(delta: Delta, on: Weights | None, values: int, seed: int, exact: bool) -> list[_Task]:
    rules, tasks = Rules(), []
    for key, shape in delta.shapes.items():
        found = delta.at(key, rules)
        if found is not None and len(shape) == 2 and min(shape) > 1:
            against = None if on is None else on.at(key, rules)
            tasks.append(_Task(key, delta.family, shape, found, against, min(values, *shape), seed, exact))
    return tasks


def randomised_svd(matrix: Tensor, rank: int, seed: int, key: str) -> tuple[Tensor, Tensor, Tensor]:
    """The leading ``rank`` singular vectors and values (U, S, V) of a float32 matrix, seeded.

    >>> u, s, v = randomised_svd(matrix, 16, seed=0, key="layers.0")  # matrix is about u * s @ v.T

    Randomised subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4). The start is a function
    of the seed and ``key``. Falls back to the full decomposition where that is no more work.
    """
    rows, columns = matrix.shape
    width = min(rank + _OVERSAMPLED, rows, columns)
    if 4 * width > min(rows, columns):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank].T
    # Any start that is not orthogonal to the answer does; signs are as good as normal numbers.
    bits = seeded.bits(seed, "spectrum", key, 0, columns * width)
    start = torch.from_numpy((bits & 1).astype(np.float32)).to(matrix.device).view(columns, width) * 2 - 1
    basis = torch.linalg.qr(matrix @ start)[0]
    for _ in range(_POWER):
        basis = torch.linalg.qr(matrix.T @ basis)[0]
        basis = torch.linalg.qr(matrix @ basis)[0]
    u, s, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vt[:rank].T


def singular_values(matrix: Tensor) -> np.ndarray[Any, Any]:
    """All of them, falling, to 1e-8 of the largest: roots of the eigenvalues of the smaller Gram matrix in float64."""
    wide = (matrix.cpu() if matrix.device.type == "mps" else matrix).double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    squares: np.ndarray[Any, Any] = torch.linalg.eigvalsh(gram).flip(0).clamp_(min=0).cpu().numpy()
    values: np.ndarray[Any, Any] = np.sqrt(squares)
    return values


def effective_rank(values: np.ndarray[Any, Any], norm: float, sides: int) -> float:
    """exp(entropy of s / sum(s)) of singular values; what they lack of ``norm`` is spread over the rest of
    ``sides``.
    """
    known = values[values > 0].astype(np.float64)
    left, missing = norm**2 - float((known**2).sum()), sides - len(values)
    if missing > 0 and left > 1e-6 * norm**2:
        known = np.append(known, np.full(missing, math.sqrt(left / missing)))
    shares = known / known.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def matrix_of(term: Term, shape: tuple[int, ...], workspace: Workspace) -> Tensor:
    """One whole tensor in float32, computed block by block where its term allows."""
    values = torch.empty(math.prod(shape), dtype=torch.float32, device=workspace.device)
    for start, stop in blocks(term, values.numel()):
        evaluate(term, start, stop, values[start:stop], workspace)
    return values.view(shape)


@dataclass(frozen=True)
class _Task:
    key: str
    family: Family
    shape: tuple[int, ...]
    delta: Term
    on: Term | None
    values: int
    seed: int
    exact: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape)

    @property
    def place(self) -> tuple[int, int]:
        return place_of(self.delta)

    def rows(self, run: Run, workspace: Workspace) -> list[dict[str, Any]]:
        with run.alone():
            row = _row(self, workspace)
        return [row] if row else []


def _row(task: _Task, workspace: Workspace) -> dict[str, Any]:
    matrix = matrix_of(task.delta, task.shape, workspace)
    squares = sum_of_squares(matrix.flatten())
    if not math.isfinite(squares):
        raise why_nonfinite(task.delta, task.key, "delta_spectra")
    if squares == 0:
        return {}
    norm, (rows, columns) = math.sqrt(squares), task.shape
    if task.exact or min(task.shape) <= _EXACT_SIDE:
        values = singular_values(matrix)
    else:
        values = randomised_svd(matrix, task.values, task.seed, task.key)[1].double().cpu().numpy()
    edge = norm / math.sqrt(rows * columns) * (math.sqrt(rows) + math.sqrt(columns))
    return {
        **names_of(task.key, task.family),
        "shape": task.shape,
        "singular_values": values[: task.values],
        "spectral_norm": values[0],
        "delta_norm": norm,
        "stable_rank": squares / values[0] ** 2,
        "effective_rank": effective_rank(values, norm, min(task.shape)),
        "noise_edge": edge,
        "above_edge": values[0] / edge,
        "row_norms": torch.linalg.vector_norm(matrix, dim=1).cpu().numpy(),
        "ratios": _ratios(matrix, task.on, task.shape, workspace),
    }


def _ratios(matrix: Tensor, on: Term | None, shape: tuple[int, ...], workspace: Workspace) -> np.ndarray[Any, Any]:
    if on is None:
        return np.zeros(len(RATIOS), np.int64)
    octaves = (matrix / matrix_of(on, shape, workspace)).abs_()
    kept = octaves[torch.isfinite(octaves) & (octaves > 0)]
    bins = torch.floor(torch.log2(kept)).sub_(math.log2(RATIOS[0])).clamp_(0, len(RATIOS) - 1).to(torch.int64)
    return torch.bincount(bins, minlength=len(RATIOS)).cpu().numpy()

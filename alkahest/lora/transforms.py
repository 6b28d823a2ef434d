"""Adapters that turn or stretch the weights they meet, and so are no difference: OFT, BOFT, IA3, DoRA.

    OFT   rotations of blocks of inputs or outputs                  (Qiu et al. 2023, arXiv:2306.07280)
    BOFT  several of them, permuted as a butterfly                  (Liu et al. 2024, arXiv:2311.06243)
    IA3   one factor for each row or column                         (Liu et al. 2022, arXiv:2205.05638)
    DoRA  a LoRA, then the norm of each row or column set anew      (Liu et al. 2024, arXiv:2402.09353)

Rotations are Cayley transforms of skew-symmetric matrices. PEFT rotates inputs, LyCORIS outputs. LyCORIS' ``alpha`` of
an OFT bounds the rotation by ``alpha * rows``, as its own forward has it; ComfyUI leaves the rows out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Read = Callable[[str], Tensor]  # a factor by its role, float32
Given = Mapping[str, float]  # the adapter's settings; "alpha" is the file's


def transform(kind: str, weights: Tensor, read: Read, roles: Mapping[str, tuple[int, ...]], given: Given) -> Tensor:
    """What a whole matrix [rows, columns] becomes; ``roles`` has the shapes of the factors that are there."""
    if weights.dim() == 1:
        return weights * read("ia3").view(-1)
    if kind == "ia3":
        by_row = roles["ia3"][0] == weights.shape[0]
        return weights * read("ia3").view((-1, 1) if by_row else (1, -1))
    if kind == "peft_oft":
        return _input_rotation(weights, read("rotation"), given)
    if kind == "peft_boft":
        return _input_butterfly(weights, read("butterfly").view(roles["butterfly"]), read("stretch"))
    blocks = read("blocks").view(roles["blocks"])
    bound = given["alpha"] * weights.shape[0]
    turned = (
        _output_rotation(weights, blocks, bound) if blocks.dim() == 3 else _output_butterfly(weights, blocks, bound)
    )
    return turned * read("rescale").view(-1, 1) if "rescale" in roles else turned


def problem_with(kind: str, shape: tuple[int, ...], roles: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why an adapter does not fit a matrix, in words; None if it does. From shapes alone."""
    if kind == "ia3" and len(shape) == 1:
        return None if roles["ia3"][0] == shape[0] else "factors fit no side"
    if len(shape) != 2:
        return "it is for matrices"
    rows, columns = shape
    if kind == "ia3":
        return None if roles["ia3"] in ((rows, 1), (1, columns), (rows,), (columns,)) else "factors fit no side"
    if kind == "peft_oft":
        if len(roles["rotation"]) != 2:
            return "rotations are rows of numbers"
        count, numbers = roles["rotation"]
        side = _side_of(numbers)
        fits = side is not None and (count * side == columns or (count == 1 and columns % side == 0))
        return None if fits else f"{count} rotations of {numbers} numbers do not make up {columns} columns"
    if kind == "peft_boft":
        butterfly = roles["butterfly"]
        fits = len(butterfly) == 4 and butterfly[2] == butterfly[3] and butterfly[1] * butterfly[2] == columns
        deep = fits and (butterfly[0] == 1 or (butterfly[2] % 2 == 0 and butterfly[1] % 2 ** (butterfly[0] - 1) == 0))
        stretched = roles.get("stretch") in ((rows, 1), (rows,))
        return None if deep and stretched else f"blocks of {butterfly} do not make up {columns} columns"
    blocks = roles["blocks"]
    fits = len(blocks) in (3, 4) and blocks[-1] == blocks[-2] and blocks[-3] * blocks[-1] == rows
    if len(blocks) == 4:
        fits = fits and blocks[-1] % 2 == 0 and rows % (2 ** (blocks[0] - 1) * blocks[-1]) == 0
    return None if fits else f"blocks of {blocks} do not make up {rows} rows"


def _input_rotation(weights: Tensor, vectors: Tensor, given: Given) -> Tensor:
    side = _side_of(vectors.shape[1])
    assert side is not None  # checked when it met the weights
    skew = vectors.new_zeros(len(vectors), side, side).double()
    above = torch.triu_indices(side, side, 1)
    skew[:, above[0], above[1]] = vectors.double()
    skew = skew - skew.transpose(1, 2)
    if given.get("use_cayley_neumann", True):
        turn = _neumann(skew, int(given.get("num_cayley_neumann_terms", 5)))
    else:
        turn = _cayley(-skew)
    blocks = weights.view(weights.shape[0], -1, side)
    return torch.einsum("rkc,koc->rko", blocks, turn.to(weights).expand(blocks.shape[1], -1, -1)).flatten(1)


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """(I + S) (I - S)^-1 by its series I + 2S + 2S^2 + ..., cut as PEFT cuts it: the last power is taken once."""
    total, power = torch.eye(skew.shape[-1]).to(skew).expand_as(skew).clone(), skew
    highest = terms - 1 if terms < 3 else max(3, terms - 1)
    for number in range(1, highest + 1):
        total = total + (1.0 if number == highest and terms > 2 else 2.0) * power
        power = power @ skew
    return total


def _input_butterfly(weights: Tensor, blocks: Tensor, stretch: Tensor) -> Tensor:
    depth, count, side, _ = blocks.shape
    turns = _cayley(-0.5 * (blocks - blocks.transpose(-1, -2)).double()).to(weights)
    columns = weights.shape[1]
    for number in range(depth):
        order = _butterfly(columns, count // 2**number, side // 2) if depth > 1 else torch.arange(columns)
        parts = weights[:, order.argsort()].view(-1, count, side)
        weights = torch.einsum("rkc,koc->rko", parts, turns[number]).flatten(1)[:, order]
    return weights * stretch.view(-1, 1)


def _butterfly(size: int, blocks: int, run: int) -> Tensor:
    """Runs of each block, the even ones first and then the odd ones."""
    runs = torch.arange(size).view(blocks, -1, run)
    return torch.cat([runs[:, 0::2], runs[:, 1::2]], 1).flatten()


def _output_rotation(weights: Tensor, blocks: Tensor, bound: float) -> Tensor:
    turns = _cayley(_bounded(blocks, bound)).to(weights)
    return torch.einsum("knm,knc->kmc", turns, weights.view(len(blocks), blocks.shape[1], -1)).flatten(0, 1)


def _output_butterfly(weights: Tensor, blocks: Tensor, bound: float) -> Tensor:
    """Stage i turns together rows that lie 2^i half blocks apart."""
    turns = _cayley(_bounded(blocks, bound)).to(weights)
    depth, _, side, _ = blocks.shape
    rows = torch.arange(weights.shape[0])
    for number in range(depth):
        stride = 2**number * (side // 2)
        order = rows.view(-1, 2, stride).transpose(1, 2).flatten()
        turned = torch.einsum("kij,kjc->kic", turns[number], weights[order].view(-1, side, weights.shape[1]))
        weights = turned.flatten(0, 1)[order.argsort()]
    return weights


def _bounded(blocks: Tensor, bound: float) -> Tensor:
    skew = (blocks - blocks.transpose(-1, -2)).double()
    length = float(skew.norm()) + 1e-8
    return skew * (bound / length) if 0 < bound < length else skew


def _cayley(skew: Tensor) -> Tensor:
    """(I + S) (I - S)^-1."""
    one = torch.eye(skew.shape[-1]).to(skew)
    turned: Tensor = torch.linalg.solve(one - skew, one + skew, left=False)
    return turned


def _side_of(numbers: int) -> int | None:
    """The side of a skew-symmetric matrix with so many numbers above its diagonal."""
    side = int((1 + (1 + 8 * numbers) ** 0.5) / 2 + 0.5)
    return side if side * (side - 1) // 2 == numbers and side > 1 else None

"""Weights and their rules; with those of `deltas` this is the algebra:

checkpoint - checkpoint = delta        number * delta = delta       delta +- delta = delta
weights + delta = weights              weights + weights is an error
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from alkahest.algebra.deltas import Delta, Difference, OfDelta, sum_text
from alkahest.algebra.expression import ATOM, SUM, AnyWeights, Expression, Names, in_parentheses, refuse, require_same
from alkahest.engine import terms
from alkahest.engine.events import Event, result_of, watch
from alkahest.engine.load import stream_into
from alkahest.engine.options import Options
from alkahest.engine.readable import Leading, Shapes
from alkahest.engine.save import Saved, stream
from alkahest.engine.scalars import Rules
from alkahest.engine.terms import Term
from alkahest.errors import AlgebraError, MismatchError, refuse_unknown_options
from alkahest.model.keys import Pattern

_NOT_A_DELTA = ": that is for deltas; choose before adding: bridge + (variant - base).only('layers')"


class Weights(AnyWeights):
    """A complete set of tensors: a checkpoint, or what an expression makes of some."""

    _kind = "weights"
    _elsewhere = dict.fromkeys(("only", "without", "everywhere", "scaled"), _NOT_A_DELTA)

    @property
    @abstractmethod
    def leading(self) -> Leading:
        """The checkpoint whose storage, layout and pad tokens the result takes by default."""

    @property
    def shapes(self) -> Shapes:
        return self.leading.shapes

    @property
    def protection(self) -> tuple[str, ...]:
        """Patterns that `protect` was called with."""
        return ()

    @property
    def merges(self) -> bool:
        return True

    def is_protected(self, key: str) -> bool:
        return any(Pattern(text, self.family).matches(key) for text in self.protection)

    def protect(self, pattern: str) -> Weights:
        """Keep these tensors bit for bit, whatever is added later.

        Holds for every delta added and for `lerp`, except deltas marked ``everywhere()``.

        Parameters
        ----------
        pattern : str
            ``refiner``, ``layers.0-9``, ``attention``, ``*norm*``; several with commas.

        Returns
        -------
        Weights

        Raises
        ------
        UnknownNameError
            If an item selects no tensor of this model.

        Examples
        --------
        >>> merged = bridge.protect("refiner") + 171.1 * (variant - base)
        """
        return Protected(self, Pattern(pattern, self.family).require_match(self.shapes, "protect").text)

    def with_parts_of(self, part: Expression) -> Weights:
        """These weights, with the tensors that a partial checkpoint holds in place of their own.

        Protected tensors stay.

        Parameters
        ----------
        part : PartialCheckpoint
            Of `open_part`.

        Returns
        -------
        Weights

        Raises
        ------
        AlgebraError
            For anything but a part.
        MismatchError
            If its tensors do not fit.

        Examples
        --------
        >>> from safetensors.torch import save_file
        >>> save_file({key: turbo[key] for key in turbo if "refiner" in key}, "refiners.safetensors")
        >>> whole = base.with_parts_of(ak.open_part("refiners.safetensors"))
        """
        if not isinstance(part, Expression) or part._kind != "part":
            raise AlgebraError(
                "with_parts_of",
                "a part of a checkpoint is needed",
                found=type(part).__name__,
                fix="ak.open_part(path); of a whole model take a difference: base + (other - base).only('refiner')",
            )
        return Overlay(self, part)

    def __add__(self, other: object) -> Weights:
        if isinstance(other, Delta):
            return Sum(self, other)
        if isinstance(other, Weights):
            raise AlgebraError(
                "weights + weights",
                "two complete models cannot be added: the sum would be twice a model",
                found=f"{self.text()} + {other.text()}",
                fix="average them with ak.lerp(a, b, 0.5), or add a difference: a + k * (b - base)",
            )
        return refuse("+", self, other)

    def __radd__(self, other: object) -> Weights:
        if isinstance(other, Delta):
            return self + other
        return self + self if other == 0 and isinstance(other, int) else refuse("+", self, other)

    def __sub__(self, other: object) -> Any:
        if isinstance(other, Weights):
            return Difference(self, other)
        if isinstance(other, Delta):
            return Sum(self, -other)
        return refuse("-", self, other)

    def __neg__(self) -> NoReturn:
        self.__mul__(-1)

    def __mul__(self, other: object) -> NoReturn:
        raise AlgebraError(
            "number * weights",
            "a complete model cannot be scaled, only a difference can",
            found=f"{other!r} * {self.text()}",
            fix="use ak.lerp or ak.weighted_sum, or scale a delta: k * (a - b)",
        )

    __rmul__ = __truediv__ = __mul__

    @refuse_unknown_options
    def save(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
        layout: str | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        device: str = "cpu",
        comfy_compatible: bool = False,
        max_shard_size: int | str | None = None,
        allow_nonfinite: bool = False,
        metadata: Mapping[str, str] | None = None,
        drop: str | None = None,
        threads: int | None = None,
        executor: Executor | None = None,
    ) -> Saved:
        """Compute the expression and write it as one safetensors file, shards, or a diffusers folder.

        Parameters
        ----------
        path : str or path
            Ending in ``.safetensors`` one file, anything else a new folder. An existing file is replaced in one step at
            the end, and a note of the result says so.
        dtype : str or torch.dtype, optional
            ``fp32 fp16 bf16 fp8_e4m3fn fp8_e5m2``, or scaled fp8 as ``comfy_quant`` or ``scaled_fp8``; fp8 is for the
            Linears of the block stacks, the rest stays bf16. By default as the leading checkpoint stores each tensor.
        layout : str, optional
            ``native`` (default), ``diffusers``, or ``all-in-one`` (default if the leading file is).
        rounding : str, default "nearest"
            ``nearest`` (to even) or ``stochastic`` with ``seed``.
        seed : int, default 0
            Of stochastic rounding.
        device : str, default "cpu"
            ``cpu``, ``cuda`` or ``mps`` for the arithmetic.
        comfy_compatible : bool, default False
            ComfyUI's order of operations and pad tokens, bit for bit on unquantised files.
        max_shard_size : int or str, optional
            Bytes, or text such as ``"5GB"``; makes a folder of shards with an index.
        allow_nonfinite : bool, default False
            Write NaN, infinity and overflow instead of refusing; the result counts them.
        metadata : mapping of str to str, optional
            More text for the file's header, such as a title; not under ``format`` or ``alkahest``.
        drop : str, optional
            A pattern of tensors beside the model (``extras``, and the companions of an all-in-one file) that are not
            carried along, such as ``"model_ema, ema_decay"``.
        threads : int, optional
            Workers; the bytes do not depend on it. By default the processors at hand, at most 8.
        executor : concurrent.futures.Executor, optional
            dask's ``client.get_executor()`` among them; each shard is then a task, with its own ``threads``, that
            writes its own file: on any machine that sees the same folders.

        Returns
        -------
        Saved
            The path, what was written, and notes.

        Raises
        ------
        AlkahestError
            One of its kinds, before anything is written where that is possible; the target is never left half written.

        Examples
        --------
        >>> saved = (bridge.protect("refiner") + 171.1 * (variant - base)).save("merged.safetensors", dtype="bf16")
        >>> shards = base.save("shards/", max_shard_size="2MB")
        """
        saved: Saved = result_of(
            self.stream(
                path,
                dtype=dtype,
                layout=layout,
                rounding=rounding,
                seed=seed,
                device=device,
                comfy_compatible=comfy_compatible,
                max_shard_size=max_shard_size,
                allow_nonfinite=allow_nonfinite,
                metadata=metadata,
                drop=drop,
                threads=threads,
                executor=executor,
            ),
            "save",
        )
        return saved

    @refuse_unknown_options
    def stream(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
        layout: str | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        device: str = "cpu",
        comfy_compatible: bool = False,
        max_shard_size: int | str | None = None,
        allow_nonfinite: bool = False,
        metadata: Mapping[str, str] | None = None,
        drop: str | None = None,
        threads: int | None = None,
        executor: Executor | None = None,
    ) -> Iterator[Event]:
        """Like `save`, as a generator of progress events; closing it stops and removes the partial file.

        Parameters
        ----------
        path : str or path
            Ending in ``.safetensors`` one file, anything else a new folder. An existing file is replaced in one step at
            the end, and a note of the result says so.
        dtype : str or torch.dtype, optional
            ``fp32 fp16 bf16 fp8_e4m3fn fp8_e5m2``, or scaled fp8 as ``comfy_quant`` or ``scaled_fp8``; fp8 is for the
            Linears of the block stacks, the rest stays bf16. By default as the leading checkpoint stores each tensor.
        layout : str, optional
            ``native`` (default), ``diffusers``, or ``all-in-one`` (default if the leading file is).
        rounding : str, default "nearest"
            ``nearest`` (to even) or ``stochastic`` with ``seed``.
        seed : int, default 0
            Of stochastic rounding.
        device : str, default "cpu"
            ``cpu``, ``cuda`` or ``mps`` for the arithmetic.
        comfy_compatible : bool, default False
            ComfyUI's order of operations and pad tokens, bit for bit on unquantised files.
        max_shard_size : int or str, optional
            Bytes, or text such as ``"5GB"``; makes a folder of shards with an index.
        allow_nonfinite : bool, default False
            Write NaN, infinity and overflow instead of refusing; the result counts them.
        metadata : mapping of str to str, optional
            More text for the file's header, such as a title; not under ``format`` or ``alkahest``.
        drop : str, optional
            A pattern of tensors beside the model (``extras``, and the companions of an all-in-one file) that are not
            carried along, such as ``"model_ema, ema_decay"``.
        threads : int, optional
            Workers; the bytes do not depend on it. By default the processors at hand, at most 8.
        executor : concurrent.futures.Executor, optional
            dask's ``client.get_executor()`` among them; each shard is then a task, with its own ``threads``, that
            writes its own file: on any machine that sees the same folders.

        Returns
        -------
        Iterator of Event
            Each with ``done`` and ``total``; the last has the ``result`` of `save`.

        Raises
        ------
        AlkahestError
            As `save`.

        Examples
        --------
        >>> for event in (bridge + 5 * (variant - base)).stream("merged.safetensors"):
        ...     share = event.done / event.total
        """
        options = Options(
            dtype,
            layout,
            rounding,
            seed,
            device,
            comfy_compatible,
            max_shard_size,
            allow_nonfinite,
            threads,
            metadata,
            drop,
        ).require("save")
        return stream(self, path, options, executor)

    @refuse_unknown_options
    def load_into(
        self,
        module: torch.nn.Module,
        *,
        rounding: str = "nearest",
        seed: int = 0,
        device: str = "cpu",
        comfy_compatible: bool = False,
        allow_nonfinite: bool = False,
        threads: int | None = None,
    ) -> int:
        """Compute the expression into the parameters of a live module, in place.

        Parameters
        ----------
        module : torch.nn.Module
            Its names may be native or diffusers'. Values are rounded once to each parameter's dtype, on its device.
        rounding : str, default "nearest"
            To the module's dtype: ``nearest`` (to even) or ``stochastic`` with ``seed``.
        seed : int, default 0
            Of stochastic rounding.
        device : str, default "cpu"
            ``cpu``, ``cuda`` or ``mps`` for the arithmetic.
        comfy_compatible : bool, default False
            ComfyUI's order of operations, bit for bit on unquantised files.
        allow_nonfinite : bool, default False
            Set tensors with NaN or infinity rather than refuse them.
        threads : int, optional
            As in `save`.

        Returns
        -------
        int
            How many tensors it set.

        Raises
        ------
        MismatchError
            Before anything is changed, if names, shapes or dtypes do not fit.

        Examples
        --------
        >>> count = (bridge + 8 * (variant - base)).load_into(pipe.transformer)
        """
        options = Options(
            rounding=rounding,
            seed=seed,
            device=device,
            comfy_compatible=comfy_compatible,
            allow_nonfinite=allow_nonfinite,
            threads=threads,
        ).require("load_into")
        return sum(1 for _ in watch(stream_into(self, module, options), "load_into"))

    def _notes(self) -> list[str]:
        notes = []
        if self.protection:
            kept = [key for key in self.shapes if self.is_protected(key)]
            what = ", ".join(dict.fromkeys(self.protection))
            notes.append(f"protected: {what} ({len(kept)} tensors stay {self.leading.name}'s, bit for bit)")
        return notes + self.protection_notes()

    def protection_notes(self) -> list[str]:
        """What protection leaves out of LoRAs, in words: their names are few, so this is said aloud."""
        return [line for child in self.children if isinstance(child, Weights) for line in child.protection_notes()]


class OfWeights(Weights):
    """Weights made from one model, which leads."""

    weights: Weights

    @property
    def leading(self) -> Leading:
        return self.weights.leading

    @property
    def protection(self) -> tuple[str, ...]:
        return self.weights.protection


@dataclass(frozen=True, repr=False)
class Protected(OfWeights):
    weights: Weights
    pattern: str

    @property
    def protection(self) -> tuple[str, ...]:
        return (*self.weights.protection, self.pattern)

    @property
    def merges(self) -> bool:
        return self.weights.merges

    def at(self, key: str, rules: Rules) -> Term | None:
        return self.weights.at(key, rules)

    def _text(self, names: Names) -> tuple[str, int]:
        return f"{in_parentheses(self.weights, names, ATOM)}.protect({self.pattern!r})", ATOM


@dataclass(frozen=True, repr=False)
class Overlay(OfWeights):
    """Weights with the tensors of a partial checkpoint in place of their own; protected ones stay."""

    weights: Weights
    part: Expression

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, shape in self.part.shapes.items():
            if self.weights.shapes.get(key) != shape:
                raise MismatchError(
                    "with_parts_of",
                    "a tensor of the part does not fit the model",
                    key=key,
                    expected=self.weights.shapes.get(key, "no such tensor"),
                    found=shape,
                    fix="use a part of this model",
                )

    def at(self, key: str, rules: Rules) -> Term | None:
        part = self.part.leaves()[0]
        if key in self.part.shapes and not self.is_protected(key):
            return terms.Source(part, key)
        return self.weights.at(key, rules)

    def _text(self, names: Names) -> tuple[str, int]:
        return f"{in_parentheses(self.weights, names, ATOM)}.with_parts_of({self.part._text(names)[0]})", ATOM


@dataclass(frozen=True, repr=False)
class Sum(OfWeights):
    """Weights plus a delta; protected tensors take nothing of it."""

    weights: Weights
    delta: Delta

    def __post_init__(self) -> None:
        super().__post_init__()
        require_same("weights + delta", self.weights, self.delta)

    def at(self, key: str, rules: Rules) -> Term | None:
        weights = self.weights.at(key, rules)
        if weights is None or (rules.comfy_compatible and key in self.family.pads):
            return weights
        delta = self.delta.at(key, rules, self.is_protected(key))
        if rules.comfy_compatible and delta is not None:
            return terms.Plus(weights, delta)
        return terms.plus(weights, delta)

    def protection_notes(self) -> list[str]:
        lines, rules = [], Rules()
        for leaf in self.delta.leaves() if self.protection else ():
            if isinstance(leaf, Delta):
                kept = [
                    key
                    for key in leaf.shapes
                    if self.is_protected(key)
                    and self.delta.at(key, rules) is not None
                    and self.delta.at(key, rules, True) is None
                ]
                if kept:
                    lines.append(
                        f"{leaf.name}: protection leaves out {len(kept)} of its {len(leaf.shapes)} tensors "
                        f"({', '.join(dict.fromkeys(map(self.family.part_of, kept)))})"
                    )
        return lines + super().protection_notes()

    def _text(self, names: Names) -> tuple[str, int]:
        return sum_text(self.weights, self.delta, names), SUM


def ends(delta: Delta) -> tuple[Weights | None, Weights | None]:
    """The variant and the base that a delta lies between, under its masks and factors; None for a sum of deltas."""
    while isinstance(delta, OfDelta):
        delta = delta.delta
    if not isinstance(delta, Difference):
        return None, None
    variant, base = delta.variant, delta.base
    assert isinstance(variant, Weights)
    assert isinstance(base, Weights)
    return variant, base

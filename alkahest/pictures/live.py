"""A pipeline whose transformer is an expression, rewritten in place when a number in it changes."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, SupportsFloat
from weakref import WeakValueDictionary

import numpy as np
import torch

from alkahest.algebra.expression import require_same
from alkahest.algebra.weights import Weights
from alkahest.engine.events import watch
from alkahest.engine.load import fill, slices
from alkahest.engine.options import Options, byte_count
from alkahest.engine.readable import Bits, Readable, Shapes, Workspace
from alkahest.engine.scalars import Rules, number
from alkahest.engine.terms import Apply, Minus, Plus, Source, Term, Times, is_same
from alkahest.errors import UnsupportedError, refuse_unknown_options, unknown
from alkahest.files.reader import size_text
from alkahest.model.stored import Slice
from alkahest.pictures.pipelines import pipeline
from alkahest.pictures.sampler import set_lora_strengths


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a card or on the CPU, where torch says so by a RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


@contextmanager
def told_out_of_memory(operation: str, fix: str) -> Iterator[None]:
    """Turn running out of memory into an UnsupportedError that says what would fit."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        found = str(error).partition(". ")[0][:160]
        raise UnsupportedError(operation, "there is too little memory for this", found=found, fix=fix) from None


@dataclass(frozen=True)
class Change:
    """What one `LiveModel.set` did."""

    tensors: int  # parameters rewritten
    nbytes: int  # of parameters rewritten
    from_memory: int  # bytes of inputs that were held
    from_disk: int  # bytes of inputs that were read again
    seconds: float  # that it took

    def __repr__(self) -> str:
        source = "all inputs held in memory" if not self.from_disk else f"{size_text(self.from_disk)} read from disk"
        return f"{self.tensors} tensors, {size_text(self.nbytes)} rewritten in {self.seconds:.2f} s, {source}"


class LiveModel:
    """A pipeline that follows the named scalars of an expression.

    `set` recomputes the tensors that the change reaches and no others, from the inputs, so the result equals a fresh
    load of the merged file, bit for bit. ``pipe`` is the `pipeline`. LoRAs loaded into it are named scalars as well, by
    their adapter names: ``live.set({"style": 0.8})``.

    Parameters
    ----------
    expression : Weights
        With named scalars: `param`.
    components : optional
        As in `pipeline`.
    memory : int or str, default "2GB"
        Inputs of such tensors are kept as stored, up to this (bytes, or text); the rest is read again each time.
    dtype, storage : str, optional
        Of the arithmetic and of what the transformer holds, as in `pipeline`.
    device : str, default "cpu"
        Where models run: ``cpu``, ``cuda`` or ``mps``.
    offload : bool, default False
        As in `pipeline`.

    Examples
    --------
    >>> k = ak.param("k", 1.0)
    >>> live = ak.LiveModel(bridge.protect("refiner") + k * (variant - base))
    >>> change = live.set({"k": 5})
    >>> image = ak.sample(live, "a red ball at night", steps=4).images[0]
    """

    @refuse_unknown_options
    def __init__(
        self,
        expression: Weights,
        components: Any = None,
        *,
        memory: int | str = "2GB",
        dtype: str | None = None,
        storage: str | None = None,
        device: str = "cpu",
        offload: bool = False,
    ) -> None:
        self.budget = byte_count(memory, "memory")
        options = {"dtype": dtype, "storage": storage, "device": device, "offload": offload}
        self.pipe = pipeline(expression, components, dtype=dtype, storage=storage, device=device, offload=offload)
        self.expression = expression
        self.lock = threading.RLock()  # held while a picture depends on the parameters as they are
        self._held = _Held(self.budget)
        self._made_of = components, options
        self._token = uuid.uuid4().hex
        _here[self._token] = self

    def __reduce__(self) -> tuple[Any, ...]:
        # A process that is sent a live model builds its own from the files, once.
        if self._loras():
            raise UnsupportedError(
                "LiveModel",
                "LoRAs loaded into a pipeline cannot be sent to another process",
                found=", ".join(self._loras()),
            )
        components, options = self._made_of
        return _receive, (self._token, self.expression, components, self.budget, options)

    @property
    def params(self) -> dict[str, float]:
        """Named scalars and LoRA strengths as they are now."""
        return {**self.expression.params, **self._loras()}

    @property
    def held_bytes(self) -> int:
        """Bytes of inputs held in memory, at most the budget."""
        return self._held.nbytes

    def set(self, values: Mapping[str, SupportsFloat] | None = None, **named: SupportsFloat) -> Change:
        """Move named scalars and LoRA strengths; those not named stay.

        Parameters
        ----------
        values : mapping of str to float, optional
            New value by name of a scalar or LoRA.
        named : float
            The same by keyword.

        Returns
        -------
        Change
            What was rewritten, which prints itself.

        Raises
        ------
        UnknownNameError
            If there is no such name; nothing changes then.

        Examples
        --------
        >>> change = live.set({"k": 4})
        >>> change = live.set(k=1)
        """
        given = {name: number(value, "set") for name, value in {**(values or {}), **named}.items()}
        with self.lock:
            loras = self._loras()
            known = {**self.expression.params, **loras}
            for name in given:
                if name not in known:
                    raise unknown("set", "no such named scalar or LoRA", name, known)
            started = time.perf_counter()
            wanted = self.expression.bind(**{name: value for name, value in given.items() if name not in loras})
            change = self._rewrite(wanted)
            if moved := {name: value for name, value in given.items() if name in loras}:
                set_lora_strengths(self.pipe, loras | moved)
            return replace(change, seconds=time.perf_counter() - started)

    def become(self, expression: Weights) -> Change:
        """Take another expression of the same model; as in `set`, a tensor that stays the same is not computed again.

        Parameters
        ----------
        expression : Weights
            With the tensors and shapes of the one that is held; its named scalars take the place of the old
            ones.

        Returns
        -------
        Change
            What was rewritten, which prints itself.

        Raises
        ------
        MismatchError
            If the model would have other tensors or shapes.

        Examples
        --------
        >>> change = live.become(bridge + 5 * (variant - base))   # bit for bit what a fresh load of it gives
        >>> change = live.become(bridge.protect("refiner") + ak.param("k", 1.0) * (variant - base))
        """
        with self.lock:
            require_same("become", self.expression, expression)
            started = time.perf_counter()
            change = self._rewrite(expression)
            return replace(change, seconds=time.perf_counter() - started)

    def _rewrite(self, wanted: Weights) -> Change:
        before, after = self.expression, wanted
        terms: dict[str, Term] = {}
        for key in after.shapes:
            term = after.at(key, Rules())
            if term is not None and not is_same(term, before.at(key, Rules())):
                terms[key] = self._held.through(term)
        targets = slices(after, self.pipe.transformer) if terms else {}
        self._held.start()
        device = str(next(iter(targets.values())).device) if targets else "cpu"
        try:
            for _ in watch(fill(terms, targets, Options(device=device), often=True), "LiveModel"):
                pass
        except BaseException:
            # Half rewritten: put back what was there, so that the model is the old one or the new one.
            old = {key: term for key in terms if (term := before.at(key, Rules())) is not None}
            for _ in fill(old, targets, Options(device=device, allow_nonfinite=True)):
                pass
            raise
        self.expression = wanted
        nbytes = sum(targets[key].nbytes for key in terms)
        return Change(len(terms), nbytes, self._held.from_memory, self._held.from_disk, 0.0)

    def _loras(self) -> dict[str, float]:
        transformer = self.pipe.transformer
        found: dict[str, float] = {}
        for module in transformer.modules():
            scaling = getattr(module, "scaling", None)
            if isinstance(scaling, dict) and hasattr(module, "lora_A"):
                for name in scaling:
                    active = name in module.active_adapters
                    found.setdefault(
                        name, module.scaling[name] / (module.lora_alpha[name] / module.r[name]) if active else 0.0
                    )
        return found

    def __repr__(self) -> str:
        values = ", ".join(f"{name} = {value:g}" for name, value in self.params.items()) or "no named scalars"
        return (
            f"LiveModel: {self.expression.text()}\n  {values}\n  holds {size_text(self.held_bytes)} of inputs, at "
            f"most {size_text(self.budget)}"
        )


_here: WeakValueDictionary[str, LiveModel] = WeakValueDictionary()
_sent: dict[str, LiveModel] = {}  # a worker keeps the one it was sent last


def _receive(token: str, expression: Weights, components: Any, budget: int, options: dict[str, Any]) -> LiveModel:
    if token in _here:
        return _here[token]
    if token not in _sent:
        _sent.clear()
        _sent[token] = LiveModel(expression, components, memory=budget, **options)
    return _sent[token]


class _Held:
    """Inputs kept in memory as their files store them, first come first kept, up to a budget."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self.start()
        self._raw: dict[tuple[Readable, str], torch.Tensor] = {}
        self._readers: dict[Readable, _Holding] = {}
        self._lock = threading.Lock()

    def start(self) -> None:
        self.from_memory = self.from_disk = 0
        self._counted: set[tuple[Readable, str]] = set()

    def through(self, term: Term, known: dict[int, Term] | None = None) -> Term:
        """The same term, its checkpoints read by way of memory; what stands there repeatedly stays one object."""
        known = {} if known is None else known
        if id(term) not in known:
            known[id(term)] = self._through(term, known)
        return known[id(term)]

    def _through(self, term: Term, known: dict[int, Term]) -> Term:
        match term:
            case Source(leaf, key) if leaf.stored(key) is not None:
                return Source(self._readers.setdefault(leaf, _Holding(leaf, self)), key)
            case Times(factor, inner):
                return Times(factor, self.through(inner, known))
            case Plus(left, right):
                return Plus(self.through(left, known), self.through(right, known))
            case Minus(left, right):
                return Minus(self.through(left, known), self.through(right, known))
            case Apply():
                return replace(term, operands=tuple(self.through(operand, known) for operand in term.operands))
            case _:
                return term

    def raw(self, leaf: Readable, key: str) -> torch.Tensor | None:
        """The stored bytes of a tensor if they are held or there is room; None to read it from disk."""
        piece = leaf.stored(key)
        assert piece is not None
        size = piece.nbytes
        with self._lock:
            known = self._raw.get((leaf, key))
            if (leaf, key) not in self._counted:  # a tensor is read in several blocks
                self._counted.add((leaf, key))
                self.from_memory += 0 if known is None else size
                self.from_disk += size if known is None else 0
            fresh = known is None and piece.stored.packed is None and self.nbytes + size <= self.budget
            if fresh:
                self.nbytes += size
        if fresh:  # one worker computes a tensor, so no other asks for it meanwhile
            raw = torch.empty(size, dtype=torch.uint8)
            piece.stored.reader.read_into(raw.numpy().data, piece.offset)
            known = self._raw[leaf, key] = raw
        return known


class _Holding(Readable):
    """What is read through `_Held`."""

    def __init__(self, leaf: Readable, held: _Held) -> None:
        self.leaf, self.held, self.name = leaf, held, leaf.name
        self.files = leaf.files

    @property
    def shapes(self) -> Shapes:
        return self.leaf.shapes

    def stored(self, key: str) -> Slice | None:
        return self.leaf.stored(key)

    def check_finite(self, key: str, operation: str) -> None:
        self.leaf.check_finite(key, operation)

    def read(self, key: str, start: int, stop: int, out: torch.Tensor, workspace: Workspace) -> None:
        raw, piece = self.held.raw(self.leaf, key), self.leaf.stored(key)
        if raw is None or piece is None:
            self.leaf.read(key, start, stop, out, workspace)
        else:
            size = piece.stored.form.itemsize
            piece.stored.decode(raw[start * size : stop * size], piece.start + start, out)

    @contextmanager
    def bits(self, key: str, start: int, stop: int, workspace: Workspace) -> Iterator[Bits]:
        raw = self.held.raw(self.leaf, key)
        if raw is None:
            with self.leaf.bits(key, start, stop, workspace) as found:
                yield found
        else:
            yield raw[2 * start : 2 * stop].numpy().view(np.uint16)

"""Expressions: frozen trees of weights and deltas, of which nothing is computed until one is streamed.

What they have in common is here; what they mean is in `weights` and `deltas`, what they read in `leaves`.
"""

from __future__ import annotations

import html
import keyword
import re
import unicodedata
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self, SupportsFloat

from alkahest.engine.readable import Readable, Shapes
from alkahest.engine.scalars import Param, Rules, Varied, named_in, number
from alkahest.engine.terms import Term, name_leaves
from alkahest.errors import AlgebraError, MismatchError, nearest, printable, unknown
from alkahest.model.families import Family

Names = Mapping[Readable, str]
SUM, PRODUCT, ATOM = 1, 2, 3  # how tightly a text binds
_MAX_SIZE = 5_000
_MAX_DEPTH = 150  # a printed or bound tree takes four Python frames a level


@dataclass(frozen=True, repr=False)
class Expression:
    """What weights and deltas have in common."""

    __array_ufunc__ = None  # so that numpy.float64(2) * delta is ours to answer
    _kind: ClassVar[str]
    _elsewhere: ClassVar[Mapping[str, str]] = {}  # names that only the other kind has -> what to do instead

    def __post_init__(self) -> None:
        if self.depth > _MAX_DEPTH:
            raise AlgebraError("expression", "nested too deeply", expected=f"at most {_MAX_DEPTH} levels")
        if self.size > _MAX_SIZE:
            raise AlgebraError(
                "expression",
                "written out, this expression is too long: something in it stands there again and again",
                expected=f"at most {_MAX_SIZE:,} parts",
                found=f"{self.size:,}",
                fix="save what is used repeatedly, and go on from the file",
            )

    @property
    def children(self) -> tuple[Expression, ...]:
        """Sub-expressions, in order."""
        found: list[Expression] = []
        for item in fields(self):
            value = getattr(self, item.name)
            found += [v for v in (value if isinstance(value, tuple) else [value]) if isinstance(v, Expression)]
        return tuple(found)

    @property
    def depth(self) -> int:
        known = self.__dict__.get("_depth")
        if known is None:
            known = 1 + max((child.depth for child in self.children), default=0)
            object.__setattr__(self, "_depth", known)
        return int(known)

    @property
    def size(self) -> int:
        """How many parts it has when it is written out."""
        known = self.__dict__.get("_size")
        if known is None:
            known = 1 + sum(child.size for child in self.children)
            object.__setattr__(self, "_size", known)
        return int(known)

    @cached_property
    def family(self) -> Family:
        """The family of its models, which is one: see `require_same`."""
        return self.children[0].family

    def leaves(self) -> tuple[Readable, ...]:
        """The distinct checkpoints and LoRAs that this expression reads, in order of appearance."""
        found = dict.fromkeys(leaf for child in self.children for leaf in child.leaves())
        return tuple(found)

    def definitions(self) -> tuple[str, ...]:
        """What tells merge methods apart that this session defined under the same name, as what is remembered must."""
        return tuple(one for child in self.children for one in child.definitions())

    @property
    def params(self) -> dict[str, float]:
        """Named scalars and their values."""
        found: dict[str, float] = {}
        for one in named_in(tuple(self._scalars())):
            if found.setdefault(one.name, one.value) != one.value:
                raise AlgebraError(
                    "param",
                    f"{one.name!r} has two values",
                    found=f"{found[one.name]} and {one.value}",
                    fix="use one default, or two names",
                )
        return found

    def bind(self, **values: SupportsFloat) -> Self:
        """The same expression with named scalars set.

        Parameters
        ----------
        values : float
            By the scalars' names; those not named stay.

        Returns
        -------
        The same kind of expression

        Raises
        ------
        UnknownNameError
            If it has no such scalar.
        AlgebraError
            For what is no finite number.

        Examples
        --------
        >>> merged = bridge + ak.param("k", 1.0) * (variant - base)
        >>> stronger = merged.bind(k=171.1)
        """
        known = self.params
        for name in values:
            if name not in known:
                raise unknown("bind", "no such parameter", name, known)
        return self._bound({name: number(value, "bind") for name, value in values.items()})

    def text(self, names: Names | None = None) -> str:
        """Canonical recipe text.

        Parameters
        ----------
        names : Names, optional
            Of the checkpoints, by default their own.

        Returns
        -------
        str

        Examples
        --------
        >>> (bridge + 5 * (variant - base)).text()
        'bridge + 5 * (variant - base)'
        """
        return self._text(names if names is not None else name_leaves(self))[0]

    def __repr__(self) -> str:
        return printable("\n".join([self.text(), *(f"  {line}" for line in self._notes())]))

    def _repr_html_(self) -> str:
        notes = "".join(f"<div>{html.escape(line)}</div>" for line in self._notes())
        return f"<div><code>{html.escape(self.text())}</code>{notes}</div>"

    if not TYPE_CHECKING:  # a type checker should still see what is not there

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(f"{type(self).__name__} has no {name!r}{self._elsewhere.get(name, '')}")

    @property
    @abstractmethod
    def shapes(self) -> Shapes:
        """Canonical name -> shape of every tensor it can produce."""

    @property
    def is_partial(self) -> bool:
        """Whether its ``shapes`` are some of a model's, as a LoRA's are, rather than all."""
        return False

    @abstractmethod
    def _text(self, names: Names) -> tuple[str, int]: ...

    def _notes(self) -> list[str]:
        return []

    def _scalars(self) -> Iterator[Any]:
        """Its numbers, and tuples of them."""
        for child in self.children:
            yield from child._scalars()

    def _bound(self, values: Mapping[str, float]) -> Self:
        def bound(value: Any) -> Any:
            if isinstance(value, Expression):
                return value._bound(values)
            if isinstance(value, Param):
                return Param(value.name, values.get(value.name, value.value))
            if isinstance(value, Varied):
                return value.bound(values)
            return tuple(bound(item) for item in value) if isinstance(value, tuple) else value

        return replace(self, **{f.name: bound(getattr(self, f.name)) for f in fields(self)})


class AnyWeights(Expression):
    """Weights as far as their differences need to know them."""

    @abstractmethod
    def at(self, key: str, rules: Rules) -> Term | None:
        """The term for one tensor; None if this model does not have it."""


def require_same(operation: str, left: Expression, right: Expression) -> None:
    """Raise MismatchError unless both are about the same tensors; a LoRA's must be among the other's."""
    if left.family is not right.family:
        found = f"{left.text()}: {left.family.title}; {right.text()}: {right.family.title}"
        raise MismatchError(operation, "the models are of different families", found=found, fix="use one family")
    some = [left.is_partial, right.is_partial]
    if not any(some):
        left.family.require_same_tensors(operation, left.shapes, right.shapes, left.text, right.text)
        return
    for key in left.shapes.keys() & right.shapes.keys():
        if left.shapes[key] != right.shapes[key]:
            found = f"{left.text()}: {left.shapes[key]}; {right.text()}: {right.shapes[key]}"
            raise MismatchError(
                operation, "a tensor has different shapes", key=key, found=found, fix="use a LoRA of this model"
            )
    for part, whole, is_part in ((left, right, some[0]), (right, left, some[1])):
        lacking = [key for key in part.shapes if key not in whole.shapes]
        if is_part and not all(some) and lacking:
            raise MismatchError(
                operation,
                f"the LoRA changes {len(lacking)} tensors that the model does not have",
                key=lacking[0],
                found=part.text(),
                fix=f"use a LoRA of this model; {nearest(lacking[0], whole.shapes)}",
            )


def refuse(symbol: str, left: Expression, right: object) -> NoReturn:
    """Raise AlgebraError: these two cannot be joined so."""
    names = name_leaves(*(side for side in (left, right) if isinstance(side, Expression)))

    def kind(side: object) -> str:
        return side._kind if isinstance(side, Expression) else type(side).__name__

    def shown(side: object) -> str:
        return in_parentheses(side, names, PRODUCT) if isinstance(side, Expression) else repr(side)

    if any(isinstance(side, Expression) and side._kind == "part" for side in (left, right)):
        fix = "a part is laid over a whole model: base.with_parts_of(part)"
        raise AlgebraError(f"{kind(left)} {symbol} {kind(right)}", "a part is no model and no difference", fix=fix)
    lora = left.leaves()[0] if left.is_partial and not left.children else None
    raise AlgebraError(
        f"{kind(left)} {symbol} {kind(right)}",
        "this has no meaning",
        found=f"{shown(left)} {symbol} {shown(right)}",
        expected="weights - weights, weights + delta, delta + delta or number * delta",
        fix=f"{lora.name} is a LoRA, which is a difference already" if lora is not None and symbol == "-" else None,
    )


def in_parentheses(expression: Expression, names: Names, least: int) -> str:
    """Its text, in parentheses where it binds less tightly than ``least``."""
    text, level = expression._text(names)
    return text if level >= least else f"({text})"


# Names that say nothing, and those of the hub's cache: blobs and snapshots are called by hashes.
_GENERIC = ("transformer", "diffusion_pytorch_model", "model")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def _in_hub(path: Path) -> str | None:
    """The repository's name of a file in the hub's cache, ``models--OWNER--NAME/snapshots/HASH/...``."""
    folders = [part for part in path.absolute().parts if part.startswith("models--")]
    return folders[-1].rpartition("--")[2] if folders else None


def identifier(source: str | Path) -> str:
    """A valid Python name for a file, as recipes call it."""
    stem = source if isinstance(source, str) else source.name.removesuffix(".safetensors")
    if isinstance(source, Path) and (stem in _GENERIC or _HASH.fullmatch(stem)):
        stem = _in_hub(source) or source.resolve().parent.name
    # Python reads names in recipes in form NFKC, and not every letter or digit may stand in one.
    plain = re.sub(r"\W+", "_", unicodedata.normalize("NFKC", stem))
    name = "".join(letter if f"a{letter}".isidentifier() else "_" for letter in plain).strip("_")
    return name if name.isidentifier() and not keyword.iskeyword(name) else f"m_{name}"

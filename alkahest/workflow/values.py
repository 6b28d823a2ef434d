"""What a MODEL in a graph stands for, as recipe text: weights, a difference, or a sum of models that is neither yet.

ComfyUI adds patches to its first model in the order of the nodes (``comfy/lora.py``, ``calculate_weight``), so the
text is chosen such that ``comfy_compatible`` evaluates it in just that order: ``A + m * (V - B)`` is
``A + (V*m - m*B)``, and ``weighted_sum([V, B, A], [m, -m, 1])`` is ``(V*m - m*B) + A`` with V's pad tokens.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal

from alkahest.algebra.expression import ATOM, PRODUCT, SUM
from alkahest.engine.record import MAX_TEXT
from alkahest.engine.scalars import text_of
from alkahest.errors import RecipeError

WEIGHTS, DELTA, TOTAL = "weights", "a difference", "a sum of models"


# A number, names of further factors, and the text of a difference.
Piece = tuple[Decimal, tuple[str, ...], str]


@dataclass(frozen=True)
class Value:
    """Recipe text with how tightly it binds, what it is, and the models that it adds up, led by the first."""

    text: str
    level: int
    kind: str
    terms: tuple[tuple[str, float], ...] = ()  # for sums of whole models: text of each, and its factor
    scaled: bool = False  # whether the text already has a factor in front
    start: str = ""  # as a person writes it: the model that differences are added to,
    pieces: tuple[Piece, ...] = ()  # and those differences, equal ones not yet taken together

    def __post_init__(self) -> None:
        if len(self.text) > MAX_TEXT:
            raise RecipeError(
                "workflow", "the recipe of this graph is too long", expected=f"at most {MAX_TEXT:,} characters"
            )

    @property
    def plain(self) -> str:
        """The same numbers as a person would write them, with factors multiplied out: other bits, the same model."""
        found: dict[tuple[str, tuple[str, ...]], Decimal] = {}
        for number, names, what in self.pieces:
            found[what, names] = found.get((what, names), Decimal(0)) + number
        text = self.start
        for (what, names), number in found.items():
            if number == 0:
                continue
            if not math.isfinite(float(number)):
                return self.text
            shown = " * ".join([*([] if abs(number) == 1 else [text_of(float(abs(number)))]), *names, what])
            sign = "-" if number < 0 else "+"
            text = f"{text} {sign} {shown}" if text else f"-{shown}" if number < 0 else shown
        return text or self.text

    def in_parentheses(self, least: int) -> str:
        return self.text if self.level >= least else f"({self.text})"


def model(name: str) -> Value:
    return Value(name, ATOM, WEIGHTS, ((name, 1.0),), start=name)


def named_delta(name: str) -> Value:
    return Value(name, ATOM, DELTA, pieces=((Decimal(1), (), name),))


def difference(variant: Value, base: Value, zero: str = "") -> Value:
    """``variant - base``, zero on the tensors that the pattern selects."""
    text = f"{variant.in_parentheses(SUM)} - {base.in_parentheses(PRODUCT)}"
    one, two = variant.plain, base.plain
    plain = f"({one} - {two if two.isidentifier() else f'({two})'})"
    pieces = () if one == two else ((Decimal(1), (), plain),)
    made = Value(text, SUM, DELTA, pieces=pieces)
    return without(made, zero) if zero else made


def without(delta: Value, pattern: str) -> Value:
    pieces = tuple((number, names, f"{what}.without({pattern!r})") for number, names, what in delta.pieces)
    return Value(f"{delta.in_parentheses(ATOM)}.without({pattern!r})", ATOM, DELTA, pieces=pieces)


def times(factor: float | str, delta: Value) -> Value:
    """A multiple of a difference; a second factor is kept apart from the first, because each one rounds."""
    if factor == 1.0:
        return delta
    pieces = tuple(
        (many, (*names, factor), what) if isinstance(factor, str) else (many * Decimal(repr(factor)), names, what)
        for many, names, what in delta.pieces
    )
    if factor == -1.0:
        text = delta.in_parentheses(PRODUCT)
        text = text[1:] if text.startswith("-") else f"-{text}"
        return Value(text, PRODUCT, DELTA, scaled=delta.scaled, pieces=pieces)
    number = factor if isinstance(factor, str) else text_of(factor)
    if delta.scaled:
        text = f"{delta.in_parentheses(ATOM)}.scaled({{'all': {number}}})"
        return Value(text, ATOM, DELTA, scaled=True, pieces=pieces)
    return Value(f"{number} * {delta.in_parentheses(ATOM)}", PRODUCT, DELTA, scaled=True, pieces=pieces)


def plus(left: Value, delta: Value) -> Value:
    """Weights or a difference, and a difference added to it."""
    sign, added = "+", delta.in_parentheses(PRODUCT)
    if delta.level >= PRODUCT and delta.text.startswith("-"):
        sign, added = "-", added[1:]
    text, pieces = f"{left.in_parentheses(SUM)} {sign} {added}", (*left.pieces, *delta.pieces)
    return Value(text, SUM, left.kind, start=left.start, pieces=pieces)


def subtract(first: Value, second: Value, factor: float) -> Value:
    """ModelMergeSubtract: ``first*m - m*second``."""
    if first.kind == second.kind == WEIGHTS:
        made = times(factor, difference(first, second))
        return replace(made, terms=(*_scale(first, factor), *_scale(second, -factor)))
    if first.kind == second.kind == DELTA:
        return plus(times(factor, first), times(-factor, second))
    if first.kind == WEIGHTS and second.kind == DELTA and factor == 1.0:
        return plus(first, times(-1.0, second))
    return total(_scale(first, factor), _scale(second, -factor))


def add(first: Value, second: Value) -> Value:
    """ModelMergeAdd: ``first + second``."""
    if second.kind == DELTA and first.kind != TOTAL:
        return plus(first, second)
    if first.kind == DELTA and not first.terms and second.kind == WEIGHTS:
        return plus(second, first)
    return total(_scale(first, 1.0), _scale(second, 1.0))


def mix(first: Value, second: Value, ratio: float) -> Value:
    """ModelMergeSimple: ``ratio*first + (1 - ratio)*second``."""
    if ratio == 1.0:
        return first
    share = rest_of(ratio)
    if first.kind == second.kind == WEIGHTS:
        plain = f"lerp({first.plain}, {second.plain}, {text_of(share)})"
        return Value(f"lerp({first.text}, {second.text}, {text_of(share)})", ATOM, WEIGHTS, start=plain)
    if first.kind == second.kind == DELTA:
        return plus(times(ratio, first), times(share, second))
    return total(_scale(first, ratio), _scale(second, share))


def rest_of(share: float) -> float:
    """``1 - share`` as a person writes it where float32 has one number for both: 0.3333, not 0.33330000000000004."""
    literal, written = 1.0 - share, float(1 - Decimal(repr(float(share))))
    return written if ctypes.c_float(literal).value == ctypes.c_float(written).value else literal


def total(first: tuple[tuple[str, float], ...], second: tuple[tuple[str, float], ...]) -> Value:
    """A sum of whole models with factors; weights if those add up to 1."""
    terms = (*first, *second)
    factors = sum(factor for _, factor in terms)
    texts, shares = ", ".join(text for text, _ in terms), ", ".join(text_of(factor) for _, factor in terms)
    is_model = bool(first and second) and abs(factors - 1.0) < 1e-9
    text = f"weighted_sum([{texts}], [{shares}])"
    terms = terms if first and second else ()
    return Value(text, ATOM, WEIGHTS if is_model else TOTAL, terms, start=_as_difference(terms) or text)


def _as_difference(terms: tuple[tuple[str, float], ...]) -> str:
    """``bridge + k * (variant - base)``, where three factors are k, -k and 1; nothing where they are not."""
    if len(terms) == 3 and terms[0][1] == -terms[1][1] and terms[2][1] == 1.0:
        (variant, k), (base, _), (bridge, _) = terms
        if all(one.isidentifier() for one in (variant, base, bridge)):
            return plus(model(bridge), times(k, difference(model(variant), model(base)))).plain
    return ""


def _scale(value: Value, factor: float) -> tuple[tuple[str, float], ...]:
    """The models that a value adds up, times a factor; none if it cannot be told."""
    if value.kind == WEIGHTS and not value.terms:
        return ((value.text, factor),)
    return tuple((text, share * factor) for text, share in value.terms)


def numbered(stem: str) -> Iterator[str]:
    """``stem``, ``stem_2``, ``stem_3``, ...: names for what a recipe calls alike."""
    yield stem
    number = 2
    while True:
        yield f"{stem}_{number}"
        number += 1

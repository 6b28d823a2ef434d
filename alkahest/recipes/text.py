"""Recipes: an expression as text, and the record of it inside an output file.

Text is parsed by a whitelist over Python's ``ast`` and never evaluated.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from alkahest.algebra.delta_methods import common, model_stock, nuslerp, sce, ties, union
from alkahest.algebra.deltas import Delta
from alkahest.algebra.expression import Expression
from alkahest.algebra.methods import REGISTRY
from alkahest.algebra.mixtures import lerp, weighted_sum
from alkahest.algebra.model_methods import cosine_add, karcher, slerp, train_difference
from alkahest.algebra.sparse_methods import breadcrumbs, dare, della
from alkahest.algebra.weights import Weights
from alkahest.engine.record import MAX_TEXT
from alkahest.engine.scalars import Param, param
from alkahest.errors import AlkahestError, RecipeError, nearest
from alkahest.lora.apply import apply_lora
from alkahest.sources.made_up_weights import made_up

_GRAMMAR = (
    "checkpoints, numbers, + - * /, protect, with_parts_of, only, without, scaled, agreeing, everywhere, lerp, methods"
)
_METHODS = {
    "protect": Weights,
    "with_parts_of": Weights,
    "only": Delta,
    "without": Delta,
    "everywhere": Delta,
    "scaled": Delta,
    "agreeing": Delta,
}
# What a recipe may call, and the merge methods that a notebook registers besides.
_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    lerp,
    weighted_sum,
    param,
    made_up,
    apply_lora,
    slerp,
    karcher,
    cosine_add,
    train_difference,
    ties,
    dare,
    della,
    breadcrumbs,
    sce,
    model_stock,
    nuslerp,
    common,
    union,
)


_TIMES = re.compile(r"(\d[\d.]*)\s*[x\u00d7](?![\w.])")  # 171.1x, as people write a multiplier
_COMMA = re.compile(r"(?<![\w.])\d+,\d+")  # 171,1, as half the world writes a number


def parse(text: str, names: Mapping[str, Any]) -> Any:
    """The expression that recipe text means; ``names`` gives its checkpoints and numbers.

    >>> parse("bridge.protect('refiner') + 171.1 * (variant - base)", {"bridge": bridge, ...})

    A name bound to a number becomes a named scalar. Raises RecipeError for anything but names,
    numbers, ``+ - * /``, the methods of weights and deltas, ``lerp``, ``weighted_sum``, ``param``
    and the registered merge methods; AlgebraError if the expression has no meaning.
    """
    if not isinstance(text, str) or len(text) > MAX_TEXT:
        raise RecipeError("recipe", "not a recipe text", expected=f"at most {MAX_TEXT:,} characters")
    tree = _tree(text)
    if isinstance(tree.body, ast.Tuple):
        raise _no_tuple(text)
    try:
        return _Reader(text.strip(), names).read(tree.body)
    except RecursionError as error:
        raise _unreadable(error, text) from None


def names_in(text: str) -> list[str]:
    """The checkpoint and number names that a recipe text needs, in order of appearance."""
    tree = _tree(text)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    called |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_package(node)}
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in called]
    return list(dict.fromkeys(node.id for node in sorted(names, key=lambda n: (n.lineno, n.col_offset))))


def parts_in(text: str) -> set[str]:
    """The names in a recipe text that stand for parts of checkpoints: arguments of ``with_parts_of``."""
    calls = (node for node in ast.walk(_tree(text)) if isinstance(node, ast.Call))
    return {
        argument.id
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "with_parts_of"
        for argument in call.args
        if isinstance(argument, ast.Name)
    }


def _tree(text: str) -> ast.Expression:
    try:
        return ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:  # the parser's own, for hostile text
        raise _unreadable(error, text) from None


def _no_tuple(text: str) -> RecipeError:
    if near := _COMMA.search(text):
        fix = f"a number has a point: {near[0].replace(',', '.')}"
        return RecipeError("recipe", "this is no number", found=near[0], fix=fix)
    return RecipeError("recipe", "these are several expressions", found=text[:200], fix="one, without commas between")


def _is_package(node: ast.AST) -> bool:
    """Whether a node is ``ak.lerp`` or the like, as people write it in Python."""
    named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ak"
    return named and isinstance(node, ast.Attribute) and node.attr not in _METHODS


def _place(node: ast.expr) -> dict[str, Any]:
    return {name: getattr(node, name) for name in ("lineno", "col_offset", "end_lineno", "end_col_offset")}


def _unreadable(error: Exception, text: str) -> RecipeError:
    reason = error.msg if isinstance(error, SyntaxError) else str(error)
    if "unterminated string" in reason:
        fix = "a quote is open: names of parts stand between two quotes, as in protect('refiner')"
        return RecipeError("recipe", "a quote is not closed", found=text[:200], fix=fix)
    if near := _TIMES.search(text):
        return RecipeError(
            "recipe", "this is no number", found=near[0].strip(), fix=f"write {near[1]} * (variant - base)"
        )
    return RecipeError("recipe", "the text cannot be read", found=f"{reason} in {text[:200]!r}")


class _Reader:
    """Turns one parsed text into an expression."""

    def __init__(self, text: str, names: Mapping[str, Any]) -> None:
        self.text = text
        self.names = names

    def read(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=value) if isinstance(value, (int, float, str)):
                return value
            case ast.Name():
                return self._name(node)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
                value = self.read(node.operand)
                if not isinstance(value, (Expression, int, float)):
                    raise self._refusal(node, "a sign is for numbers and deltas only")
                return -value if isinstance(node.op, ast.USub) else value
            case ast.BinOp():
                return self._operation(node)
            case ast.Call():
                return self._call(node)
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [self.read(item) for item in items]
            case ast.Dict(keys=keys, values=values) if all(isinstance(key, ast.Constant) for key in keys):
                return {self.read(k): self.read(v) for k, v in zip(keys, values, strict=True) if k is not None}
        raise self._refusal(node, "this is not allowed in a recipe")

    def _name(self, node: ast.Name) -> Any:
        if node.id not in self.names:
            raise self._refusal(node, f"unknown name {node.id!r}", nearest(node.id, self.names))
        value = self.names[node.id]
        if isinstance(value, (Expression, Param)):
            return value
        return param(node.id, value)

    def _operation(self, node: ast.BinOp) -> Any:
        left, right = self.read(node.left), self.read(node.right)
        for side in (left, right):
            if isinstance(side, list):
                raise _no_tuple(ast.get_source_segment(self.text, node) or self.text)
            if not isinstance(side, (Expression, Param, int, float)):
                raise self._refusal(node, "arithmetic is on checkpoints, deltas and numbers only")
        try:
            match node.op:
                case ast.Add():
                    return left + right
                case ast.Sub():
                    return left - right
                case ast.Mult():
                    return left * right
                case ast.Div():
                    return left / right
        except AlkahestError:
            raise
        except (TypeError, ArithmeticError) as error:
            raise self._refusal(node, str(error)) from None
        raise self._refusal(node, "only + - * / are allowed")

    def _call(self, node: ast.Call) -> Any:
        arguments = [self.read(argument) for argument in node.args]
        if any(keyword.arg is None for keyword in node.keywords):
            raise self._refusal(node, "** is not allowed in a recipe")
        settings = {str(keyword.arg): self.read(keyword.value) for keyword in node.keywords}
        match node.func:
            case ast.Name(id=name):
                functions = {**REGISTRY, **{function.__name__: function for function in _FUNCTIONS}}
                if name not in functions:
                    raise self._refusal(
                        node,
                        f"unknown function {name!r}",
                        f"{nearest(name, functions)}; a method of your own is registered first: @ak.method()",
                    )
                function: Any = functions[name]
            case ast.Attribute(attr=name) if _is_package(node.func) and "ak" not in self.names:
                return self._call(ast.Call(ast.Name(name), node.args, node.keywords, **_place(node)))
            case ast.Attribute(value=target, attr=name):
                subject = self.read(target)
                if name not in _METHODS or not isinstance(subject, _METHODS[name]):
                    raise self._refusal(node, f"unknown method {name!r}", nearest(name, _METHODS))
                function = getattr(subject, name)
            case _:
                raise self._refusal(node, "this cannot be called in a recipe", "is a * missing?")
        try:
            return function(*arguments, **settings)
        except AlkahestError:
            raise
        except (TypeError, AttributeError, ValueError) as error:
            fix = f"write it as {function.__name__}{_called_with(function)}" if isinstance(error, TypeError) else None
            raise self._refusal(node, str(error), fix, expected=None) from None

    def _refusal(
        self, node: ast.expr, problem: str, fix: str | None = None, expected: str | None = _GRAMMAR
    ) -> RecipeError:
        shown = ast.get_source_segment(self.text, node) or ast.dump(node)
        return RecipeError(
            "recipe",
            problem,
            found=f"{shown[:200]!r} at column {node.col_offset + 1}",
            expected=expected,
            fix=fix,
        )


def _called_with(function: Callable[..., Any]) -> str:
    """The names of a function's arguments, without their types: ``(a, b, t)``."""
    shown = []
    for parameter in inspect.signature(function).parameters.values():
        default = "" if parameter.default is inspect.Parameter.empty else f"={parameter.default!r}"
        shown.append(f"{parameter.name}{default}")
    return f"({', '.join(shown)})"

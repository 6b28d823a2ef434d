"""Every failure that Alkahest reports on purpose, in one shape.

A message says which operation failed and why, then the file and key it concerns, what was
expected, what was found, and what to do about it.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any, ParamSpec, TypeVar

INTERRUPTED = "interrupted: nothing was written"  # what a command says on Ctrl-C
P = ParamSpec("P")
T = TypeVar("T")


class AlkahestError(Exception):
    """Base of all errors raised on purpose; catch this one.

    >>> raise AlkahestError("open", "the file ends early", file="a.safetensors", fix="download it again")
    Traceback (most recent call last):
    alkahest.errors.AlkahestError: open: the file ends early
      file: a.safetensors
      fix: download it again
    """

    def __init__(
        self,
        operation: str,
        problem: str,
        *,
        file: object = None,
        key: str | None = None,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
    ) -> None:
        self.operation = operation
        self.problem = problem
        self.file = None if file is None else str(file)
        self.key = key
        self.expected = expected
        self.found = found
        self.fix = fix
        facts = [("file", self.file), ("key", key), ("expected", expected), ("found", found), ("fix", fix)]
        lines = [_printable(f"{operation}: {problem}")]
        lines += [f"  {name}: {_printable(str(value))}" for name, value in facts if value is not None]
        super().__init__("\n".join(lines))

    def __str__(self) -> str:
        return str(self.args[0])  # where a KeyError would give its repr

    def __reduce__(self) -> tuple[Any, ...]:
        """So that another process can send it."""
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[AlkahestError], arguments: tuple[Any, ...], about: dict[str, Any]) -> AlkahestError:
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    error.__dict__.update(about)
    return error


def reason(error: OSError) -> str:
    """What the operating system says was wrong, as it stands in our messages."""
    return (error.strerror or str(error)).lower()


class FileFormatError(AlkahestError):
    """A file is damaged, lies about itself, or is not a Z-Image checkpoint."""


class UnsupportedError(AlkahestError):
    """A file or option is well formed, but of a kind that Alkahest does not handle."""


class MismatchError(AlkahestError):
    """Two checkpoints of one expression do not have the same tensors."""


class AlgebraError(AlkahestError, TypeError):
    """An expression that has no meaning, such as weights + weights."""


class UnknownNameError(AlkahestError, KeyError):
    """A tensor, part, pattern, layout, dtype or option that does not exist; the nearest name is offered."""


class RecipeError(AlkahestError, ValueError):
    """Recipe text outside the allowed grammar, or a recipe whose inputs are not the recorded ones."""


class NonFiniteError(AlkahestError, ArithmeticError):
    """NaN or infinity in an input, or made by arithmetic or narrowing."""


class OutputError(AlkahestError):
    """The output cannot be written where it was asked for."""


def unknown(
    operation: str, problem: str, name: object, known: Iterable[str], file: object = None, key: str | None = None
) -> UnknownNameError:
    """UnknownNameError for a name that is none of those known, with the nearest of them.

    >>> raise unknown("save", "unknown layout", "natve", ["native", "diffusers"])
    Traceback (most recent call last):
    alkahest.errors.UnknownNameError: save: unknown layout
      found: 'natve'
      fix: did you mean 'native'? Known: native, diffusers
    """
    return UnknownNameError(operation, problem, file=file, key=key, found=repr(name), fix=nearest(str(name), known))


def refuse_unknown_options(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a public function: UnknownNameError, with the nearest name, for an option that it does not have.

    Python's own words for that name neither what was meant nor a way out.
    """
    parameters = inspect.signature(function).parameters.values()
    is_class = function.__name__ == "__init__"
    operation = function.__qualname__.split(".")[0] if is_class else function.__name__
    known = [one.name for one in parameters if one.kind is not one.VAR_KEYWORD and one.name != "self"]
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        raise TypeError(f"{function.__qualname__} takes any name")

    @functools.wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> T:
        require_known(operation, options, known)
        return function(*arguments, **options)

    return call


def require_known(operation: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise UnknownNameError, with the nearest name, for a name that means nothing here."""
    for name in given:
        if name not in known:
            raise unknown(operation, "unknown option", name, known)


def nearest(name: str, options: Iterable[str]) -> str:
    """Say which of the options were probably meant, for the ``fix`` of an error.

    >>> nearest("refinr", ["refiner", "layers"])
    "did you mean 'refiner'? Known: refiner, layers"
    """
    known = list(dict.fromkeys(options))
    if not known:
        return "there are none here"
    close = [option for option in known if option.casefold() == name.casefold()]  # REFINER for refiner
    close = close or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    shown = ", ".join(known[:12]) + (f", ... ({len(known)} in all)" if len(known) > 12 else "")
    if close:
        return "did you mean " + " or ".join(repr(option) for option in close) + f"? Known: {shown}"
    return f"known: {shown}"


def printable(text: str) -> str:
    """Text of strangers with control characters spelled out: none of them may steer a terminal.

    >>> printable("a\x1b[31m.safetensors")
    'a\\x1b[31m.safetensors'

    Lines and tabs stay; so do the marks of writing, but those that turn its direction are spelled out too.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _printable(text: str, limit: int = 2000) -> str:
    # Names come from strangers' files: no control characters (terminal escapes), no megabytes.
    text = text if len(text) <= 2 * limit else f"{text[: 2 * limit]}... ({len(text):,} characters)"
    clean = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return clean if len(clean) <= limit else clean[:limit] + f"... ({len(clean):,} characters)"

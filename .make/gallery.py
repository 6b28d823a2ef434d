"""The gallery's pictures: every block of code on its page is run, and what its last line draws is put below it."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alkahest.lab.figure import Plot

_BLOCK = re.compile(r"```python\n(.*?)```\n", re.DOTALL)


@contextlib.contextmanager
def _working_in(folder: str) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)  # examples write files
    try:
        yield
    finally:
        os.chdir(before)


def draw(page: str) -> tuple[str, dict[str, bytes]]:
    """The page with a picture below each block that ends in a plot, and the pictures by name."""
    known: dict[str, Any] = {}
    pictures: dict[str, bytes] = {}

    def drawn(match: re.Match[str]) -> str:
        plot = _run(match[1], known)
        if plot is None:
            return match[0]
        name = f"gallery/{len(pictures):02d}.png"
        pictures[name] = plot.png()
        alt = re.sub(r"[\[\]\n]", " ", plot.alt)
        return f"{match[0]}\n![{alt}]({name})\n"

    with tempfile.TemporaryDirectory() as folder, _working_in(folder):
        return _BLOCK.sub(drawn, page), pictures


def _run(code: str, known: dict[str, Any]) -> Plot | None:
    """Run a block; what its last line is, if that is a plot."""
    tree = ast.parse(code)
    last = tree.body[-1]
    if not isinstance(last, ast.Expr):
        exec(compile(tree, "gallery", "exec"), known)  # what we wrote ourselves
        return None
    exec(compile(ast.Module(tree.body[:-1], []), "gallery", "exec"), known)
    value = eval(compile(ast.Expression(last.value), "gallery", "eval"), known)
    return value if isinstance(value, Plot) else None

"""Widgets with a browser side of their own: a class with traits, and a script beside this module."""

from __future__ import annotations

import functools
from pathlib import Path

import traitlets


def class_with_script(traits: type[traitlets.HasTraits], script: str) -> type | None:
    """The widget class of ``traits`` whose browser side is ``script``; None where anywidget is not installed.

    >>> class_with_script(DotsTraits, "dots.js")
    """
    try:
        import anywidget
    except ImportError:
        return None
    return _made(traits, anywidget.AnyWidget, script)


@functools.cache
def _made(traits: type, widget: type, script: str) -> type:
    source = Path(__file__).with_name(script)
    return type(traits.__name__.removesuffix("Traits"), (traits, widget), {"_esm": source})

"""What a fix says at a command line: the command that does it, where the library names its own functions."""

from __future__ import annotations

import re

from alkahest.errors import AlkahestError

# Fixes for Python, and the same for a shell. What an expression says is the same in both, but for the package's name.
_COMMANDS = {
    "ak.open_lora(path), and add it to the checkpoint it belongs to": (
        'alkahest lora inspect FILE shows it; alkahest merge "base + 0.8 * lora" --base BASE --lora FILE -o OUT adds it'
    ),
    "ak.open(path); a LoRA of it is ak.extract_lora(variant - base)": (
        "alkahest inspect FILE shows it; alkahest extract-lora --variant FILE --base BASE -o OUT makes a LoRA of it"
    ),
    "ak.open_signs(path)": (
        'alkahest merge "bridge + k * (variant - base).agreeing(signs)" --signs FILE ... takes them in an expression'
    ),
    "choose a rank: ak.extract_lora(lora, energy=0.995)": "choose a rank: alkahest lora resize FILE --rank 64 -o OUT",
    "k=1, or what ak.needed_multiplier says": "a k of 1, or what alkahest multiplier says",
}
_IN_EXPRESSIONS = re.compile(r"\bak\.(?=[a-z_]+\()")


def at_command_line(error: AlkahestError) -> str:
    """An error's text, with its fix as a command.

    >>> print(at_command_line(error))
    open: this is a LoRA, not a checkpoint
      fix: alkahest lora inspect FILE shows it; ...
    """
    text = as_commands(str(error))
    if error.fix is None or error.fix in _COMMANDS:
        return text
    head, found, tail = text.rpartition(error.fix)
    return f"{head}{_IN_EXPRESSIONS.sub('', error.fix)}{tail}" if found else text


def as_commands(text: str) -> str:
    """Text with the fixes in it as commands."""
    for fix, told in _COMMANDS.items():
        text = text.replace(fix, told)
    return text

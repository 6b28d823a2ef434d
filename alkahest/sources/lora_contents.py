"""What is in an adapter's file, whether it can be opened or not."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from alkahest.errors import AlkahestError
from alkahest.files.locate import locate
from alkahest.files.reader import size_text
from alkahest.sources.lora import open_lora
from alkahest.sources.lora_names import ROLES, family_of, parse_name


def contents_of(source: str | os.PathLike[str]) -> dict[str, Any]:
    """A LoRA's summary; of a file that `open_lora` refuses why, and what it holds.

    >>> contents_of("style.safetensors")["groups"]
    {'for the transformer': 480, 'for a text encoder': 144}
    """
    try:
        return {**open_lora(source).summary(), "refused": None}
    except AlkahestError as error:
        refused = str(error)
    located = locate(source)  # what is no safetensors file is told by this
    family = family_of(located.tensors)
    groups: Counter[str] = Counter()
    for stored in located.tensors:
        try:
            name = parse_name(stored, family)
            groups["for the transformer"] += name.role in ROLES.values()
        except AlkahestError as error:
            groups[_group(stored, error)] += 1
    found: dict[str, Any] = {
        "path": str(located.path),
        "refused": refused,
        "groups": dict(groups.most_common()),
        "bytes": sum(entry.nbytes for _, entry in located.tensors.values()),
    }
    try:
        found["transformer"] = open_lora(source, only="transformer").summary()
    except AlkahestError as error:
        found["transformer"] = None
        found["refused in part"] = str(error)
    return found


def contents_text(found: dict[str, Any]) -> str:
    """The same as text."""
    if found["refused"] is None:
        return repr(open_lora(found["path"]))
    lines = [
        f"{found['path']}: {size_text(found['bytes'])}",
        *(f"  {n} tensors {g}" for g, n in found["groups"].items()),
    ]
    if found["transformer"] is not None:
        lines += [
            "with only='transformer' (convert --only transformer):",
            repr(open_lora(found["path"], only="transformer")),
        ]
    return "\n".join([*lines, "open_lora refuses the whole:", *(f"  {line}" for line in found["refused"].splitlines())])


def _group(stored: str, error: AlkahestError) -> str:
    if "text encoder" in error.problem:
        return "for a text encoder"
    if "is not handled" in error.problem:
        return error.problem.replace(" is not handled", "")
    return f"of no module of the transformer: {stored.split('.')[0]}"

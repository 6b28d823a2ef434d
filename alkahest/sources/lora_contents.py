"""What is in an adapter's file, whether it can be opened or not."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alkahest.errors import AlkahestError, printable
from alkahest.files.locate import locate
from alkahest.files.reader import size_text
from alkahest.sources.lora import Lora, open_lora
from alkahest.sources.lora_names import family_of, parse_name


@dataclass(frozen=True)
class Contents:
    """What a file holds: the LoRA, or why it is refused, what is in it by group, and the part that can be taken."""

    path: Path
    lora: Lora | None = None
    refused: str | None = None
    groups: Mapping[str, int] = field(default_factory=dict)
    nbytes: int = 0
    part: Lora | None = None
    refused_in_part: str | None = None  # why the transformer's part cannot be taken either

    def summary(self) -> dict[str, Any]:
        """For scripts: the LoRA's own, or that of what is there."""
        if self.lora is not None:
            return {**self.lora.summary(), "refused": None}
        part = None if self.part is None else self.part.summary()
        told = {"path": str(self.path), "refused": self.refused, "groups": dict(self.groups), "bytes": self.nbytes}
        return {**told, "transformer": part, "refused in part": self.refused_in_part}

    def __repr__(self) -> str:
        if self.lora is not None:
            return repr(self.lora)
        lines = [f"{self.path}: {size_text(self.nbytes)}", *(f"  {n} tensors {g}" for g, n in self.groups.items())]
        if self.part is not None:
            lines += ["with only='transformer' (convert --only transformer):", repr(self.part)]
        told = (f"  {line}" for line in (self.refused or "").splitlines())
        return printable("\n".join([*lines, "open_lora refuses the whole:", *told]))


def contents_of(source: str | os.PathLike[str]) -> Contents:
    """A LoRA, or of a file that `open_lora` refuses why, and what it holds.

    >>> contents_of("style.safetensors").groups
    {'for the transformer': 480, 'for a text encoder': 144}
    """
    try:
        lora = open_lora(source)
        return Contents(lora.path, lora)
    except AlkahestError as error:
        refused = str(error)
    located = locate(source)  # what is no safetensors file is told by this
    family = family_of(located.tensors)
    groups: Counter[str] = Counter()
    for stored in located.tensors:
        try:
            parse_name(stored, family)
            groups["for the transformer"] += 1
        except AlkahestError as error:
            groups[_group(stored, error)] += 1
    nbytes = sum(entry.nbytes for _, entry in located.tensors.values())
    found = Contents(located.path, None, refused, dict(groups.most_common()), nbytes)
    try:
        return replace(found, part=open_lora(source, only="transformer"))
    except AlkahestError as error:
        return replace(found, refused_in_part=str(error))


def _group(stored: str, error: AlkahestError) -> str:
    if "text encoder" in error.problem:
        return "for a text encoder"
    if "is not handled" in error.problem:
        return error.problem.replace(" is not handled", "")
    return f"of no module of the transformer: {stored.split('.')[0]}"

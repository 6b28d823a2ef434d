"""Part of a checkpoint, to be laid over a whole one: ``base.with_parts_of(ak.open_part("refiners.safetensors"))``."""

from __future__ import annotations

import os

from alkahest.algebra.expression import identifier
from alkahest.algebra.leaves import PartLeaf
from alkahest.errors import UnsupportedError, printable, refuse_unknown_options
from alkahest.files.locate import locate
from alkahest.files.paths import recorded_name
from alkahest.files.reader import size_text
from alkahest.files.shards import Located
from alkahest.model.families import Family, best_family
from alkahest.model.stored import resolve
from alkahest.sources.checkpoint import fp8_block
from alkahest.sources.stored_tensors import StoredTensors


class PartialCheckpoint(StoredTensors, PartLeaf):
    """Some tensors of a model, in whatever layout; see `open_part`."""

    def __init__(self, located: Located, name: str | None = None, prefix: str | None = None) -> None:
        self.path, self.files, self.metadata = located.path, located.files, located.metadata
        self.file_names = {reader: recorded_name(reader.path) for reader in self.files}
        self.name = identifier(name or located.path)
        self.family = best_family(lambda family: max(_counts(family, located).values()))
        counts = _counts(self.family, located)
        self.prefix = max(counts, key=lambda one: counts[one]) if prefix is None else prefix
        if not counts.get(self.prefix):
            raise UnsupportedError(
                "open_part",
                f"no tensor of {self.family.title} is in this file",
                file=located.path,
                found=", ".join(list(located.tensors)[:3]) or "nothing",
            )
        mine = {n: place for n, place in located.tensors.items() if n.startswith(self.prefix)}
        found = resolve(mine, located.metadata, self.prefix, self.family.has, fp8_block(located.config))
        self.extras = found.extras
        self.oddities = located.beside
        self._take(found.weights)

    def __repr__(self) -> str:
        parts: dict[str, int] = {}
        for key in self.slices:
            name = self.family.part_of(key).split(".")[0]
            parts[name] = parts.get(name, 0) + 1
        told = ", ".join(f"{name} ({count} tensors)" for name, count in parts.items())
        lines = [f"{self.name}: part of a checkpoint, {self.path.name}, {size_text(self.nbytes)}", f"  holds  {told}"]
        if self.extras:
            lines.append(f"  beside {', '.join(list(self.extras)[:5])}: no part of the model, left out")
        lines += [f"  odd    {text}" for text in self.oddities]
        return printable("\n".join(lines))


@refuse_unknown_options
def open_part(
    source: str | os.PathLike[str], *, name: str | None = None, prefix: str | None = None
) -> PartialCheckpoint:
    """Open a file that holds some of a model's tensors, such as its refiners or an unfinished upload.

    Parameters
    ----------
    source : str or path
        In the forms of `open`.
    name : str, optional
        What recipes call it, by default from the file's name.
    prefix : str, optional
        Which of several models in one file is meant.

    Returns
    -------
    PartialCheckpoint
        For ``with_parts_of``.

    Raises
    ------
    UnsupportedError
        If no tensor of a known family is there.
    FileFormatError
        For damaged files.

    Examples
    --------
    >>> from safetensors.torch import save_file
    >>> save_file({key: turbo[key] for key in turbo if "refiner" in key}, "refiners.safetensors")
    >>> whole = base.with_parts_of(ak.open_part("refiners.safetensors"))
    """
    return PartialCheckpoint(locate(source), name, prefix)


def _counts(family: Family, located: Located) -> dict[str, int]:
    """How many tensors of a family lie under each of its published prefixes."""
    return {
        prefix: sum(family.has(name.removeprefix(prefix)) for name in located.tensors if name.startswith(prefix))
        for prefix in family.prefixes
    }

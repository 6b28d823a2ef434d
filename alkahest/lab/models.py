"""Your files, named once for all notebooks: a small TOML file beside them, and miniatures for what it does not name.

>>> models = open_models("models.toml", "bridge", "base", "variant")
>>> bridge, base, variant = models.values(); models
your files, named in models.toml: bridge = alkahest.safetensors, base = ..., variant = ...
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alkahest import mini
from alkahest.errors import AlkahestError, FileFormatError, unknown
from alkahest.files.locate import HUB_ID
from alkahest.files.paths import expanded
from alkahest.files.toml import read_toml
from alkahest.files.whole import write_text
from alkahest.sources.checkpoint import Checkpoint
from alkahest.sources.checkpoint import open as open_checkpoint

# What a notebook may ask for: what it is, and the miniature that stands in for it.
KEYS = {
    "base": ("Base, which its derivatives were trained from", "base"),
    "turbo": ("Turbo", "turbo"),
    "deturbo": ("De-Turbo, which derivatives of Turbo were trained from", "deturbo"),
    "bridge": ("the bridge: ALKAHEST, or one of your own", "tb1"),
    "variant": ("a derivative of Base", "base-variant"),
    "of_turbo": ("a derivative of De-Turbo", "turbo-variant"),
    "weak": ("a derivative of Base whose difference is very small", "base-weak"),
    "weak_bf16": ("the same one as a bfloat16 file", "base-weak-bf16"),
}
# Text encoder, tokenizer, VAE and scheduler: a pipeline folder, a hub id, or a table of files.
COMPONENTS = "components"
BASES = {"variant": "base", "of_turbo": "deturbo"}  # a derivative, and what it was trained from
_BASES = ("base", "turbo", "deturbo")
_HEAD = "# Your files, for every notebook beside this one; what is not named here is a miniature.\n"


class Models(Mapping[str, Checkpoint]):
    """The checkpoints that a notebook asked for, in that order: all of them yours, or all of them miniatures.

    Weights of different sizes cannot be combined, so one that is missing makes all of them miniatures, and the repr
    says which is missing. ``own`` says whose they are, ``components`` is what pipelines of them need.
    """

    def __init__(self, opened: Mapping[str, Checkpoint], why: str, given: _Given | None, minis: Mapping[str, str]):
        self._opened, self.why, self._given, self._minis = dict(opened), why, given, dict(minis)

    def __getitem__(self, name: str) -> Checkpoint:
        return self._opened[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened)

    def __len__(self) -> int:
        return len(self._opened)

    def __repr__(self) -> str:
        named = ", ".join(f"{name} = {one.path.name if self.own else one.path.stem}" for name, one in self.items())
        return f"{'your files' if self.own else 'miniatures'}, {self.why}: {named}"

    @property
    def own(self) -> bool:
        """Whether they are yours."""
        return self._given is not None

    @property
    def mark(self) -> str:
        """What a title says of whose they are: nothing of yours."""
        return "" if self.own else " (miniatures)"

    @property
    def components(self) -> Any:
        """What `ak.pipeline` takes beside them: yours if they are named; miniatures bring their own."""
        return None if self._given is None else self._given.paths.get(COMPONENTS)

    def to_draw(self) -> Models:
        """The same where pictures can be drawn, else the miniatures of the same names.

        >>> drawn = models.to_draw(); pipe = ak.pipeline(drawn["bridge"], drawn.components)
        """
        if not self.own or self.components is not None:
            return self
        return _miniatures(self._minis, f"because no {COMPONENTS} are named to draw yours with")

    def bases(self) -> dict[str, Checkpoint]:
        """What a derivative may have been trained from: those of base, turbo and deturbo that you named.

        >>> ak.nearest_base(variant, models.bases())
        """
        if self._given is None:
            return {name: mini.load(KEYS[name][1]) for name in _BASES}
        return {name: self._given.open(name) for name in _BASES if name in self._given.paths}


def open_models(
    models: str | os.PathLike[str] | Mapping[str, Any] | None, *names: str, stand_ins: Mapping[str, str] | None = None
) -> Models:
    """The checkpoints of these names: yours where ``models`` names them all, else miniatures.

    >>> open_models("models.toml", "base", "turbo")

    ``models`` is a TOML file, of which paths are relative to its folder, a mapping of the same form, or None. A file
    that is not there names nothing. ``stand_ins`` are other miniatures than those of `KEYS`, by name. Raises
    UnknownNameError for names that are not in `KEYS`, and what opening a file raises, with the name that it has in
    ``models``.
    """
    stand_ins = stand_ins or {}
    _require_keys((*names, *stand_ins), KEYS, "no such model")
    return _open(read_models(models), names, stand_ins)


def _open(given: _Given, names: Sequence[str], stand_ins: Mapping[str, str]) -> Models:
    minis = {name: stand_ins.get(name, KEYS[name][1]) for name in names}
    if missing := [name for name in names if name not in given.paths]:
        unused = [name for name in names if name in given.paths]
        beside = f" (your {', '.join(unused)} {'is' if len(unused) == 1 else 'are'} not used here)" if unused else ""
        reason = f"{given.where} names no {', no '.join(missing)}" if given.paths else f"there is no {given.where}"
        return _miniatures(minis, f"because {reason}{beside}")
    return Models({name: given.open(name) for name in names}, f"named in {given.where}", given, minis)


def open_derivative(
    models: str | os.PathLike[str] | Mapping[str, Any] | None,
    *names: str,
    prefer: str = "variant",
    stand_ins: Mapping[str, str] | None = None,
) -> Models:
    """`open_models` with a base and a derivative of it last, whichever of the two lineages you have.

    >>> bridge, base, variant = open_derivative("models.toml", "bridge", prefer="of_turbo").values()

    ``prefer`` says which to take if both are named, and of which the miniatures are. Raises what `open_models` raises.
    """
    stand_ins = stand_ins or {}
    _require_keys([prefer], BASES, "no such derivative")
    _require_keys((*names, *stand_ins), KEYS, "no such model")
    given = read_models(models)
    order = sorted(BASES, key=lambda one: one != prefer)
    chosen = next((one for one in order if {*names, one, BASES[one]} <= given.paths.keys()), prefer)
    return _open(given, (*names, BASES[chosen], chosen), stand_ins)


@dataclass(frozen=True)
class _Given:
    """What somebody named, with paths made whole, and what to call the place where it is named."""

    paths: dict[str, Any]
    where: str

    def open(self, name: str) -> Checkpoint:
        try:
            return open_checkpoint(self.paths[name], name=name)
        except AlkahestError as error:
            operation = f"open {name}, as {self.where} names it"
            raise type(error)(
                operation,
                error.problem,
                file=error.file,
                found=error.found,
                expected=error.expected,
                key=error.key,
                fix=error.fix,
            ) from None


def read_models(models: str | os.PathLike[str] | Mapping[str, Any] | None) -> _Given:
    """What a file or a mapping names, ``.paths``, and ``.where``; a file that is not there names nothing."""
    if models is None:
        return _Given({}, "file of yours named")
    if isinstance(models, Mapping):
        given, folder, where = dict(models), Path(), "MODELS"
    else:
        path = expanded(models, "open_models")
        folder, where = path.parent, path.name
        given = read_toml(path, "open_models") if path.exists() else {}
    _require_keys(given, (*KEYS, COMPONENTS), f"{where} names what no notebook asks for")
    for name, value in given.items():
        if not isinstance(value, (str, os.PathLike)) and not (name == COMPONENTS and isinstance(value, Mapping)):
            raise FileFormatError("open_models", f"{name} must be a path", file=where, found=repr(value)[:80])
    return _Given({name: _whole(value, folder) for name, value in given.items() if value}, where)


def write_models(models: str | os.PathLike[str], named: Mapping[str, Any]) -> Path:
    """Write the file that `open_models` reads; what has no value is left out."""
    path = expanded(models, "save")
    lines = [f"{name} = {_toml(value)}" for name, value in named.items() if value]
    write_text(path, _HEAD + "".join(line + "\n" for line in lines))
    return path


def _miniatures(minis: Mapping[str, str], why: str) -> Models:
    return Models({name: mini.load(one) for name, one in minis.items()}, why, None, minis)


def _require_keys(given: Iterable[str], known: Collection[str], problem: str) -> None:
    for name in given:
        if name not in known:
            raise unknown("open_models", problem, name, known)


def _whole(value: Any, folder: Path) -> Any:
    """A path from the file's folder, unless it is a hub id."""
    if isinstance(value, Mapping):
        return {name: _whole(one, folder) for name, one in value.items()}
    path = folder / expanded(value, "open_models")
    return str(value) if HUB_ID.fullmatch(str(value)) and not path.exists() else str(path)


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{name} = {_toml(one)}" for name, one in value.items()) + " }"
    return json.dumps(str(value), ensure_ascii=False)  # TOML's basic strings have JSON's escapes

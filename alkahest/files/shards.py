"""Checkpoints in several files: which of a folder's files are one model, by an index or by their own numbers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alkahest.errors import FileFormatError
from alkahest.files.header import MAX_HEADER, Entry, parse_json, read_header
from alkahest.files.reader import Reader

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{3,6})-of-(?P<count>\d{3,6})(?P<rest>(\.[\w-]+)?\.safetensors)")
# What diffusers and transformers look for in a folder, in their order: an index before a single file.
_NAMES = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "model.safetensors.index.json",
    "model.safetensors",
)


@dataclass(frozen=True)
class Located:
    """The tensors of one checkpoint: name -> file and entry, with the files' metadata."""

    path: Path
    files: tuple[Reader, ...]
    tensors: dict[str, tuple[Reader, Entry]]
    metadata: dict[str, str]
    config: dict[str, Any] | None = field(default=None)
    beside: tuple[str, ...] = ()  # what else lies there and was not read, in words


def choose_in_folder(folder: Path) -> tuple[Path, list[Path]]:
    """The file of a folder that stands for its model, an index or a single file; and what else could have.

    By the names that diffusers looks for, in its order; else the only candidate. FileFormatError if there are several,
    or none.
    """
    indexes = sorted(one for one in folder.glob("*.json") if ".safetensors.index" in one.name)
    files = sorted(folder.glob("*.safetensors"))
    sets = {key: one for one in files if (key := _set_of(one)) is not None}
    singles = [one for one in files if _set_of(one) is None]
    every = [*indexes, *singles, *(sets.values() if not indexes else [])]
    named = next((folder / name for name in _NAMES if folder / name in every), None)
    if named is None and len(every) > 1:
        raise FileFormatError(
            "open",
            "the folder holds several models",
            file=folder,
            found=", ".join(one.name for one in every[:5]),
            fix="name one file, or one index.json",
        )
    if named is None and not every:
        raise FileFormatError(
            "open",
            "the folder holds no .safetensors",
            file=folder,
            expected="a transformer/ folder, a pipeline folder or a sharded checkpoint",
            found=", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "an empty folder",
        )
    chosen = named or every[0]
    return chosen, [one for one in (*indexes, *files) if one != chosen]


def shards_with(path: Path) -> list[Path]:
    """The files of the set that a shard belongs to, by their numbers; the file alone if it is none.

    FileFormatError if one of them is missing.
    """
    match = _SHARD.fullmatch(path.name)
    if match is None or int(match["count"]) < 2:
        return [path]
    found = [path.with_name(name) for name in _names_of(match)]
    if lacking := [one.name for one in found if not one.is_file()]:
        raise FileFormatError(
            "open",
            "this is one shard of several, and others are missing",
            file=path,
            expected=f"{len(found)} files",
            found=f"no {', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}",
            fix="download the missing files into the same folder",
        )
    return found


def open_shard_files(paths: Sequence[Path], config: dict[str, Any] | None = None) -> Located:
    """A set of shards that has no index, or needs none. FileFormatError for a tensor that is in two of them."""
    readers = [Reader(path) for path in paths]
    tensors: dict[str, tuple[Reader, Entry]] = {}
    metadata: dict[str, str] = {}
    for reader in readers:
        header = read_header(reader)
        metadata |= header.metadata
        for key, entry in header.entries.items():
            if key in tensors:
                raise FileFormatError(
                    "open",
                    "two shards hold the same tensor",
                    file=reader.path,
                    key=key,
                    found=f"{tensors[key][0].path.name} and {reader.path.name}",
                    fix="get the files again, from one place",
                )
            tensors[key] = (reader, entry)
    return Located(paths[0].parent, tuple(readers), tensors, metadata, config)


def open_index(index: Path, config: dict[str, Any] | None = None) -> Located:
    """A sharded checkpoint by its index. FileFormatError if index and shards do not agree."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileFormatError("open", "the index has no weight_map", file=index, fix="get the index again")
    readers: dict[str, Reader] = {}
    tensors: dict[str, tuple[Reader, Entry]] = {}
    metadata: dict[str, str] = {}
    for name in _shard_names(index, weight_map):
        if not (index.parent / name).is_file():
            raise FileFormatError(
                "open", "a shard is missing", file=index.parent / name, fix="download the missing file"
            )
        readers[name] = Reader(index.parent / name)
        header = read_header(readers[name])
        metadata |= header.metadata
        for key, entry in header.entries.items():
            if weight_map.get(key) != name:
                raise FileFormatError(
                    "open",
                    "a shard holds a tensor that the index puts elsewhere",
                    file=readers[name].path,
                    key=key,
                    expected=weight_map.get(key, "not in the index"),
                    found=name,
                    fix="get index and shards again",
                )
            tensors[key] = (readers[name], entry)
    if absent := [key for key in weight_map if key not in tensors]:
        raise FileFormatError(
            "open",
            "the index names a tensor that its shard does not have",
            file=index,
            key=absent[0],
            expected=f"in {weight_map[absent[0]]}",
            found="not there",
            fix="get index and shards again",
        )
    return Located(index.parent, tuple(readers.values()), tensors, metadata, config)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, checked as a header is."""
    reader = Reader(path)
    if reader.size > MAX_HEADER:
        raise FileFormatError("open", "the JSON file is too long", file=path, found=f"{reader.size:,} bytes")
    return parse_json(reader.read(0, reader.size), reader)


def _shard_names(index: Path, weight_map: Mapping[str, Any]) -> list[str]:
    """The shards that an index names, each a plain file name: an index must not reach outside its folder."""
    for name in weight_map.values():
        impossible = not isinstance(name, str) or len(name.encode(errors="replace")) > 255 or "\0" in name
        if impossible or name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name:
            raise FileFormatError("open", "the index names an impossible file", file=index, found=repr(name)[:200])
    return list(dict.fromkeys(weight_map.values()))


def _set_of(path: Path) -> tuple[str, str, str] | None:
    """What the shards of one set have in common; None for a file that is no shard of several."""
    match = _SHARD.fullmatch(path.name)
    return None if match is None or int(match["count"]) < 2 else (match["stem"], match["count"], match["rest"])


def _names_of(match: re.Match[str]) -> list[str]:
    width, count = len(match["number"]), min(int(match["count"]), 10_000)
    return [f"{match['stem']}-{number:0{width}}-of-{match['count']}{match['rest']}" for number in range(1, count + 1)]

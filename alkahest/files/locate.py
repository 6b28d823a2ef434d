"""From what a person types to the files that hold one transformer."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from alkahest.errors import AlkahestError, FileFormatError, UnsupportedError, nearest, reason
from alkahest.files.header import read_header
from alkahest.files.paths import expanded
from alkahest.files.reader import Reader
from alkahest.files.shards import Located, choose_in_folder, open_index, open_shard_files, read_json, shards_with

HUB_ID = re.compile(r"(\w[\w.-]*)/\w[\w.-]*(?<!\.safetensors)(/.+\.safetensors)?")
_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")


def locate(source: str | os.PathLike[str]) -> Located:
    """Find and read the headers of a checkpoint.

    ``source`` is a ``.safetensors`` file, a diffusers ``transformer/`` folder (sharded or not), a
    pipeline folder, an ``index.json``, a hub id ``owner/name`` or a file on it
    ``owner/name/file.safetensors``. Raises AlkahestError kinds that name the file and the remedy.
    """
    if not str(source):
        raise FileFormatError("open", "an empty path", fix="name a file, a folder or a hub id")
    path = expanded(source, "open")
    hub_id = HUB_ID.fullmatch(str(source).strip())
    if hub_id and not path.exists() and not Path(hub_id[1]).is_dir():
        path = _from_hub(str(source).strip())
    try:
        return _open(path, source)
    except OSError as error:  # a folder that may not be read, a link that leads in a circle
        raise FileFormatError("open", reason(error), file=path, fix="check who may read it") from None


def _open(path: Path, source: object) -> Located:
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise FileFormatError("open", "no such file or folder", file=str(source), fix=_nearby(path))
    if path.name.endswith(".json"):
        return open_index(path)
    if path.suffix.lower() == ".gguf":
        read_header(Reader(path))
        raise UnsupportedError("open", "GGUF files are not supported", file=path, fix="use the .safetensors file")
    if path.suffix.lower() in _PICKLES:
        raise UnsupportedError(
            "open",
            f"{path.suffix} files can run code when they are opened, and are never read",
            file=path,
            expected=".safetensors",
            fix="get the .safetensors of the same model, or convert it where you trust it",
        )
    return _open_single(path)


def _open_single(path: Path, config: dict[str, Any] | None = None) -> Located:
    if len(shards := shards_with(path)) > 1:
        return open_shard_files(shards, config)
    reader = Reader(path)
    header = read_header(reader)
    tensors = {name: (reader, entry) for name, entry in header.entries.items()}
    return Located(path, (reader,), tensors, header.metadata, config)


def _open_folder(path: Path) -> Located:
    if (path / "transformer").is_dir():
        path = path / "transformer"
    config_file = path / "config.json"
    config = read_json(config_file) if config_file.is_file() else None
    chosen, beside = choose_in_folder(path)
    located = open_index(chosen, config) if chosen.suffix == ".json" else _open_single(chosen, config)
    read = {reader.path.name for reader in located.files}
    others = [one.name for one in beside if one.name not in read]
    told = (f"also there and not read: {', '.join(others)}",) if others else ()
    return replace(located, beside=(*located.beside, *told))


def _from_hub(source: str) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    owner, name, *rest = source.split("/")
    patterns = ["transformer/*.safetensors", "transformer/*.json", "model_index.json"]
    try:
        if rest:
            return Path(hf_hub_download(f"{owner}/{name}", "/".join(rest)))
        return Path(snapshot_download(f"{owner}/{name}", allow_patterns=patterns))
    except Exception as error:  # the hub client raises many unrelated types, its own and its HTTP library's
        if isinstance(error, AlkahestError):
            raise
        raise FileFormatError(
            "open",
            "no such file, and the hub did not give it",
            file=source,
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix="check the path or hub id; without a network only what is in the cache can be opened",
        ) from None


def _nearby(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    return nearest(
        path.name,
        sorted(
            p.name
            for p in path.parent.iterdir()
            if p.suffix == ".safetensors" or (p.is_dir() and not p.name.startswith("."))
        ),
    )

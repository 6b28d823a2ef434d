"""From what a person types to the files that hold one transformer."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alkahest.errors import AlkahestError, FileFormatError, UnsupportedError, nearest
from alkahest.files.header import MAX_HEADER, Entry, parse_json, read_header
from alkahest.files.reader import Reader

_HUB_ID = re.compile(r"(\w[\w.-]*)/\w[\w.-]*(?<!\.safetensors)(/.+\.safetensors)?")
_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")


@dataclass(frozen=True)
class Located:
    """The tensors of one checkpoint: name -> file and entry, with the files' metadata."""

    path: Path
    files: tuple[Reader, ...]
    tensors: dict[str, tuple[Reader, Entry]]
    metadata: dict[str, str]
    config: dict[str, Any] | None = field(default=None)


def locate(source: str | os.PathLike[str]) -> Located:
    """Find and read the headers of a checkpoint.

    ``source`` is a ``.safetensors`` file, a diffusers ``transformer/`` folder (sharded or not), a
    pipeline folder, an ``index.json``, a hub id ``owner/name`` or a file on it
    ``owner/name/file.safetensors``. Raises AlkahestError kinds that name the file and the remedy.
    """
    if not str(source):
        raise FileFormatError("open", "an empty path", fix="name a file, a folder or a hub id")
    path = Path(source).expanduser()
    try:
        path.exists()
    except (OSError, ValueError) as error:  # a name too long, or with a NUL in it
        raise FileFormatError(
            "open", "this cannot be a file's name", file=str(source)[:300], found=str(error)[:60]
        ) from None
    hub_id = _HUB_ID.fullmatch(str(source))
    if hub_id and not path.exists() and not Path(hub_id[1]).is_dir():
        path = _from_hub(str(source))
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise FileFormatError("open", "no such file or folder", file=source, fix=_nearby(path))
    if path.name.endswith(".index.json"):
        return _open_shards(path)
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
    shard = re.search(r"-\d+-of-(\d+)\.safetensors$", path.name)
    if shard and int(shard[1]) > 1:
        raise FileFormatError(
            "open", "this is one shard of several", file=path, fix="open its folder or its index.json"
        )
    reader = Reader(path)
    header = read_header(reader)
    tensors = {name: (reader, entry) for name, entry in header.entries.items()}
    return Located(path, (reader,), tensors, header.metadata, config)


def _open_folder(path: Path) -> Located:
    if (path / "transformer").is_dir():
        path = path / "transformer"
    config_file = path / "config.json"
    config = _json_file(config_file) if config_file.is_file() else None
    indexes = sorted(path.glob("*.safetensors.index.json"), key=lambda p: (len(p.name), p.name))
    singles = sorted(path.glob("*.safetensors"))
    named = [p for p in singles if p.name in ("diffusion_pytorch_model.safetensors", "model.safetensors")]
    if named or (len(singles) == 1 and not indexes):
        return _open_single((named or singles)[0], config)
    if indexes:
        return _open_shards(indexes[0], config)
    if singles:
        names = ", ".join(p.name for p in singles[:5])
        raise FileFormatError("open", "the folder holds several models", file=path, found=names, fix="name one file")
    raise FileFormatError(
        "open",
        "the folder holds no .safetensors",
        file=path,
        expected="a transformer/ folder, a pipeline folder or a sharded checkpoint",
        found=", ".join(sorted(p.name for p in path.iterdir())[:5]) or "an empty folder",
    )


def _open_shards(index: Path, config: dict[str, Any] | None = None) -> Located:
    weight_map = _json_file(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileFormatError("open", "the index has no weight_map", file=index, fix="get the index again")
    readers: dict[str, Reader] = {}
    tensors: dict[str, tuple[Reader, Entry]] = {}
    metadata: dict[str, str] = {}
    for name in dict.fromkeys(weight_map.values()):
        # A shard is a plain file name: an index must not reach outside its folder.
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name:
            raise FileFormatError("open", "the index names an impossible file", file=index, found=repr(name))
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


def _json_file(path: Path) -> dict[str, Any]:
    reader = Reader(path)
    if reader.size > MAX_HEADER:
        raise FileFormatError("open", "the JSON file is too long", file=path, found=f"{reader.size:,} bytes")
    return parse_json(reader.read(0, reader.size), reader)


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

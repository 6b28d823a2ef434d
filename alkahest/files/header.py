"""The safetensors header, read with suspicion and written canonically.

Format: 8 bytes little-endian header length, JSON, data
(https://github.com/huggingface/safetensors#format). Files come from strangers, so every number is
checked before anything is allocated or read by it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from alkahest.errors import FileFormatError, UnsupportedError
from alkahest.files.reader import LINE, Reader

MAX_HEADER = 100_000_000  # the limit of the safetensors library itself
MAX_TENSORS = 100_000  # no model has so many; the largest that people share has a few thousand
_MAX_KEYS = 5 * MAX_TENSORS  # a tensor's name and its three, and as many of metadata
_LEAST = 40  # bytes of header that a tensor takes at least
_MAX_DIMENSION = 1 << 48

# Bits per element of every dtype that the format knows.
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}

_NEED_SAFETENSORS = "Alkahest reads .safetensors only; pickles can run code when they are opened"
_OTHER_FORMATS = [
    (b"PK\x03\x04", "a zip archive, probably a torch pickle (.pt, .ckpt)", _NEED_SAFETENSORS),
    (b"\x80", "a Python pickle (.pt, .ckpt, .bin)", _NEED_SAFETENSORS),
    (b"version https://git-lfs", "a git-lfs pointer instead of the file", "fetch the file itself: git lfs pull"),
    (b"<!DOCTYPE", "a web page instead of the file", "download it again, logged in if the site asks for it"),
    (b"<html", "a web page instead of the file", "download it again, logged in if the site asks for it"),
]


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: safetensors dtype tag, shape, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """Tensors by stored name, and the file's string metadata."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(reader: Reader) -> Header:
    """Parse and check a safetensors header.

    Raises FileFormatError for anything the format does not allow, UnsupportedError for other formats.
    """
    _check_kind(reader)
    if reader.size < 8:
        raise _bad(reader, "the file is too short to have a header", "at least 8 bytes", f"{reader.size} bytes")
    length = int.from_bytes(reader.read(0, 8), "little")
    if length == 0 or length > MAX_HEADER:
        raise _bad(
            reader,
            "the header length is impossible: damaged, or not a safetensors file",
            f"1 to {MAX_HEADER:,} bytes",
            f"{length:,} bytes",
        )
    if 8 + length > reader.size:
        raise _bad(
            reader, "the header is longer than the file", f"at least {8 + length:,} bytes", f"{reader.size:,} bytes"
        )
    raw = reader.read(8, length)
    count = raw.count(b'"data_offsets"')
    if count > MAX_TENSORS or raw.count(b"[") + raw.count(b"{") > 3 * (length // _LEAST) + 64:
        found = f"{count:,} tensors in {length:,} bytes"
        raise _bad(reader, "the header holds more than a model could", f"at most {MAX_TENSORS:,} tensors", found)
    keys = raw.count(b'":') - raw.count(b'\\":')  # a quote within a string has a backslash before it
    if keys > _MAX_KEYS:
        found = f"{keys:,} keys in {length:,} bytes"
        raise _bad(reader, "the header holds more than a model could", f"at most {_MAX_KEYS:,} keys", found)
    parsed = parse_json(raw, reader)
    metadata = parsed.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # null is none, to the safetensors library too
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(reader, "__metadata__ is not a map of strings", "strings", type(metadata).__name__)
    data_start = 8 + length
    entries = {name: _entry(reader, name, value, data_start) for name, value in parsed.items()}
    _check_layout(reader, entries, data_start)
    return Header(entries, metadata)


def parse_json(text: bytes, reader: Reader) -> dict[str, Any]:
    """A JSON object from a stranger: no duplicate keys, no NaN, no bottomless nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise _bad(reader, "a name occurs twice in the JSON", "every name once", "two entries", twice)
        return result

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=_no_constant)
        if b"\\u" in text:  # half of a surrogate pair is no text, to the safetensors library neither
            json.dumps(parsed, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise _bad(reader, "this is not valid JSON", "a JSON object", str(error) or "nesting too deep") from None
    if not isinstance(parsed, dict):
        raise _bad(reader, "this is not a JSON object", "a JSON object", type(parsed).__name__)
    return parsed


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Header bytes for (name, dtype tag, shape) in data order, length field included, padded to 64 bytes.

    The format asks for 8; with 64 a processor copies and maps the data up to five times as fast.

    >>> build_header([("w", "BF16", (2, 3))], {})[8:].rstrip()
    b'{"w":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}'
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % LINE)
    return len(text).to_bytes(8, "little") + text


def _check_kind(reader: Reader) -> None:
    start = reader.read(0, min(24, reader.size))
    if start.startswith(b"GGUF"):
        raise UnsupportedError(
            "open",
            "GGUF files are not supported",
            file=reader.path,
            found="GGUF",
            fix="use the bf16 or fp8 .safetensors of the same model, or dequantise it with the gguf package first",
        )
    for magic, what, fix in _OTHER_FORMATS:
        # A real header length may begin with the byte 0x80; a real header has '{' at byte 8.
        if start.startswith(magic) and start[8:9] != b"{":
            raise FileFormatError(
                "open", f"this is {what}", file=reader.path, expected="safetensors", found=repr(start[:8]), fix=fix
            )


def _entry(reader: Reader, name: str, value: Any, data_start: int) -> Entry:
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise _bad(reader, "a tensor's entry is incomplete", "dtype, shape and data_offsets", repr(value)[:300], name)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _bad(
            reader,
            "unknown dtype",
            "one of " + ", ".join(BITS),
            repr(dtype if isinstance(dtype, int) else str(dtype)[:80]),
            name,
        )
    if not _naturals(shape) or any(size > _MAX_DIMENSION for size in shape) or len(shape) > 32:
        raise _bad(reader, "impossible shape", "a list of sizes", repr(shape), name)
    if not _naturals(offsets) or len(offsets) != 2:
        raise _bad(reader, "impossible offsets", "[begin, end]", repr(offsets), name)
    begin, end = offsets
    if begin > end or data_start + end > reader.size:
        size = reader.size - data_start
        raise _bad(
            reader, "offsets outside the data (is the file truncated?)", f"within {size:,} bytes", repr(offsets), name
        )
    bits = prod(shape) * BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        found = f"{end - begin:,} bytes"
        raise _bad(reader, "offsets do not match the shape", f"{bits / 8:,g} bytes for {dtype} {shape}", found, name)
    return Entry(dtype, tuple(shape), data_start + begin, end - begin)


def _check_layout(reader: Reader, entries: dict[str, Entry], data_start: int) -> None:
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != position:
            problem = "tensors overlap" if entry.offset < position else "there is a hole before this tensor"
            expected, found = f"data at byte {position:,}", f"data at byte {entry.offset:,}"
            raise _bad(reader, problem, expected, found, name)
        position += entry.nbytes
    if position != reader.size:
        raise _bad(
            reader, "there are bytes after the last tensor", f"{position:,} bytes in all", f"{reader.size:,} bytes"
        )


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _bad(reader: Reader, problem: str, expected: str, found: str, key: str | None = None) -> FileFormatError:
    fix = "the file is damaged or was made to mislead; get it again from its source"
    found, key = found[:300], None if key is None else key[:300]
    return FileFormatError("open", problem, file=reader.path, key=key, expected=expected, found=found, fix=fix)

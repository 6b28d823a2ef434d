from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from alkahest.errors import AlkahestError, FileFormatError, UnsupportedError
from alkahest.files.header import build_header, read_header
from alkahest.files.reader import Reader


def raw(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_agrees_with_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.arange(4), "empty": torch.empty(0, 2)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"hello": "wörld"})
    found = read_header(Reader(tmp_path / "x.safetensors"))
    assert found.metadata == {"hello": "wörld"}
    with safe_open(tmp_path / "x.safetensors", "pt") as reference:
        assert sorted(found.entries) == sorted(reference.keys())
    content = (tmp_path / "x.safetensors").read_bytes()
    for name, value in tensors.items():
        held = found.entries[name]
        assert held.shape == tuple(value.shape)
        expected = value.contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b""
        assert content[held.offset : held.offset + held.nbytes] == expected


def test_what_we_build_the_library_reads(tmp_path: Path) -> None:
    header = build_header([("wide", "F32", (2, 3)), ("narrow", "BF16", (5,))], {"a": "b"})
    assert len(header) % 64 == 0  # where processors copy fastest; the format asks for 8
    (tmp_path / "x.safetensors").write_bytes(header + bytes(24 + 10))
    with safe_open(tmp_path / "x.safetensors", "pt") as reference:
        assert reference.metadata() == {"a": "b"}
        assert reference.get_tensor("wide").shape == (2, 3)
        assert reference.get_tensor("narrow").dtype == torch.bfloat16


BAD_HEADERS = {
    "not JSON": (b"{nope", b"", "not valid JSON"),
    "not an object": (b"[1, 2]", b"", "not a JSON object"),
    "not UTF-8": (b'{"\xff":1}', b"", "not valid JSON"),
    "NaN": (b'{"a":NaN}', b"", "not valid JSON"),
    "duplicate keys": (b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8), "occurs twice"),
    "bottomless nesting": (b"[" * 100_000, b"", "more than a model could"),
    "nesting": (b"[" * 60, b"", "not valid JSON"),
    "huge number": (
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}',
        bytes(8),
        "not valid JSON",
    ),
    "no dtype": (json.dumps({"a": {"shape": [2], "data_offsets": [0, 8]}}).encode(), bytes(8), "incomplete"),
    "entry is a list": (json.dumps({"a": [1]}).encode(), b"", "incomplete"),
    "unknown dtype": (json.dumps({"a": entry("Q7")}).encode(), bytes(8), "unknown dtype"),
    "dtype is a list": (json.dumps({"a": entry(["F32"])}).encode(), bytes(8), "unknown dtype"),
    "negative shape": (json.dumps({"a": entry(shape=[-2])}).encode(), bytes(8), "impossible shape"),
    "boolean shape": (json.dumps({"a": entry(shape=[True, 2])}).encode(), bytes(8), "impossible shape"),
    "float shape": (json.dumps({"a": entry(shape=[2.0])}).encode(), bytes(8), "impossible shape"),
    "astronomic shape": (json.dumps({"a": entry(shape=[1 << 60])}).encode(), bytes(8), "impossible shape"),
    "one offset": (json.dumps({"a": entry(offsets=[0])}).encode(), bytes(8), "impossible offsets"),
    "reversed offsets": (json.dumps({"a": entry(offsets=[8, 0])}).encode(), bytes(8), "outside the data"),
    "offsets past the end": (json.dumps({"a": entry(offsets=[0, 8])}).encode(), bytes(4), "outside the data"),
    "offsets against shape": (json.dumps({"a": entry(offsets=[0, 4])}).encode(), bytes(4), "do not match"),
    "overlap": (json.dumps({"a": entry(), "b": entry(offsets=[4, 12])}).encode(), bytes(12), "overlap"),
    "same bytes twice": (json.dumps({"a": entry(), "b": entry()}).encode(), bytes(8), "overlap"),
    "hole": (json.dumps({"a": entry(offsets=[4, 12])}).encode(), bytes(12), "hole"),
    "trailing bytes": (json.dumps({"a": entry()}).encode(), bytes(20), "after the last"),
    "metadata no strings": (json.dumps({"__metadata__": {"a": 1}}).encode(), b"", "map of strings"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_lying_headers_are_refused(name: str, tmp_path: Path) -> None:
    header, data, message = BAD_HEADERS[name]
    path = raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(FileFormatError, match=message) as caught:
        read_header(Reader(path))
    text = str(caught.value)
    assert str(path) in text
    assert "fix:" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too short"),
        (b"\1\2\3", "too short"),
        (struct.pack("<Q", 0), "header length is impossible"),
        (struct.pack("<Q", 100_000_001) + b"{}", "header length is impossible"),
        (struct.pack("<Q", (1 << 64) - 1) + b"{}", "header length is impossible"),
        (struct.pack("<Q", 500) + b"{}", "longer than the file"),
        (b"PK\x03\x04" + bytes(60), "zip archive"),
        (b"\x80\x02}q\x00." + bytes(60), "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
    ],
)
def test_other_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(FileFormatError, match=message):
        read_header(Reader(tmp_path / "x.safetensors"))


def test_gguf_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"GGUF\x03" + bytes(80))
    with pytest.raises(UnsupportedError, match="GGUF"):
        read_header(Reader(tmp_path / "x.safetensors"))


def test_a_header_of_128_bytes_is_not_taken_for_a_pickle(tmp_path: Path) -> None:
    # Its length field begins with 0x80, as a pickle does.
    header = json.dumps({"a": entry()}).encode().ljust(128)
    assert read_header(Reader(raw(tmp_path / "x.safetensors", header, bytes(8)))).entries["a"].offset == 136


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 400), byte=st.integers(0, 255))
def test_no_flipped_byte_leads_to_another_exception(position: int, byte: int, tmp_path: Path) -> None:
    good = build_header([(f"t{i}", "BF16", (3, i + 1)) for i in range(5)], {"k": "v"})
    content = bytearray(good + bytes(90))
    content[position % len(good)] = byte
    (tmp_path / "x.safetensors").write_bytes(content)
    try:
        read_header(Reader(tmp_path / "x.safetensors"))
    except AlkahestError as error:
        assert "x.safetensors" in str(error)

"""What strangers' files can say, as functions of bytes: each may raise an AlkahestError and nothing else.

`fuzz.py` searches for bytes that do otherwise; `test_corpus.py` repeats what such searches have found worth keeping.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import alkahest as ak
from alkahest.engine.options import Options
from alkahest.engine.readable import Workspace
from alkahest.engine.record import Recipe, hashed_recipe, headers_of, plan_of
from alkahest.engine.scalars import Rules
from alkahest.errors import AlkahestError
from alkahest.experiment.config import read_experiment
from alkahest.recipes.inputs import build, output_for
from alkahest.recipes.read import recipes_in
from alkahest.recipes.text import names_in, parse
from alkahest.recipes.verify import stream_verdict
from alkahest.sources.lora import open_input, open_lora
from alkahest.training.config import read_config

LARGEST = 8 << 20  # bytes of a file's data
ALLOCATED = 192 << 20  # bytes that reading such a file may take: a tensor in float32, and what torch keeps
KINDS = ("float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8", "int8_tensorwise")
_SUFFIXES = (".json", ".png", ".webp", ".safetensors")


@functools.cache
def folder() -> Path:
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="alkahest-fuzz-", dir=memory if memory.is_dir() else None))


@functools.cache
def models() -> dict[str, Any]:
    """A base, a variant and named scalars, for recipes to speak of."""
    found: dict[str, Any] = {"k": ak.param("k", 2.0)}
    for name, settings in {"base": {}, "variant": {"delta": 0.02}}.items():
        path = folder() / f"{name}.safetensors"
        ak.made_up(layers=1, width=64, **settings).save(path)
        found[name] = ak.open(path)
    return found


def written(name: str, *content: bytes) -> Path:
    path = folder() / name
    path.write_bytes(b"".join(content))
    return path


def described(header: bytes) -> Path:
    """A file with this JSON for a header and the data that it speaks of: small numbers, and what quantised layers
    say of themselves.
    """
    data = bytearray(4096)
    with contextlib.suppress(
        ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError
    ):
        places = {name: entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"}
        data = bytearray(b"\x3c" * max(0, min(LARGEST, max(end for _, end in places.values()))))
        for name, (start, end) in places.items():
            if name.endswith("comfy_quant"):
                kind = KINDS[(end - start) % len(KINDS)]
                data[start:end] = json.dumps({"format": kind}).encode().ljust(min(end - start, LARGEST))
    return written("described.safetensors", len(header).to_bytes(8, "little"), header, data)


def header(data: bytes) -> None:
    """A checkpoint: its first byte says whether the rest is a whole file or a header."""
    path = described(data[1:]) if data[:1] != b"\0" else written("whole.safetensors", data[1:])
    checkpoint = ak.open(path)
    repr(checkpoint), checkpoint.storage, checkpoint.nbytes
    for key in checkpoint:
        assert tuple(checkpoint[key].shape) == checkpoint.shapes[key]


def recipe(data: bytes) -> None:
    """A recipe, as text or as what a file's metadata hold."""
    text = data.decode(errors="replace")
    if text.startswith("{"):
        text = Recipe.from_json(text, "fuzz.safetensors").text
    names_in(text)
    found = parse(text, models())
    if isinstance(found, ak.Weights | ak.Delta):
        for key in list(found.shapes)[:3]:
            found.at(key, Rules())
        parse(found.text(), {**models(), **found.params})


def workflow(data: bytes) -> None:
    """A ComfyUI workflow: its first byte says in what kind of file."""
    suffix = _SUFFIXES[data[0] % len(_SUFFIXES)] if data else ".json"
    content = data[1:]
    path = described(content) if suffix == ".safetensors" else written(f"flow{suffix}", content)
    _, recipes = recipes_in(path)
    for found in recipes:
        names_in(found.text)


def lora(data: bytes) -> None:
    """A LoRA: a line a tensor, name, shape and dtype, and its metadata in the first line if that is JSON."""
    lines = data.decode(errors="replace").splitlines()
    entries: dict[str, Any] = {}
    if lines and lines[0].startswith("{"):
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            entries["__metadata__"] = {str(k): str(v) for k, v in json.loads(lines.pop(0)).items()}
    end = 0
    for line in lines[:64]:
        name, *rest = line.split("|")
        shape = [int(size) % 512 for size in (rest[0] if rest else "").split(",") if size.isdecimal()][:5]
        dtype = rest[1] if len(rest) > 1 else "F16"
        size = functools.reduce(int.__mul__, shape, {"F32": 4, "F64": 8, "U8": 1, "F8_E4M3": 1}.get(dtype, 2))
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + size]}
    found = open_lora(described(json.dumps(entries).encode()))
    repr(found)
    for key, shape in list(found.shapes.items())[:4]:
        out = torch.empty(min(1024, torch.Size(shape).numel()))
        found.read(key, 0, len(out), out, Workspace(out.device))


def config(data: bytes) -> None:
    """A run or an experiment in TOML: its first byte says which."""
    if data[:1] == b"e":
        place = folder() / "experiment"
        place.mkdir(exist_ok=True)
        (place / "experiment.toml").write_bytes(data[1:])
        repr(read_experiment(place))
    else:
        repr(read_config(written("run.toml", data[1:])))


@functools.cache
def _shards() -> Path:
    """A checkpoint in three shards with its index, and what a config says beside it."""
    place = folder() / "shards"
    ak.open(folder() / "base.safetensors").save(place, layout="diffusers", max_shard_size="200KB")
    return place


def index(data: bytes) -> None:
    """The index of a folder of shards, after a line with what its ``config.json`` says; a dash for none."""
    place = _shards()
    settings, _, content = data.partition(b"\n")
    kept = place / "config.json"
    kept.unlink(missing_ok=True)
    if settings != b"-":
        kept.write_bytes(settings)
    name = next(place.glob("*.index.json"), place / "diffusion_pytorch_model.safetensors.index.json")
    name.write_bytes(content)
    found = ak.open(place)
    repr(found), found.storage
    for key in list(found)[:8]:
        assert tuple(found[key].shape) == found.shapes[key]


def output(data: bytes) -> None:
    """What a file records of how it was written, and of its inputs."""
    target = folder() / "recorded.safetensors"
    told = {"alkahest": data.decode(errors="surrogateescape")}
    ak.open(folder() / "base.safetensors").save(target, metadata={"note": "recorded"})
    raw = target.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + size])
    entries["__metadata__"] = told
    head = json.dumps(entries).encode()
    target.write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + size :])
    for event in stream_verdict(target):
        repr(event.result)
    found = Recipe.from_json(told["alkahest"], target)
    given = {name: folder() / f"{name if name == 'variant' else 'base'}.safetensors" for name in found.inputs}
    weights = build(found, given)
    options = Options.of(output_for(found, weights), "recipe")
    headers_of(plan_of(weights, options), hashed_recipe(weights, options))


def name(data: bytes) -> None:
    """The name of a file, as somebody gives it, then as a folder lists it."""
    text = os.fsdecode(data)
    place = folder() / "names"
    with contextlib.suppress(OSError, ValueError):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        shutil.copy(folder() / "base.safetensors", place / f"{text[:200].replace(os.sep, '_')}.safetensors")
    for read in (open_input, ak.open, ak.open_part, ak.open_lora):
        with contextlib.suppress(AlkahestError):
            read(text)
    for path in place.iterdir():
        found = ak.open(path)
        assert repr(found).replace("\n", "").replace("\t", "").isprintable()
        weights = found + 2.0 * (ak.open(folder() / "variant.safetensors") - found)
        text = hashed_recipe(weights, Options()).to_json()
        assert set(names_in(Recipe.from_json(text).text)) == set(Recipe.from_json(text).inputs)
    ak.open(f"{place}{os.sep}{os.fsdecode(data)}.safetensors")


TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": header,
    "recipe": recipe,
    "workflow": workflow,
    "lora": lora,
    "config": config,
    "index": index,
    "output": output,
    "name": name,
}


def attempt(name: str, data: bytes) -> bool:
    """Whether the bytes are accepted; anything but an AlkahestError goes through, and so does a lavish allocation."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        TARGETS[name](data)
        return True
    except AlkahestError as error:
        assert str(error).replace("\n", "").replace("\t", "").isprintable()
        return False
    finally:
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        assert grown < ALLOCATED, f"{grown:,} bytes for {len(data)} bytes of input"

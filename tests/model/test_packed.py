"""nvfp4, mxfp8 and int8 files as ComfyUI has them: written with comfy-kitchen, and read back by hand in float64."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file

import alkahest as ak
from alkahest.errors import FileFormatError, UnsupportedError

KINDS = ["nvfp4", "mxfp8", "int8_tensorwise", "int8 by row", "int8 rotated", "nvfp4 in the header"]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def packed(kind: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A weight as comfy-kitchen packs it: tensors by suffix, and what comfy_quant says."""
    import comfy_kitchen as ck
    from comfy_kitchen.backends.eager.quantization import quantize_int8_convrot_weight

    if kind.startswith("nvfp4"):
        scale = weight.abs().max() / (448 * 6)
        data, blocks = ck.quantize_nvfp4(weight, scale)
        return {"weight": data, "weight_scale": blocks, "weight_scale_2": scale}, {"format": "nvfp4"}
    if kind == "mxfp8":
        data, blocks = ck.quantize_mxfp8(weight)
        return {"weight": data, "weight_scale": blocks.view(torch.uint8)}, {"format": "mxfp8"}
    about: dict[str, Any] = {"format": "int8_tensorwise"}
    if kind == "int8_tensorwise":
        data, scale = ck.quantize_int8_tensorwise(weight)
    elif kind == "int8 by row":
        data, scale = ck.quantize_int8_rowwise(weight)
    else:
        data, scale = quantize_int8_convrot_weight(weight, 16)
        about |= {"convrot": True, "convrot_groupsize": 16}
    return {"weight": data, "weight_scale": scale}, about


def unswizzled(blocks: torch.Tensor, rows: int, columns: int) -> list[list[int]]:
    """cuBLAS' layout of block scales: tiles of 128 rows and 4 columns, the row's lower 5 bits outermost."""
    flat = blocks.contiguous().view(torch.uint8).flatten().tolist()
    across = -(-columns // 4)
    return [
        [
            flat[((r // 128) * across + c // 4) * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4]
            for c in range(columns)
        ]
        for r in range(rows)
    ]


def meant(stored: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    """What a packed weight stands for, number by number."""
    weight = stored["weight"]
    if kind.startswith("nvfp4"):
        rows, columns = weight.shape[0], weight.shape[1] * 2
        scales = unswizzled(stored["weight_scale"], rows, columns // 16)
        found = torch.empty(rows, columns, dtype=torch.float64)
        e4m3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().tolist()
        for r in range(rows):
            for c in range(columns):
                byte = int(weight[r, c // 2])
                code = byte >> 4 if c % 2 == 0 else byte & 15
                value = E2M1[code & 7] * (-1 if code & 8 else 1)
                found[r, c] = value * e4m3[scales[r][c // 16]] * float(stored["weight_scale_2"])
        return found
    if kind == "mxfp8":
        scales = torch.tensor(unswizzled(stored["weight_scale"], weight.shape[0], weight.shape[1] // 32)).double()
        return weight.double() * torch.pow(2.0, scales - 127).repeat_interleave(32, dim=1)
    found = weight.double() * stored["weight_scale"].double()
    if kind == "int8 rotated":
        four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64) / 2
        matrix = torch.kron(four, four)
        found = (found.view(found.shape[0], -1, 16) @ matrix).view(found.shape)
    return found


def write(path: Path, kind: str, prefix: str = "") -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny model with its Linears packed: its path, and what its tensors mean, by native name."""
    stored: dict[str, torch.Tensor] = {}
    meaning: dict[str, torch.Tensor] = {}
    layers = {}
    for name, value in tiny.native(tiny.state(3, layers=1)).items():
        module = name.removesuffix(".weight")
        if not module.endswith(tiny.LINEARS):
            stored[prefix + name] = value.bfloat16()
            meaning[name] = value.bfloat16().double()
            continue
        tensors, about = packed(kind, value)
        meaning[name] = meant(tensors, kind)
        stored |= {f"{prefix}{module}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}
        layers[prefix + module] = about
        if "header" not in kind:
            stored[f"{prefix}{module}.comfy_quant"] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    metadata = (
        {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
        if "header" in kind
        else None
    )
    save_file(stored, path, metadata=metadata)
    return path, meaning


@pytest.fixture(scope="module", params=KINDS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, ak.Checkpoint, dict[str, torch.Tensor]]:
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    path, meaning = write(path, request.param, prefix="model.diffusion_model." if request.param == "mxfp8" else "")
    return request.param, ak.open(path), meaning


def test_every_number_is_what_it_stands_for(model: tuple[str, ak.Checkpoint, dict[str, torch.Tensor]]) -> None:
    kind, opened, meaning = model
    name = kind.split(" ")[0].replace("int8", "int8_tensorwise").removesuffix("_tensorwise_tensorwise")
    linears = {form for key, form in opened.storage.items() if ".attention.to_" in key or "feed_forward" in key}
    assert len(linears) == 1
    assert linears.pop().startswith(name[:4])
    for stored, wanted in meaning.items():
        keys = [stored.replace("qkv", f"to_{which}") for which in "qkv"] if "qkv" in stored else [stored]
        canonical = [
            key.replace("attention.out.", "attention.to_out.0.").replace("q_norm", "norm_q").replace("k_norm", "norm_k")
            for key in keys
        ]
        canonical = [
            f"all_x_embedder.2-1.{key.removeprefix('x_embedder.')}"
            if key.startswith("x_embedder")
            else f"all_final_layer.2-1.{key.removeprefix('final_layer.')}"
            if key.startswith("final_layer")
            else key
            for key in canonical
        ]
        found = torch.cat([opened[key].double() for key in canonical])
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7, msg=stored)
    assert opened.parameters == sum(value.numel() for value in meaning.values())


def test_it_merges_measures_and_converts(
    model: tuple[str, ak.Checkpoint, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    _, opened, meaning = model
    plain = ak.open(tiny.write(tmp_path / "plain.safetensors", tiny.native(tiny.state(3, layers=1)), torch.float32))
    (plain + 2 * (opened - plain)).save(tmp_path / "merged.safetensors", threads=2)
    merged, key = ak.open(tmp_path / "merged.safetensors"), "layers.0.feed_forward.w2.weight"
    wanted = plain[key].double() + 2 * (meaning[key] - plain[key].double())
    torch.testing.assert_close(merged[key].double(), wanted, rtol=1e-5, atol=1e-6)
    table = ak.delta_table(opened - plain)
    row = table[table.tensor == key].iloc[0]
    assert row.delta_norm == pytest.approx(float((meaning[key] - plain[key].double()).norm()), rel=1e-4)
    # Led by the packed file the output is bf16 there: packed storage is read, and never written.
    result = opened.save(tmp_path / "converted.safetensors")
    assert any("bf16" in change for change in result.restored)
    torch.testing.assert_close(
        ak.open(result.path)[key].double(), meaning[key].bfloat16().double(), rtol=2**-7, atol=1e-7
    )
    with pytest.raises(ak.AlkahestError, match="unquantised files only"):
        (plain + (opened - plain)).save(tmp_path / "comfy.safetensors", comfy_compatible=True)
    assert "storage" in repr(opened)
    assert 0 < opened.nbytes < plain.nbytes


def test_a_file_without_its_scales_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path, _ = write(tmp_path / "model.safetensors", "nvfp4")
    whole = load_file(path)
    module = "layers.0.feed_forward.w1"
    damage: dict[str, Any] = {
        "weight_scale": ("without its weight_scale", None),
        "weight_scale_2": ("without its weight_scale_2", None),
        "short": ("without its weight_scale", whole[f"{module}.weight_scale"].flatten()[:-1].contiguous()),
    }
    for name, (message, value) in damage.items():
        stored = dict(whole)
        key = f"{module}.{'weight_scale' if name == 'short' else name}"
        del stored[key]
        if value is not None:
            stored[key] = value
        save_file(stored, tmp_path / "bad.safetensors")
        with pytest.raises(FileFormatError, match=message):
            ak.open(tmp_path / "bad.safetensors")
    path, _ = write(tmp_path / "rotated.safetensors", "int8 rotated")
    stored = load_file(path)
    stored[f"{module}.comfy_quant"] = torch.tensor(
        list(b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 7}'), dtype=torch.uint8
    )
    save_file(stored, tmp_path / "bad.safetensors")
    with pytest.raises(FileFormatError, match="rotated groups of columns do not fit"):
        ak.open(tmp_path / "bad.safetensors")


def test_without_comfy_kitchen_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = write(tmp_path / "model.safetensors", "mxfp8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"(?s)mxfp8 storage needs comfy-kitchen.*pip install comfy-kitchen"):
        ak.open(path)


def test_opening_does_not_bring_the_library(tmp_path: Path) -> None:
    import subprocess
    import sys

    path, _ = write(tmp_path / "model.safetensors", "nvfp4")
    code = f"import sys, alkahest as ak; repr(ak.open({str(path)!r})); print('comfy_kitchen' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == [
        "False"
    ]
    assert math.isfinite(float(ak.open(path)["layers.0.feed_forward.w1.weight"].abs().max()))

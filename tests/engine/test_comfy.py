"""ComfyUI's merge arithmetic, as facts about it were measured: every bit, in its order of operations.

Reference: ModelMergeSubtract then ModelMergeAdd on CPU give ``bf16(A + (V*m - m*B))``, each step a
float32 operation of torch; ModelMergeSimple gives ``bf16(A*r + (1-r)*B)``; pad tokens stay A's.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

import alkahest as ak
from alkahest.errors import AlgebraError

PADS = ("x_pad_token", "cap_pad_token")


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ak.Checkpoint, ...]:
    folder, base = tmp_path_factory.mktemp("comfy"), tiny.state(1)
    states = {"a": tiny.state(2), "v": tiny.near(base, 0.02, 3), "b": base}
    states["a"]["layers.0.ffn_norm1.weight"] = -torch.zeros(96)  # -0 + 0 is +0: no shortcut is allowed
    states["v"]["layers.0.ffn_norm1.weight"] = states["b"]["layers.0.ffn_norm1.weight"]
    return tuple(
        ak.open(tiny.write(folder / f"{name}.safetensors", tiny.native(state), request.param))
        for name, state in states.items()
    )


def bits(value: torch.Tensor) -> torch.Tensor:
    return value.view(torch.int16 if value.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("m", [1.0, 1.1, -0.7, 0.0, 171.1])
def test_subtract_then_add(m: float, models: tuple[ak.Checkpoint, ...], tmp_path: Path) -> None:
    a, v, b = models
    (a + m * (v - b)).save(tmp_path / "out.safetensors", comfy_compatible=True)
    merged = ak.open(tmp_path / "out.safetensors")
    differs = 0
    for key in merged:
        difference = v[key].float() * m
        difference += -m * b[key].float()
        wanted = (a[key].float() + difference).to(a[key].dtype) if key not in PADS else a[key]
        if m != 0.0:
            assert torch.equal(bits(merged[key]), bits(wanted)), key
        else:
            assert torch.equal(merged[key], wanted), key
        ours = (a[key].float() + m * (v[key].float() - b[key].float())).to(a[key].dtype)
        differs += int((ours != wanted).sum())
    if m == 1.1:
        assert differs, "the test data does not tell the two orders apart"


@pytest.mark.parametrize("ratio", [0.5, 0.3, 1.0])
def test_simple(ratio: float, models: tuple[ak.Checkpoint, ...], tmp_path: Path) -> None:
    a, _, b = models
    ak.lerp(a, b, 1 - ratio).save(tmp_path / "out.safetensors", comfy_compatible=True)
    merged = ak.open(tmp_path / "out.safetensors")
    for key in merged:
        wanted = a[key].float()
        wanted *= 1.0 - (1 - ratio)
        wanted += (1 - ratio) * b[key].float()
        assert torch.equal(merged[key], wanted.to(a[key].dtype) if key not in PADS else a[key]), key


def test_protection_and_pads_without_it(models: tuple[ak.Checkpoint, ...], tmp_path: Path) -> None:
    a, v, b = models
    (a.protect("refiner") + 2 * (v - b)).save(tmp_path / "comfy.safetensors", comfy_compatible=True)
    (a + 2 * (v - b)).save(tmp_path / "ours.safetensors")
    comfy, ours = ak.open(tmp_path / "comfy.safetensors"), ak.open(tmp_path / "ours.safetensors")
    for key in a:
        if "refiner" in key or key in PADS:
            assert torch.equal(bits(comfy[key]), bits(a[key]))
    assert not torch.equal(ours["x_pad_token"], a["x_pad_token"]), "by default pad tokens are weights like others"


def test_quantised_files_are_refused(models: tuple[ak.Checkpoint, ...], tmp_path: Path) -> None:
    a, v, _ = models
    quantised = ak.open(tiny.write_scaled(tmp_path / "q.safetensors", tiny.native(tiny.state(1)), "comfy_quant"))
    with pytest.raises(AlgebraError, match="unquantised files only"):
        (a + (v - quantised)).save(tmp_path / "out.safetensors", comfy_compatible=True)

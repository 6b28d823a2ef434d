from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

import alkahest as ak
from alkahest.engine.load import stream_into
from alkahest.engine.options import Options
from alkahest.errors import MismatchError


@pytest.fixture(scope="module")
def models(trio: dict[str, Path]) -> list[ak.Checkpoint]:
    return [ak.open(trio[name]) for name in ("bridge", "variant", "base")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_live_module_equals_a_saved_file(dtype: torch.dtype, models: list[ak.Checkpoint], tmp_path: Path) -> None:
    bridge, variant, base = models
    merged = bridge.protect("refiner") + 3 * (variant - base)
    module = tiny.model(0).to(dtype)
    places = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    assert merged.load_into(module) == len(places)
    assert {name: parameter.data_ptr() for name, parameter in module.named_parameters()} == places, "not in place"
    merged.save(tmp_path / "out.safetensors", dtype="fp32")
    reference = ak.open(tmp_path / "out.safetensors")
    for key, value in module.state_dict().items():
        assert torch.equal(value.float(), reference[key].to(dtype).float()), key


def test_fused_parameters_and_events(models: list[ak.Checkpoint]) -> None:
    class Fused(torch.nn.Module):
        """ComfyUI's names as parameters, by way of nested modules."""

        def __init__(self) -> None:
            super().__init__()
            for name, value in tiny.native(tiny.state(0)).items():
                module: torch.nn.Module = self
                *parents, last = name.split(".")
                for parent in parents:
                    if parent not in module._modules:
                        module.add_module(parent, torch.nn.Module())
                    module = module._modules[parent]  # type: ignore[assignment]
                module.register_parameter(last, torch.nn.Parameter(value.clone()))

    module = Fused()
    events = list(stream_into(models[0], module, Options()))
    assert events[-1].done == events[-1].total == sum(p.nbytes for p in module.parameters())
    qkv = dict(module.named_parameters())["layers.1.attention.qkv.weight"]
    assert torch.equal(qkv, torch.cat([models[0][f"layers.1.attention.to_{x}.weight"] for x in "qkv"]).float())
    assert qkv.requires_grad


def test_a_module_that_does_not_fit_is_left_alone(models: list[ak.Checkpoint]) -> None:
    def untouched(module: torch.nn.Module, message: str) -> None:
        before = {name: value.clone() for name, value in module.state_dict().items() if not value.is_meta}
        with pytest.raises(MismatchError, match=message):
            models[0].load_into(module)
        assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())

    untouched(tiny.model(0, n_layers=1), "no such parameter")
    untouched(tiny.model(0, n_layers=3), "the weights lack")
    untouched(tiny.model(0, cap_feat_dim=48), r"(?s)expected: \(40,\).*found: \(48,\)")
    untouched(tiny.model(0).to("meta"), "cannot be written in place")
    untouched(tiny.model(0).double(), "cannot be written in place")

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file

import alkahest as ak
from alkahest.errors import AlgebraError, MismatchError, NonFiniteError, OutputError, UnknownNameError, UnsupportedError
from alkahest.pictures.live import told_out_of_memory

Trio = dict[str, Path]


def expression(trio: Trio) -> Any:
    bridge, variant, base = (ak.open(trio[name]) for name in ("bridge", "variant", "base"))
    delta = (variant - base).scaled({"layers.1": ak.param("deep", 1.0)})
    return bridge.protect("refiner") + ak.param("k", 1.0) * delta


def assert_fresh(live: Any, tmp_path: Path) -> None:
    """The live parameters are those of a fresh load of the merged file, to the bit."""
    live.expression.save(tmp_path / "fresh.safetensors", dtype="fp32")
    fresh = ak.open(tmp_path / "fresh.safetensors")
    for key, value in live.pipe.transformer.state_dict().items():
        assert torch.equal(value, fresh[key]), key


@pytest.mark.parametrize("memory", ["1GB", 100_000, 1])
def test_set_equals_a_fresh_load(trio: Trio, parts: dict[str, Any], tmp_path: Path, memory: int | str) -> None:
    live = ak.LiveModel(expression(trio), parts, memory=memory)
    places = {name: value.data_ptr() for name, value in live.pipe.transformer.named_parameters()}
    for values in ({"k": 171.1}, {"k": 20, "deep": 0.5}, {"deep": 2.0}, {"k": 0}, {"k": -3}, {"k": 1, "deep": 1}):
        live.set(values)
        assert_fresh(live, tmp_path)
        assert live.held_bytes <= live.budget
    assert {name: value.data_ptr() for name, value in live.pipe.transformer.named_parameters()} == places


def test_it_becomes_another_expression(trio: Trio, parts: dict[str, Any], tmp_path: Path) -> None:
    bridge, variant, base = (ak.open(trio[name]) for name in ("bridge", "variant", "base"))
    live = ak.LiveModel(bridge, parts)
    protected = live.become(bridge.protect("refiner") + 3 * (variant - base))
    assert protected.tensors == sum("refiner" not in key for key in bridge.shapes)
    assert_fresh(live, tmp_path)
    opened = live.become(bridge + 3 * (variant - base))
    assert opened.tensors == sum("refiner" in key for key in bridge.shapes)
    assert_fresh(live, tmp_path)
    assert live.become(bridge + 3 * (variant - base)).tensors == 0
    small = ak.open(tiny.write(tmp_path / "small.safetensors", tiny.state(layers=1)))
    with pytest.raises(MismatchError):
        live.become(small)
    assert_fresh(live, tmp_path)


def test_only_what_changes_is_rewritten_and_memory_is_counted(trio: Trio, parts: dict[str, Any]) -> None:
    live = ak.LiveModel(expression(trio), parts)
    refiners = {key for key in live.expression.shapes if "refiner" in key}
    first = live.set(k=2)
    assert first.tensors == len(live.expression.shapes) - len(refiners)
    assert first.from_disk > 0
    assert first.from_disk == live.held_bytes
    again = live.set(k=3)
    assert again.from_disk == 0
    assert again.from_memory == first.from_disk
    assert "held in memory" in repr(again)
    one_layer = live.set(deep=2)
    assert one_layer.tensors == sum(key.startswith("layers.1.") for key in live.expression.shapes)
    assert live.set(deep=2).tensors == 0
    assert live.params == {"k": 3.0, "deep": 2.0}
    assert "k = 3" in repr(live)

    tight = ak.LiveModel(expression(trio), parts, memory=50_000)
    tight.set(k=2)
    change = tight.set(k=3)
    assert 0 < change.from_memory <= 50_000
    assert change.from_disk == first.from_disk - change.from_memory
    assert "read from disk" in repr(change)


def test_scaled_fp8_inputs_are_held_as_stored(trio: Trio, parts: dict[str, Any], tmp_path: Path) -> None:
    tiny.write_scaled(tmp_path / "v.safetensors", tiny.native(tiny.near(tiny.state(1), 0.1, 4)), "comfy_quant")
    bridge, base = ak.open(trio["bridge"]), ak.open(trio["base"])
    variant = ak.open(tmp_path / "v.safetensors")
    live = ak.LiveModel(bridge + ak.param("k", 1.0) * (variant - base), parts)
    live.set(k=7.7)
    live.set(k=5)
    assert_fresh(live, tmp_path)
    stored = sum(checkpoint.nbytes for checkpoint in (bridge, base, variant))
    assert live.held_bytes == stored


def test_pictures_follow_and_loras_are_scalars(trio: Trio, parts: dict[str, Any], tmp_path: Path) -> None:
    from peft import LoraConfig

    live = ak.LiveModel(expression(trio), parts)
    drawn = {"steps": 2, "cfg": 1, "width": 24, "height": 40}

    def latents() -> torch.Tensor:
        return list(ak.sample(live, "a tree", **drawn))[-1].latents

    one = latents()
    live.set(k=8)
    eight = latents()
    assert not torch.allclose(one, eight, atol=1e-3)
    transformer = live.pipe.transformer
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False), "style")
    assert live.params["style"] == 1.0
    live.set({"style": 0.5, "k": 1})
    assert live.params == {"k": 1.0, "deep": 1.0, "style": 0.5}
    live.set(style=0)
    assert torch.allclose(latents(), one, atol=1e-6), "rewriting looks through adapters"
    with pytest.raises(UnsupportedError, match=r"cannot be sent[^$]*style"):
        pickle.dumps(live)


def test_what_is_refused_changes_nothing(trio: Trio, parts: dict[str, Any], tmp_path: Path) -> None:
    live = ak.LiveModel(expression(trio), parts)
    with pytest.raises(UnknownNameError, match=r"'depe'[^$]*did you mean 'deep'"):
        live.set({"k": 5, "depe": 1})
    with pytest.raises(AlgebraError, match="not finite"):
        live.set(k=float("nan"))
    assert live.params == {"k": 1.0, "deep": 1.0}
    with pytest.raises(NonFiniteError):
        live.set(k=1e42)
    assert live.params == {"k": 1.0, "deep": 1.0}
    assert_fresh(live, tmp_path)
    with pytest.raises(OutputError, match="2 gigs"):
        ak.LiveModel(expression(trio), parts, memory="2 gigs")


def test_a_copy_in_another_process_is_built_from_files(trio: Trio, parts: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "components"
    tiny.reference(tiny.model(0), parts).save_pretrained(folder)
    live = ak.LiveModel(expression(trio), folder)
    live.set(k=4)
    here = pickle.loads(pickle.dumps(live))
    assert here is live
    from alkahest.pictures import live as live_model

    sent = pickle.dumps(live)
    live_model._here.clear()
    there = pickle.loads(sent)
    assert there is not live
    assert there.params == live.params
    assert pickle.loads(sent) is there, "a worker builds it once"
    for key, value in there.pipe.transformer.state_dict().items():
        assert torch.equal(value, live.pipe.transformer.state_dict()[key])


def test_sum_of_identical_inputs(parts: dict[str, Any], tmp_path: Path) -> None:
    """A checkpoint that appears twice is held once."""
    save_file(tiny.state(1), tmp_path / "a.safetensors")
    save_file(tiny.state(2), tmp_path / "b.safetensors")
    a, b = ak.open(tmp_path / "a.safetensors"), ak.open(tmp_path / "b.safetensors")
    live = ak.LiveModel(ak.lerp(a, b, ak.param("t", 0.5)), parts)
    live.set(t=0.25)
    assert_fresh(live, tmp_path)
    assert live.held_bytes == a.nbytes + b.nbytes


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError("std::bad_alloc"),
    ],
)
def test_memory_that_ran_out_says_what_would_fit(error: BaseException) -> None:
    refused = pytest.raises(UnsupportedError, match="there is too little memory for this")
    with refused as told, told_out_of_memory("effect", "batch=1"):
        raise error
    assert "batch=1" in str(told.value)


def test_any_other_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), told_out_of_memory("effect", "batch=1"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

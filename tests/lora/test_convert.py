from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_write import pairs, random

import alkahest as ak
from alkahest.errors import OutputError, UnsupportedError
from alkahest.lora.write import save_lora
from alkahest.model.families.zimage import FAMILY


def values(lora: object, key: str, shape: tuple[int, int] = (96, 96)) -> torch.Tensor:
    found = torch.empty(shape)
    lora.read(key, 0, found.numel(), found.view(-1), None)  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("there", ["kohya", "kohya-split", "fused", "comfyui"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_there_and_back_again(there: str, dtype: torch.dtype, tmp_path: Path) -> None:
    given = {key: type(p)(p.up.to(dtype), p.down.to(dtype), 1 / 3) for key, p in pairs().items()}
    full = {"layers.0.ffn_norm1.weight": random(96).to(dtype)}
    one = ak.open_lora(
        save_lora(
            tmp_path / "one.safetensors",
            given,
            full,
            metadata={"trained": "by hand", "lora_adapter_metadata": '{"r": 3, "lora_alpha": 1}'},
            family=FAMILY,
        )
    )
    other = ak.convert_lora(one, tmp_path / "other.safetensors", there)
    back = ak.convert_lora(other, tmp_path / "back.safetensors")
    before, after = load_file(one.path), load_file(back.path)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert (
            torch.allclose(tensor, after[name], rtol=1e-6) if "alpha" in name else torch.equal(tensor, after[name])
        ), name
    assert back.metadata == {"format": "pt", "trained": "by hand"}, "settings of PEFT belong to PEFT's names"


def test_a_fused_file_that_is_not_block_diagonal(tmp_path: Path) -> None:
    name = "diffusion_model.layers.0.attention.qkv"
    tensors = {
        f"{name}.lora_B.weight": random(288, 7),
        f"{name}.lora_A.weight": random(7, 96),
        f"{name}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "fused.safetensors")
    split = ak.convert_lora(ak.open_lora(tmp_path / "fused.safetensors"), tmp_path / "split.safetensors")
    whole = 2 / 7 * tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double()
    for number, part in enumerate("qkv"):
        key = f"layers.0.attention.to_{part}.weight"
        assert torch.allclose(values(split, key).double(), whole[96 * number : 96 * (number + 1)], atol=1e-5)
    back = load_file(ak.convert_lora(split, tmp_path / "back.safetensors", "fused").path)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_a_direction_of_zeros_stays_where_nothing_was_split(tmp_path: Path) -> None:
    given = pairs()
    key = next(iter(given))
    given[key].up[:, 1] = 0
    one = ak.open_lora(save_lora(tmp_path / "one.safetensors", given, {}, family=FAMILY))
    back = ak.convert_lora(one, tmp_path / "back.safetensors")
    before, after = load_file(one.path), load_file(back.path)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_loha_and_lokr_become_loras(tmp_path: Path) -> None:
    prefix = "lycoris_layers_0_attention_to_"
    tensors = {
        **{f"{prefix}q.hada_w{n}_a": random(96, 2 + n) for n in (1, 2)},
        **{f"{prefix}q.hada_w{n}_b": random(2 + n, 96) for n in (1, 2)},
        f"{prefix}q.alpha": torch.tensor(1.0),
        f"{prefix}k.lokr_w1": random(4, 3),
        f"{prefix}k.lokr_w2_a": random(24, 2),
        f"{prefix}k.lokr_w2_b": random(2, 32),
        f"{prefix}k.alpha": torch.tensor(1.0),
    }
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "lycoris.safetensors")
    before = ak.open_lora(tmp_path / "lycoris.safetensors")
    after = ak.convert_lora(before, tmp_path / "lora.safetensors")
    assert after.summary()["kinds"] == {"LoRA": 2}
    assert after.summary()["ranks"] == [6, 12]
    for part in "qk":
        key = f"layers.0.attention.to_{part}.weight"
        assert torch.allclose(values(before, key), values(after, key), atol=1e-5)


def test_refused(tmp_path: Path) -> None:
    name = "lycoris_layers_0_attention_to_k"
    save_file({f"{name}.lokr_w1": random(4, 3), f"{name}.lokr_w2": random(24, 32)}, tmp_path / "full.safetensors")
    with pytest.raises(UnsupportedError, match=r"(?s)LoKr would be larger.*extract_lora\(lora, energy"):
        ak.convert_lora(ak.open_lora(tmp_path / "full.safetensors"), tmp_path / "out.safetensors")
    path = save_lora(tmp_path / "lora.safetensors", pairs(), {}, family=FAMILY)
    with pytest.raises(OutputError, match="the output is one of the inputs"):
        ak.convert_lora(ak.open_lora(path), path, "kohya")
    save_file(
        {**load_file(path), "diffusion_model.layers.0.attention.to_q.dora_scale": random(96, 1)},
        tmp_path / "dora.safetensors",
    )
    with pytest.raises(UnsupportedError, match=r"(?s)a DoRA cannot be converted.*apply it"):
        ak.convert_lora(ak.open_lora(tmp_path / "dora.safetensors"), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()

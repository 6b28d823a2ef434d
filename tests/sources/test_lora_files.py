"""LoRA files as people really have them: settings are known or refuse, copies are told, parts can be taken."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from typer.testing import CliRunner

import alkahest as ak
from alkahest.cli import app
from alkahest.errors import AlkahestError, FileFormatError, UnsupportedError

Q = "layers.1.attention.to_q"
KEY = f"{Q}.weight"
State = dict[str, torch.Tensor]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.1


def pair(module: str = Q, prefix: str = "diffusion_model.", rows: int = 96, columns: int = 96, seed: int = 0) -> State:
    return {
        f"{prefix}{module}.lora_A.weight": numbers(4, columns, seed=seed),
        f"{prefix}{module}.lora_B.weight": numbers(rows, 4, seed=seed),
    }


def write(folder: Path, tensors: State, settings: dict[str, Any] | None = None, name: str = "l.safetensors") -> Path:
    metadata = {"lora_adapter_metadata": json.dumps(settings)} if settings is not None else None
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, folder / name, metadata)
    return folder / name


def whole(lora: Any, key: str = KEY) -> torch.Tensor:
    update = lora.updates[key]
    return update.rows(0, update.shape[0], lambda role: lora.factor(update, role)).double()


LOHA = {
    f"{Q}.hada_w{n}_{half}": numbers(*((96, 4) if half == "a" else (4, 96)), seed=n) for n in (1, 2) for half in "ab"
}
LOKR = {f"{Q}.lokr_w1": numbers(8, 8), f"{Q}.lokr_w2": numbers(12, 12)}


@pytest.mark.parametrize(
    ("tensors", "settings", "scale"),
    [
        (LOHA, {"peft_type": "LOHA", "r": 4, "alpha": 16}, 4.0),
        (LOKR, {"peft_type": "LOKR", "r": 64, "alpha": 16}, 0.25),
        (LOKR, {"r": 64, "alpha": 16, "alpha_pattern": {"to_q": 32}}, 0.5),
        (pair(), {"r": 4, "lora_alpha": 10}, 2.5),
        (pair(), {"r": 8, "lora_alpha": 10, "rank_pattern": {r"layers\.1\..*": 4}}, 2.5),
        (pair(), {"r": 4, "lora_alpha": 10, "alpha_pattern": {r"layers\.[01]\.attention\.to_q": 6}}, 1.5),
        (pair(), {"r": 4, "lora_alpha": 10, "alpha_pattern": {"_q": 99}}, 2.5),
        (pair(), {"r": 4, "lora_alpha": 10, "alpha_pattern": {"to_k": 99, "to_q": 2, "attention.to_q": 3}}, 0.5),
        (pair(), {"r": 4, "lora_alpha": 10, "use_rslora": True}, 5.0),
        (pair(), {"transformer.r": 4, "transformer.lora_alpha": 2, "text_encoder.r": 16, "text_encoder.x": 1}, 0.5),
        (pair(), {"r": 4, "lora_alpha": 10, "fan_in_fan_out": True, "lora_dropout": 0.3, "target_modules": ["x"]}, 2.5),
        (pair(), {"r": 4, "lora_alpha": 10, "init_lora_weights": "gaussian", "kasa_config": None, "later": False}, 2.5),
    ],
)
def test_settings_scale(tensors: State, settings: dict[str, Any], scale: float, tmp_path: Path) -> None:
    lora = ak.open_lora(write(tmp_path, tensors, settings))
    assert lora.updates[KEY].scale == pytest.approx(scale)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_lora_weights": "pissa"}, "began as 'pissa'"),
        ({"init_lora_weights": "pissa_niter_16"}, "began as 'pissa_niter_16'"),
        ({"init_lora_weights": "olora"}, "began as 'olora'"),
        ({"init_lora_weights": "loftq"}, "began as 'loftq'"),
        ({"init_lora_weights": "lora_ga"}, "began as 'lora_ga'"),
        ({"init_lora_weights": "anything new"}, "began as 'anything new'"),
        ({"use_qalora": True}, "the setting 'use_qalora' is not handled"),
        ({"layer_replication": [[0, 2]]}, "the setting 'layer_replication' is not handled"),
        ({"target_parameters": ["w"]}, "the setting 'target_parameters' is not handled"),
        ({"lora_bias": True}, "the setting 'lora_bias' is not handled"),
        ({"peft_type": "VERA"}, "VERA adapters are not handled"),
        ({"alpha_pattern": {"(a+)+b": 3}}, "too involved"),
        ({"alpha_pattern": {".*.*.*.*.*x": 3}}, "too involved"),
        ({"r": 8, "lora_alpha": 4}, "another rank than the factors have"),
        ({"r": 4, "lora_alpha": "4"}, "make no sense"),
        ({"r": -4}, "make no sense"),
        ({"alpha_pattern": {"(": 3}}, "make no sense"),
        ({"use_dora": True, "r": 4, "lora_alpha": 4}, "disagree on whether this is a DoRA"),
        ({"peft_type": "LOHA", "r": 4, "alpha": 4}, "settings are of another kind of adapter"),
        ({"use_rslora": True, "r": 4}, "no lora_alpha"),
        ({"use_rslora": "yes"}, "make no sense"),
    ],
)
def test_settings_refuse(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises((FileFormatError, UnsupportedError), match=words):
        ak.open_lora(write(tmp_path, pair(), settings))


@pytest.mark.parametrize("seed", range(30))
def test_any_setting_that_is_not_known_refuses_unless_it_is_off(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    name = "".join(rng.choices("abcdefgh_", k=rng.randint(3, 12)))
    path = write(tmp_path, pair(), {"r": 4, "lora_alpha": 4, name: rng.choice([None, False, [], {}, "", 0])})
    assert ak.open_lora(path).updates[KEY].scale == 1
    on = rng.choice([True, 1, 0.5, "x", ["a"], {"a": 1}, -1])
    with pytest.raises(UnsupportedError, match=f"the setting '{name}' is not handled"):
        ak.open_lora(write(tmp_path, pair(), {"r": 4, "lora_alpha": 4, name: on}))


PATTERNS = [
    "to_q",
    "_q",
    "attention.to_q",
    r"layers\.[01]\..*",
    r"layers\.\d+\.attention\.to_[qk]",
    "q$",
    "^layers",
    ".*",
    "(to_q|to_k)",
]


@pytest.mark.parametrize("seed", range(30))
def test_patterns_match_as_pefts_do(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    chosen = rng.sample(PATTERNS, rng.randint(1, 4))
    alphas = {pattern: number + 2 for number, pattern in enumerate(chosen)}
    modules = ["layers.0.attention.to_q", "layers.1.attention.to_k", "noise_refiner.0.feed_forward.w2"]
    tensors: State = {}
    for module in modules:
        rows, columns = (96, 256) if "w2" in module else (96, 96)
        tensors |= pair(module, rows=rows, columns=columns)
    lora = ak.open_lora(write(tmp_path, tensors, {"r": 4, "lora_alpha": 40, "alpha_pattern": alphas}))
    for module in modules:
        wanted = alphas.get(get_pattern_key(list(alphas), module), 40)
        assert lora.updates[f"{module}.weight"].scale == pytest.approx(wanted / 4)
    for pattern in chosen:
        unused = not any(get_pattern_key([pattern], module) == pattern for module in modules)
        assert (f"alpha_pattern {pattern!r} matches no module of the file" in lora.notes) == unused


def test_an_alpha_that_is_not_used_may_be_infinite(tmp_path: Path) -> None:
    """ai-toolkit writes it so in fp16 for a LoKr of full rank."""
    alpha = {f"{Q}.alpha": torch.tensor(float("inf"), dtype=torch.float16)}
    lora = ak.open_lora(write(tmp_path, {**LOKR, **alpha}))
    assert torch.allclose(whole(lora), torch.kron(numbers(8, 8), numbers(12, 12)).double(), atol=1e-8)
    with pytest.raises(FileFormatError, match="alpha is not a finite number"):
        ak.open_lora(write(tmp_path, {**pair(prefix=""), **alpha}))


def test_copies_with_equal_numbers_are_one(tmp_path: Path) -> None:
    """Every attention fused and split, and its output under both names."""
    down, up = numbers(4, 96), numbers(288, 4)
    module = "layers.1.attention"
    tensors = {f"{module}.qkv.lora_A.weight": down, f"{module}.qkv.lora_B.weight": up}
    for number, which in enumerate("qkv"):
        tensors[f"{module}.to_{which}.lora_A.weight"] = down
        tensors[f"{module}.to_{which}.lora_B.weight"] = up[96 * number : 96 * (number + 1)]
    out = pair("layers_1_attention_out", "lora_unet_")
    again = {name.replace("attention_out", "attention_to_out_0"): value for name, value in out.items()}
    lora = ak.open_lora(write(tmp_path, {**tensors, **out, **again}))
    assert "4 weights are there twice, with equal numbers: one copy is taken" in repr(lora)
    assert torch.allclose(whole(lora), up[:96].double() @ down.double(), atol=1e-7)
    assert len(lora.updates) == 4
    changed = dict(tensors)
    changed[f"{module}.to_k.lora_B.weight"] = up[96:192] * 1.01
    with pytest.raises(FileFormatError, match=r"(?s)two tensors of the file mean the same thing.*to_k"):
        ak.open_lora(write(tmp_path, changed))


OTHERS = {
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": numbers(4, 8),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": numbers(8, 4),
    "control_layers.0.attention.to_q.lora_A.weight": numbers(4, 96),
    "bundle_emb.style.string_to_param": numbers(2, 40),
    "diffusion_model.layers.0.attention.to_k.alpha": torch.tensor(4.0),
}


def test_the_transformer_s_part_can_be_taken(tmp_path: Path) -> None:
    path = write(tmp_path, {**pair(), **OTHERS})
    for name in OTHERS:
        with pytest.raises(AlkahestError, match="only='transformer'"):
            ak.open_lora(write(tmp_path, {**pair(), name: OTHERS[name]}, name="one.safetensors"))
    lora = ak.open_lora(path, only="transformer")
    assert list(lora.updates) == [KEY]
    assert sum(map(len, lora.left.values())) == len(OTHERS)
    assert "2 tensors for a text encoder are left out" in repr(lora)
    shown = CliRunner().invoke(app, ["lora", "inspect", str(path)])
    assert shown.exit_code == 0
    for words in (
        "1 tensors: layers (1)",
        "2 tensors for a text encoder",
        "bundle_emb",
        "control_layers",
        "open_lora refuses",
    ):
        assert words in shown.output
    out = tmp_path / "out.safetensors"
    refused = CliRunner().invoke(app, ["lora", "convert", str(path), "-o", str(out)])
    assert refused.exit_code == 1
    done = CliRunner().invoke(app, ["lora", "convert", str(path), "-o", str(out), "--only", "transformer"])
    assert done.exit_code == 0, done.output
    assert "left out" in done.output
    assert torch.allclose(whole(ak.open_lora(out)), whole(lora))
    with pytest.raises(AlkahestError, match="only='transformer' is the part that can be taken"):
        ak.open_lora(path, only="text_encoder")
    with pytest.raises(UnsupportedError, match="nothing in this file is for the transformer"):
        ak.open_lora(write(tmp_path, OTHERS, name="none.safetensors"), only="transformer")
    nothing = CliRunner().invoke(app, ["lora", "inspect", str(tmp_path / "none.safetensors")])
    assert nothing.exit_code == 0
    assert "bundle_emb" in nothing.output


SPELLED = {
    "pipe.dit.": ("lora_A.weight", "lora_B.weight"),
    "module.": ("lora_A.weight", "lora_B.weight"),
    "transformer.module.": ("lora_down.weight", "lora_up.weight"),
    "base_model.model.module.": ("lora_A.weight", "lora_B.weight"),
    "": ("lora_A.default.weight", "lora_B.default.weight"),
    "diffusion_model.": ("lora_A.my_style.weight", "lora_B.my_style.weight"),
}


@pytest.mark.parametrize("prefix", SPELLED)
@pytest.mark.parametrize("layer", ["", ".base_layer"])
def test_names_of_many_trainers(prefix: str, layer: str, tmp_path: Path) -> None:
    down, up = SPELLED[prefix]
    tensors = {f"{prefix}{Q}{layer}.{down}": numbers(4, 96), f"{prefix}{Q}{layer}.{up}": numbers(96, 4)}
    lora = ak.open_lora(write(tmp_path, tensors))
    assert torch.allclose(whole(lora), numbers(96, 4).double() @ numbers(4, 96).double(), atol=1e-7)


def test_the_model_s_own_weights_in_an_adapter_are_left_out(tmp_path: Path) -> None:
    lora = ak.open_lora(write(tmp_path, {**pair(), f"diffusion_model.{Q}.base_layer.weight": numbers(96, 96)}))
    assert "1 tensors are the model's own weights, as PEFT keeps them: left out" in repr(lora)
    assert list(lora.updates) == [KEY]


@pytest.mark.parametrize(
    ("module", "rows", "parts"),
    [
        ("layers.1.attention.to_qkv", 288, ["attention.to_q", "attention.to_k", "attention.to_v"]),
        ("layers.1.feed_forward.w13", 512, ["feed_forward.w1", "feed_forward.w3"]),
    ],
)
@pytest.mark.parametrize("flat", [False, True])
def test_fused_modules_of_other_programs(module: str, rows: int, parts: list[str], flat: bool, tmp_path: Path) -> None:
    tensors = pair(module.replace(".", "_") if flat else module, "lora_unet_" if flat else "diffusion_model.", rows)
    lora = ak.open_lora(write(tmp_path, tensors))
    right = numbers(rows, 4).double() @ numbers(4, 96).double()
    height = rows // len(parts)
    for number, part in enumerate(parts):
        got = whole(lora, f"layers.1.{part}.weight")
        assert torch.allclose(got, right[height * number : height * (number + 1)], atol=1e-7)


def test_the_omni_models_embedder(tmp_path: Path) -> None:
    lora = ak.open_lora(write(tmp_path, pair("siglip_embedder.1", columns=64)))
    assert lora.targets == {"siglip_embedder.1.weight": (96, 64)}


def test_a_shape_that_is_the_weight_s_own_is_no_change(tmp_path: Path) -> None:
    same = {f"diffusion_model.{Q}.reshape_weight": torch.tensor([96, 96])}
    assert ak.open_lora(write(tmp_path, {**pair(), **same})).targets == {KEY: (96, 96)}
    other = {f"diffusion_model.{Q}.reshape_weight": torch.tensor([96, 128])}
    with pytest.raises(UnsupportedError, match="a change of shape is not handled"):
        ak.open_lora(write(tmp_path, {**pair(), **other}))


def test_a_learned_scalar_and_wide_factors(tmp_path: Path) -> None:
    scalar = {f"diffusion_model.{Q}.scalar": torch.tensor(0.3), f"diffusion_model.{Q}.alpha": torch.tensor(8.0)}
    lora = ak.open_lora(write(tmp_path, {**pair(), **scalar}))
    right = numbers(96, 4).double() @ numbers(4, 96).double()
    assert torch.allclose(whole(lora), 0.6 * right, atol=1e-7)
    wide = {name: value.double() for name, value in pair().items()}
    lora = ak.open_lora(write(tmp_path, wide))
    assert torch.allclose(whole(lora), right, atol=1e-7)
    converted = ak.convert_lora(lora, tmp_path / "out.safetensors")
    assert torch.allclose(whole(converted), right, atol=1e-7)


def test_a_lora_and_a_difference_on_one_weight_add_up(tmp_path: Path) -> None:
    diff = {f"diffusion_model.{Q}.diff": numbers(96, 96, seed=9)}
    lora = ak.open_lora(write(tmp_path, {**pair(), **diff}))
    right = numbers(96, 4).double() @ numbers(4, 96).double() + numbers(96, 96, seed=9).double()
    assert torch.allclose(whole(lora), right, atol=1e-7)
    base = ak.open(tiny.write(tmp_path / "b.safetensors", tiny.state(1), torch.float32))
    (base + 0.5 * lora).save(tmp_path / "o.safetensors", dtype="fp32")
    assert torch.allclose(
        ak.open(tmp_path / "o.safetensors")[KEY].double(), base[KEY].double() + 0.5 * right, atol=1e-6
    )
    converted = ak.convert_lora(lora, tmp_path / "out.safetensors")
    assert torch.allclose(whole(converted), right, atol=1e-7)


def test_magnitudes_as_ai_toolkit_calls_them(tmp_path: Path) -> None:
    lora = ak.open_lora(write(tmp_path, {**pair(), f"diffusion_model.{Q}.magnitude": 1 + numbers(96)}))
    assert lora.is_dora

"""Everything that can be read, each with what it must give: made by torch and safetensors alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import tiny
import torch
from safetensors.torch import save_file

import alkahest as ak
from alkahest.engine.readable import Readable
from alkahest.pictures.live import _Held, _Holding
from alkahest.training.trained import Tensors

Q, W1, NORM = "layers.1.attention.to_q.weight", "noise_refiner.0.feed_forward.w1.weight", "layers.0.ffn_norm1.weight"
Values = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A source of numbers, the numbers, and the same with a NaN in `Q`."""

    readable: Readable
    values: Values
    broken: Callable[[], Readable]
    is_sent: bool = True  # whether another process can be given it


def with_nan(values: Values, key: str = Q) -> dict[str, torch.Tensor]:
    return {
        name: value.clone().index_fill_(0, torch.tensor(3), torch.nan) if name == key else value
        for name, value in values.items()
    }


def of_files(
    write: Callable[[Path, tiny.State], Path], decoded: Callable[[tiny.State], Values]
) -> Callable[[Path], Case]:
    def make(folder: Path) -> Case:
        state = tiny.state(seed=5)
        (folder / "sound").mkdir()
        (folder / "broken").mkdir()
        opened = ak.open(write(folder / "sound", state))
        return Case(opened, decoded(state), lambda: ak.open(write(folder / "broken", with_nan(state))))

    return make


def _native(folder: Path, state: tiny.State) -> Path:
    return tiny.write(folder / "a.safetensors", tiny.native(state))


def _prefixed(folder: Path, state: tiny.State) -> Path:
    stored = {f"model.diffusion_model.{name}": value.half() for name, value in tiny.native(state).items()}
    save_file({**stored, "vae.decoder.conv_in.weight": torch.ones(3, 5)}, folder / "a.safetensors")
    return folder / "a.safetensors"


def _diffusers(folder: Path, state: tiny.State) -> Path:
    return tiny.write(folder / "diffusion_pytorch_model.safetensors", state, torch.float32).parent


def _fp8(folder: Path, state: tiny.State) -> Path:
    return tiny.write(folder / "a.safetensors", tiny.native(state), torch.float8_e5m2)


def _scaled(folder: Path, state: tiny.State) -> Path:
    """Scaled fp8; a NaN goes in after quantising, which would make its scale one."""
    sound = {key: value.nan_to_num(0.1) for key, value in state.items()}
    stored, _ = tiny.scaled(tiny.native(sound), "comfy_quant")
    if state[Q].isnan().any():
        stored["layers.1.attention.qkv.weight"].view(torch.uint8)[3] = 0x7F
    save_file(stored, folder / "a.safetensors")
    return folder / "a.safetensors"


def _split(native: Values) -> dict[str, torch.Tensor]:
    """Native names back to canonical ones, by hand."""
    found: dict[str, torch.Tensor] = {}
    for name, value in native.items():
        if name.endswith(".attention.qkv.weight"):
            for which, rows in zip("qkv", value.chunk(3), strict=True):
                found[name.replace("qkv", f"to_{which}")] = rows
            continue
        for old, new in {"attention.out.": "attention.to_out.0.", "q_norm.": "norm_q.", "k_norm.": "norm_k."}.items():
            name = name.replace(old, new)
        for old, new in {"x_embedder.": "all_x_embedder.2-1.", "final_layer.": "all_final_layer.2-1."}.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        found[name] = value.float()
    return found


def _scaled_values(state: tiny.State) -> Values:
    return _split(tiny.meaning(tiny.scaled(tiny.native(state), "comfy_quant")[0]))


def _as(dtype: torch.dtype) -> Callable[[tiny.State], Values]:
    return lambda state: {key: value.to(dtype).float() for key, value in state.items()}


def lora(folder: Path) -> Case:
    """A LoRA on a split module with an alpha, one on a fused qkv, a LoHa and a difference that is stored whole."""
    torch.manual_seed(9)
    make = {
        name: torch.randn(shape)
        for name, shape in {
            "a": (5, 96),
            "b": (96, 5),
            "fa": (4, 96),
            "fb": (288, 4),
            "w1a": (256, 3),
            "w1b": (3, 96),
            "w2a": (256, 3),
            "w2b": (3, 96),
            "norm": (96,),
        }.items()
    }
    fused, thin, loha = (
        "diffusion_model.layers.0.attention.qkv",
        f"diffusion_model.{Q[:-7]}",
        f"diffusion_model.{W1[:-7]}",
    )

    def stored(up: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            f"{thin}.lora_A.weight": make["a"],
            f"{thin}.lora_B.weight": up,
            f"{thin}.alpha": torch.tensor(2.0),
            f"{fused}.lora_A.weight": make["fa"],
            f"{fused}.lora_B.weight": make["fb"],
            **{f"{loha}.hada_{name[:2]}_{name[2]}": make[name] for name in ("w1a", "w1b", "w2a", "w2b")},
            f"diffusion_model.{NORM[:-7]}.diff": make["norm"],
        }

    def opened(name: str, up: torch.Tensor) -> Readable:
        save_file(stored(up), folder / f"{name}.safetensors")
        return ak.open_lora(folder / f"{name}.safetensors")

    values = {Q: 2 / 5 * (make["b"].double() @ make["a"].double()), NORM: make["norm"]}
    rows = make["fb"].double() @ make["fa"].double()
    values |= {f"layers.0.attention.to_{x}.weight": part for x, part in zip("qkv", rows.chunk(3), strict=True)}
    values[W1] = (make["w1a"].double() @ make["w1b"].double()) * (make["w2a"].double() @ make["w2b"].double())
    bad = make["b"].clone().index_fill_(0, torch.tensor(3), torch.nan)
    return Case(opened("sound", make["b"]), values, lambda: opened("broken", bad))


def made_up(folder: Path) -> Case:
    one = ak.made_up(layers=2, width=96, seed=4)
    saved = one.save(folder / "made.safetensors", dtype="fp32")
    from safetensors.torch import load_file

    return Case(one, _split(load_file(saved.path)), lambda: _Broken(one))


class _Broken(type(ak.made_up(layers=1, width=32))):  # type: ignore[misc]
    """Made-up weights with a NaN, which a seed cannot give."""

    def __init__(self, one: Any) -> None:
        self.__dict__.update(one.__dict__)

    def read(self, key: str, start: int, stop: int, out: torch.Tensor, workspace: Any) -> None:
        out.fill_(torch.nan if key == Q else 0.0)


def signs(folder: Path) -> Case:
    """Gradient signs, eight a byte, packed by hand."""
    bits = {Q: torch.randn(96, 96) > 0, NORM: torch.arange(93) % 5 < 2}
    packed = {
        key: (torch.nn.functional.pad(one.flatten().int(), (0, -one.numel() % 8)).view(-1, 8) * 2 ** torch.arange(8))
        .sum(1)
        .byte()
        for key, one in bits.items()
    }
    told = {"shapes": {key: list(one.shape) for key, one in bits.items()}, "about": {}}
    save_file(packed, folder / "signs.safetensors", {"alkahest_signs": json.dumps(told)})
    one = ak.open_signs(folder / "signs.safetensors")

    class Broken(type(one)):  # type: ignore[misc]
        def read(self, key: str, start: int, stop: int, out: torch.Tensor, workspace: Any) -> None:
            out.fill_(torch.nan)

    return Case(one, {key: value * 2.0 - 1 for key, value in bits.items()}, lambda: Broken(one.shapes, packed))


def trained(folder: Path) -> Case:
    state = tiny.state(seed=5)
    return Case(
        Tensors({Q: state[Q], NORM: state[NORM].bfloat16()}),
        {Q: state[Q], NORM: state[NORM].bfloat16().float()},
        lambda: Tensors(with_nan({Q: state[Q]})),
    )


def held(budget: int) -> Callable[[Path], Case]:
    def make(folder: Path) -> Case:
        case = of_files(_native, _as(torch.bfloat16))(folder)
        holder = _Held(budget)
        holder.start()
        return Case(
            _Holding(case.readable, holder), case.values, lambda: _Holding(case.broken(), _Held(budget)), is_sent=False
        )

    return make


def comfyui(patched: bool) -> Callable[[Path], Case]:
    """A MODEL as ComfyUI has one, with a stand-in for the three functions of ComfyUI that decode and patch."""

    def make(folder: Path) -> Case:
        from alkahest.nodes.model import ModelWeights

        _stand_in()
        state, torch_dtype = tiny.state(seed=5), torch.bfloat16
        change = torch.randn(96, 96, generator=torch.Generator().manual_seed(1))
        patches = {"diffusion_model.layers.1.attention.out.weight": [(0.5, change)]} if patched else {}

        def weights(values: Values) -> Readable:
            return ModelWeights(
                _model({name: value.to(torch_dtype) for name, value in tiny.native(dict(values)).items()}, patches),
                "it",
            )

        values = dict(_as(torch_dtype)(state))
        if patched:
            values["layers.1.attention.to_out.0.weight"] = values["layers.1.attention.to_out.0.weight"] + 0.5 * change
        return Case(weights(state), values, lambda: weights(with_nan(state)), is_sent=False)

    return make


def _model(state: Values, patches: dict[str, Any]) -> Any:
    root = torch.nn.Module()
    for name, value in state.items():
        *path, last = f"diffusion_model.{name}".split(".")
        place: Any = root
        for piece in path:
            if not hasattr(place, piece):
                place.add_module(piece, torch.nn.Module())
            place = getattr(place, piece)
        place.register_parameter(last, torch.nn.Parameter(value, requires_grad=False))
    return SimpleNamespace(model=root, patches=patches, backup={}, hook_backup={})


def _stand_in() -> None:
    def calculate_weight(patches: Any, weight: torch.Tensor, key: str) -> torch.Tensor:
        for strength, change in patches:
            weight += strength * change
        return weight

    def get_key_weight(model: Any, key: str) -> Any:
        return model.get_parameter(key), None, None

    for name, functions in {
        "comfy": {},
        "comfy.lora": {"calculate_weight": calculate_weight},
        "comfy.model_patcher": {"get_key_weight": get_key_weight},
        "comfy.model_management": {
            "cast_to_device": lambda weight, device, dtype, copy: weight.detach().to(device, dtype, copy=copy)
        },
    }.items():
        module = ModuleType(name)
        module.__dict__.update(functions)
        sys.modules[name] = module


CASES: dict[str, Callable[[Path], Case]] = {
    "checkpoint, bf16": of_files(_native, _as(torch.bfloat16)),
    "checkpoint, fp16 all-in-one": of_files(_prefixed, _as(torch.float16)),
    "checkpoint, fp32 diffusers": of_files(_diffusers, _as(torch.float32)),
    "checkpoint, fp8": of_files(_fp8, _as(torch.float8_e5m2)),
    "checkpoint, scaled fp8": of_files(_scaled, _scaled_values),
    "LoRA": lora,
    "gradient signs": signs,
    "made-up": made_up,
    "finetune": trained,
    "held in memory": held(1 << 30),
    "held in part": held(200_000),
    "not held": held(0),
    "ComfyUI": comfyui(False),
    "ComfyUI, patched": comfyui(True),
}

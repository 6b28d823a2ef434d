"""A LoRA that is trained instead of the weights themselves: peft's, in the same loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alkahest.engine.record import METADATA_KEY, Recipe
from alkahest.errors import UnknownNameError
from alkahest.lora.write import Pair, save_lora
from alkahest.model.dtypes import FORMATS
from alkahest.model.families import Family
from alkahest.model.keys import Pattern
from alkahest.training.config import Config

_NAME = "default"
_DOWN, _UP = f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight"


def add_lora(model: Any, config: Config, family: Family) -> None:
    """Put a LoRA into every Linear that ``lora.targets`` selects and that is not frozen; starts as a change of zero."""
    from peft import LoraConfig

    targets = Pattern(config.lora.get("targets", family.lora_targets), family).require_match(
        dict(model.named_parameters()), "finetune"
    )
    fixed = config.frozen_pattern(family)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = [
        name
        for name in linears
        if targets.matches(f"{name}.weight") and not (fixed and fixed.matches(f"{name}.weight"))
    ]
    if not chosen:
        raise UnknownNameError(
            "finetune", "no Linear is left for a LoRA", found=f"targets {targets.text!r}, frozen {config.frozen!r}"
        )
    rank, alpha = _size(config)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen), _NAME)
    for name, parameter in model.named_parameters():
        if config.trains(name, family):
            parameter.data = parameter.data.float()  # it is small; its steps would be lost in bf16


def _size(config: Config) -> tuple[int, float]:
    """Rank and alpha."""
    rank: int = config.lora.get("rank", 16)
    return rank, config.lora.get("alpha", rank)


def save_adapter(path: Path, trained: Mapping[str, Tensor], config: Config, recipe: str, family: Family) -> Path:
    """Write a trained LoRA under the names that ComfyUI and diffusers both load."""
    rank, alpha = _size(config)
    dtype = FORMATS[config.export].torch
    pairs = {}
    for name, down in trained.items():
        if name.endswith(_DOWN):
            module = name.removesuffix(_DOWN)
            up = trained[module + _UP]
            pairs[f"{module}.weight"] = Pair(up.cpu().to(dtype), down.cpu().to(dtype), alpha / rank)
    return save_lora(
        path, pairs, {}, metadata={METADATA_KEY: Recipe("", made=f"a LoRA of run {recipe}").to_json()}, family=family
    )

"""What the nodes need of ComfyUI where there is none: a model with patches, and the few functions that they call."""

from __future__ import annotations

import copy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch


class Model:
    """The part of ComfyUI's ModelPatcher that the nodes use."""

    def __init__(self, values: int | tiny.State) -> None:
        """Of native values, or of those that a seed makes up."""
        values = tiny.native(tiny.state(values)) if isinstance(values, int) else values
        self.model = torch.nn.Module()
        self.model.diffusion_model = torch.nn.Module()
        for name, value in values.items():
            *path, last = name.split(".")
            place = self.model.diffusion_model
            for one in path:
                if one not in dict(place.named_children()):
                    place.add_module(one, torch.nn.Module())
                place = place.get_submodule(one)
            place.register_parameter(last, torch.nn.Parameter(value))
        self.patches: dict[str, list[Any]] = {}
        self.backup: dict[str, Any] = {}
        self.hook_backup: dict[str, Any] = {}
        self.attachments: dict[str, Any] = {}

    def clone(self) -> Model:
        found = copy.copy(self)
        found.patches, found.attachments = dict(self.patches), dict(self.attachments)
        return found

    def add_patches(self, patches: dict[str, Any], patch: float, model: float) -> None:
        for key, value in patches.items():
            self.patches[key] = [*self.patches.get(key, []), (patch, value, model, None, None)]

    def set_attachments(self, name: str, value: Any) -> None:
        self.attachments[name] = value


def stand_in(monkeypatch: pytest.MonkeyPatch, models: Path | None = None) -> None:
    """Modules of ComfyUI by their names, with what the nodes use of them; files lie in a folder by folder's name."""

    def module(name: str, **contents: Any) -> None:
        made = types.ModuleType(name)
        made.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, made)

    def found(folder: str, name: str) -> str:
        if models is None or not (models / folder / name).is_file():
            raise FileNotFoundError(f"Model in folder '{folder}' with filename '{name}' not found.")
        return str(models / folder / name)

    def free(prefix: str, output: str) -> tuple[str, str, int, str, str]:
        place = Path(output) / prefix
        place.parent.mkdir(parents=True, exist_ok=True)
        return str(place.parent), place.name, 1, "", prefix

    def calculated(patches: list[Any], weight: torch.Tensor, key: str) -> torch.Tensor:
        assert not patches, key
        return weight

    def bar(total: int) -> Any:
        return types.SimpleNamespace(update_absolute=lambda done, total: None)

    def cast(weight: torch.Tensor, device: Any, dtype: torch.dtype, copy: bool) -> torch.Tensor:
        return weight.detach().to(device, dtype, copy=copy)

    module("comfy")
    module("comfy.model_patcher", get_key_weight=lambda model, key: (model.get_parameter(key), None, None))
    module("comfy.lora", calculate_weight=calculated)
    module("comfy.cli_args", args=types.SimpleNamespace(disable_metadata=False))
    module("comfy.utils", ProgressBar=bar)
    module(
        "comfy.model_management",
        cast_to_device=cast,
        throw_exception_if_processing_interrupted=lambda: None,
    )
    output = str(models / "output") if models is not None else ""
    module(
        "folder_paths",
        get_full_path_or_raise=found,
        get_save_image_path=free,
        get_output_directory=lambda: output,
    )

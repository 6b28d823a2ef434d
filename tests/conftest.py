from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALKAHEST_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """bridge, variant and base as native bf16 files; the variant is close to the base."""
    import tiny

    folder = tmp_path_factory.mktemp("trio")
    base = tiny.state(seed=1)
    states = {"bridge": tiny.state(seed=2), "base": base, "variant": tiny.near(base, 0.02, seed=3)}
    return {name: tiny.write(folder / f"{name}.safetensors", tiny.native(values)) for name, values in states.items()}


@pytest.fixture(scope="session")
def parts() -> dict[str, Any]:
    """Untrained pipeline components that fit the tiny transformers."""
    import tiny

    return tiny.components()

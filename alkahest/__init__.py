"""Alkahest: merge, measure and study Z-Image checkpoints.

>>> import alkahest as ak
>>> bridge = ak.open("alkahest_tb1.safetensors").protect("refiner")
>>> merged = bridge + 171.1 * (ak.open("variant.safetensors") - ak.open("base.safetensors"))
>>> merged.save("merged.safetensors")
"""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from alkahest.version import __version__ as __version__

if TYPE_CHECKING:
    from alkahest import mini as mini
    from alkahest.algebra import Weights as Weights
    from alkahest.cache import cached as cached
    from alkahest.cache import clear_cache as clear_cache
    from alkahest.check import nearest_base as nearest_base
    from alkahest.check import refiner_check as refiner_check
    from alkahest.checkpoint import Checkpoint as Checkpoint
    from alkahest.checkpoint import open as open
    from alkahest.compare import compare as compare
    from alkahest.compare import comparison_matrix as comparison_matrix
    from alkahest.delta_methods import breadcrumbs as breadcrumbs
    from alkahest.delta_methods import dare as dare
    from alkahest.delta_methods import della as della
    from alkahest.delta_methods import model_stock as model_stock
    from alkahest.delta_methods import nuslerp as nuslerp
    from alkahest.delta_methods import sce as sce
    from alkahest.delta_methods import ties as ties
    from alkahest.delta_table import delta_table as delta_table
    from alkahest.delta_table import rolled_up as rolled_up
    from alkahest.deltas import Delta as Delta
    from alkahest.errors import AlkahestError as AlkahestError
    from alkahest.finetune.config import read_config as read_config
    from alkahest.finetune.loop import finetune as finetune
    from alkahest.finetune.monitor import read_history as read_history
    from alkahest.finetune.plan import memory_plan as memory_plan
    from alkahest.live_model import LiveModel as LiveModel
    from alkahest.lora.apply import apply_lora as apply_lora
    from alkahest.lora.convert import convert_lora as convert_lora
    from alkahest.lora.extract import extract_lora as extract_lora
    from alkahest.lora.ranks import lora_ranks as lora_ranks
    from alkahest.lora.read import open_lora as open_lora
    from alkahest.made_up import made_up as made_up
    from alkahest.measures import flow_loss as flow_loss
    from alkahest.measures import picture_difference as picture_difference
    from alkahest.measures import picture_measures as picture_measures
    from alkahest.methods import method as method
    from alkahest.mixture import lerp as lerp
    from alkahest.mixture import weighted_sum as weighted_sum
    from alkahest.model_methods import cosine_add as cosine_add
    from alkahest.model_methods import karcher as karcher
    from alkahest.model_methods import slerp as slerp
    from alkahest.model_methods import train_difference as train_difference
    from alkahest.multiplier import Multiplier as Multiplier
    from alkahest.multiplier import needed_multiplier as needed_multiplier
    from alkahest.pipeline import pipeline as pipeline
    from alkahest.provenance import read_recipe as read_recipe
    from alkahest.rounding import absorbed as absorbed
    from alkahest.rounding import file_noise as file_noise
    from alkahest.rounding import rounding_curve as rounding_curve
    from alkahest.sample import sample as sample
    from alkahest.scalar import param as param
    from alkahest.spectrum import delta_spectra as delta_spectra
    from alkahest.sweep import sweep as sweep
    from alkahest.workflow.read import read_workflow as read_workflow
    from alkahest.workflow.write import write_workflow as write_workflow

# Public name -> the module that holds it; imported on first use, so that `import alkahest` is quick.
_PUBLIC = {
    "AlkahestError": "errors",
    "Checkpoint": "checkpoint",
    "Delta": "deltas",
    "LiveModel": "live_model",
    "Multiplier": "multiplier",
    "Weights": "algebra",
    "absorbed": "rounding",
    "apply_lora": "lora.apply",
    "breadcrumbs": "delta_methods",
    "cached": "cache",
    "clear_cache": "cache",
    "compare": "compare",
    "comparison_matrix": "compare",
    "convert_lora": "lora.convert",
    "cosine_add": "model_methods",
    "dare": "delta_methods",
    "della": "delta_methods",
    "delta_spectra": "spectrum",
    "delta_table": "delta_table",
    "extract_lora": "lora.extract",
    "file_noise": "rounding",
    "finetune": "finetune.loop",
    "flow_loss": "measures",
    "karcher": "model_methods",
    "lerp": "mixture",
    "lora_ranks": "lora.ranks",
    "made_up": "made_up",
    "memory_plan": "finetune.plan",
    "method": "methods",
    "model_stock": "delta_methods",
    "nearest_base": "check",
    "needed_multiplier": "multiplier",
    "nuslerp": "delta_methods",
    "open": "checkpoint",
    "open_lora": "lora.read",
    "param": "scalar",
    "picture_difference": "measures",
    "picture_measures": "measures",
    "pipeline": "pipeline",
    "read_config": "finetune.config",
    "read_history": "finetune.monitor",
    "read_recipe": "provenance",
    "read_workflow": "workflow.read",
    "refiner_check": "check",
    "rolled_up": "delta_table",
    "rounding_curve": "rounding",
    "sample": "sample",
    "sce": "delta_methods",
    "slerp": "model_methods",
    "sweep": "sweep",
    "ties": "delta_methods",
    "train_difference": "model_methods",
    "weighted_sum": "mixture",
    "write_workflow": "workflow.write",
}
# diffusers imports bitsandbytes where it is installed, which then warns on every CPU of a 4-bit kernel that nobody uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
_FAMILY = "mini"  # a module of its own: ak.mini.load("base")
__all__ = sorted([*_PUBLIC, _FAMILY])


def __getattr__(name: str) -> Any:
    if name == _FAMILY:
        return importlib.import_module("alkahest.mini")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'alkahest' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"alkahest.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keeps ``ak.sample`` the function once the module of that name is imported: imports set such attributes."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return [*globals(), *__all__]

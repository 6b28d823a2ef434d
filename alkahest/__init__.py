"""Alkahest: merge, measure and study Z-Image checkpoints.

>>> import alkahest as ak
>>> bridge = ak.open("alkahest_tb1.safetensors").protect("refiner")
>>> merged = bridge + 171.1 * (ak.open("variant.safetensors") - ak.open("base.safetensors"))
>>> merged.save("merged.safetensors")
"""

from __future__ import annotations

import importlib as _importlib
import logging as _logging
import sys as _sys
from pathlib import Path as _Path
from typing import TYPE_CHECKING
from typing import Any as _Any

from alkahest.files.namesake import refuse_namesake as _refuse_namesake
from alkahest.version import __version__ as __version__

if TYPE_CHECKING:
    from alkahest import mini as mini
    from alkahest.algebra.delta_methods import common as common
    from alkahest.algebra.delta_methods import model_stock as model_stock
    from alkahest.algebra.delta_methods import nuslerp as nuslerp
    from alkahest.algebra.delta_methods import sce as sce
    from alkahest.algebra.delta_methods import ties as ties
    from alkahest.algebra.delta_methods import union as union
    from alkahest.algebra.deltas import Delta as Delta
    from alkahest.algebra.methods import method as method
    from alkahest.algebra.mixtures import lerp as lerp
    from alkahest.algebra.mixtures import weighted_sum as weighted_sum
    from alkahest.algebra.model_methods import cosine_add as cosine_add
    from alkahest.algebra.model_methods import karcher as karcher
    from alkahest.algebra.model_methods import slerp as slerp
    from alkahest.algebra.model_methods import train_difference as train_difference
    from alkahest.algebra.sparse_methods import breadcrumbs as breadcrumbs
    from alkahest.algebra.sparse_methods import dare as dare
    from alkahest.algebra.sparse_methods import della as della
    from alkahest.algebra.weights import Weights as Weights
    from alkahest.engine.scalars import param as param
    from alkahest.errors import AlkahestError as AlkahestError
    from alkahest.files.cache import cached as cached
    from alkahest.files.cache import clear_cache as clear_cache
    from alkahest.lora.apply import apply_lora as apply_lora
    from alkahest.lora.extract import extract_lora as extract_lora
    from alkahest.lora.rank import lora_ranks as lora_ranks
    from alkahest.lora.write import convert_lora as convert_lora
    from alkahest.measure.lineage import nearest_base as nearest_base
    from alkahest.measure.lineage import refiner_check as refiner_check
    from alkahest.measure.multiplier import Multiplier as Multiplier
    from alkahest.measure.pairs import compare as compare
    from alkahest.measure.pairs import comparison_matrix as comparison_matrix
    from alkahest.measure.rounding import absorbed as absorbed
    from alkahest.measure.rounding import file_noise as file_noise
    from alkahest.measure.rounding import rounding_curve as rounding_curve
    from alkahest.measure.spectrum import delta_spectra as delta_spectra
    from alkahest.measure.table import delta_table as delta_table
    from alkahest.measure.table import rolled_up as rolled_up
    from alkahest.measure.units import matching_units as matching_units
    from alkahest.pictures.alignments import alignment as alignment
    from alkahest.pictures.effects import effect as effect
    from alkahest.pictures.fitted_factors import fit_factors as fit_factors
    from alkahest.pictures.gradients import gradient_signs as gradient_signs
    from alkahest.pictures.live import LiveModel as LiveModel
    from alkahest.pictures.needed import needed_multiplier as needed_multiplier
    from alkahest.pictures.pipelines import pipeline as pipeline
    from alkahest.pictures.preferences import preference_order as preference_order
    from alkahest.pictures.quality import flow_loss as flow_loss
    from alkahest.pictures.quality import picture_difference as picture_difference
    from alkahest.pictures.quality import picture_measures as picture_measures
    from alkahest.pictures.sampler import sample as sample
    from alkahest.pictures.searches import search as search
    from alkahest.pictures.sweeps import sweep as sweep
    from alkahest.recipes.read import read_recipe as read_recipe
    from alkahest.sources.checkpoint import Checkpoint as Checkpoint
    from alkahest.sources.checkpoint import open as open
    from alkahest.sources.lora import open_lora as open_lora
    from alkahest.sources.made_up_weights import made_up as made_up
    from alkahest.sources.partial import open_part as open_part
    from alkahest.sources.signs import open_signs as open_signs
    from alkahest.training.config import read_config as read_config
    from alkahest.training.loop import finetune as finetune
    from alkahest.training.memory import memory_plan as memory_plan
    from alkahest.training.monitor import read_history as read_history
    from alkahest.workflow.read import read_workflow as read_workflow
    from alkahest.workflow.write import write_workflow as write_workflow

# Public name -> the module that holds it; imported on first use, so that `import alkahest` is quick.
_PUBLIC = {
    "AlkahestError": "errors",
    "Checkpoint": "sources.checkpoint",
    "Delta": "algebra.deltas",
    "LiveModel": "pictures.live",
    "Multiplier": "measure.multiplier",
    "Weights": "algebra.weights",
    "absorbed": "measure.rounding",
    "alignment": "pictures.alignments",
    "apply_lora": "lora.apply",
    "breadcrumbs": "algebra.sparse_methods",
    "cached": "files.cache",
    "clear_cache": "files.cache",
    "common": "algebra.delta_methods",
    "compare": "measure.pairs",
    "comparison_matrix": "measure.pairs",
    "convert_lora": "lora.write",
    "cosine_add": "algebra.model_methods",
    "dare": "algebra.sparse_methods",
    "della": "algebra.sparse_methods",
    "delta_spectra": "measure.spectrum",
    "delta_table": "measure.table",
    "effect": "pictures.effects",
    "extract_lora": "lora.extract",
    "file_noise": "measure.rounding",
    "finetune": "training.loop",
    "fit_factors": "pictures.fitted_factors",
    "flow_loss": "pictures.quality",
    "gradient_signs": "pictures.gradients",
    "karcher": "algebra.model_methods",
    "lerp": "algebra.mixtures",
    "lora_ranks": "lora.rank",
    "made_up": "sources.made_up_weights",
    "matching_units": "measure.units",
    "memory_plan": "training.memory",
    "method": "algebra.methods",
    "model_stock": "algebra.delta_methods",
    "nearest_base": "measure.lineage",
    "needed_multiplier": "pictures.needed",
    "nuslerp": "algebra.delta_methods",
    "open": "sources.checkpoint",
    "open_lora": "sources.lora",
    "open_part": "sources.partial",
    "open_signs": "sources.signs",
    "param": "engine.scalars",
    "picture_difference": "pictures.quality",
    "picture_measures": "pictures.quality",
    "pipeline": "pictures.pipelines",
    "preference_order": "pictures.preferences",
    "read_config": "training.config",
    "read_history": "training.monitor",
    "read_recipe": "recipes.read",
    "read_workflow": "workflow.read",
    "refiner_check": "measure.lineage",
    "rolled_up": "measure.table",
    "rounding_curve": "measure.rounding",
    "sample": "pictures.sampler",
    "search": "pictures.searches",
    "sce": "algebra.delta_methods",
    "slerp": "algebra.model_methods",
    "sweep": "pictures.sweeps",
    "ties": "algebra.delta_methods",
    "train_difference": "algebra.model_methods",
    "union": "algebra.delta_methods",
    "weighted_sum": "algebra.mixtures",
    "write_workflow": "workflow.write",
}
_FAMILY = "mini"  # a module of its own: ak.mini.load("base")
__all__ = sorted([*_PUBLIC, _FAMILY])
_refuse_namesake(_Path(__file__).parent)
if "ipykernel" in _sys.modules:  # in a notebook, what takes longer than a second shows a bar with Cancel

    def _watch(events: _Any, operation: str) -> _Any:
        try:
            progress = _importlib.import_module("alkahest.lab.cell_progress")
        except ImportError:  # without the extra `lab`
            return events
        return progress.watch(events, operation)

    _importlib.import_module("alkahest.engine.events").watch_with(_watch)

# diffusers imports bitsandbytes where it is installed, which then warns on every CPU of a 4-bit kernel that nobody
# uses.
_logging.getLogger("bitsandbytes").setLevel(_logging.ERROR)


def __getattr__(name: str) -> _Any:
    if name == _FAMILY:
        return _importlib.import_module("alkahest.mini")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'alkahest' has no attribute {name!r}")
    value = getattr(_importlib.import_module(f"alkahest.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

"""What a run starts from and trains on: the start as an expression, data drawn, read and encoded, the model loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alkahest import mini
from alkahest.algebra.weights import Weights
from alkahest.engine.load import fill
from alkahest.engine.options import Options
from alkahest.engine.scalars import Rules
from alkahest.errors import FileFormatError, RecipeError
from alkahest.files.paths import MINI, expanded
from alkahest.model import seeded
from alkahest.model.dtypes import FORMATS
from alkahest.model.families import Family
from alkahest.model.keys import Pattern
from alkahest.pictures.components import load_components
from alkahest.pictures.dataset import Dataset, from_folder, from_scenes, stream_make_dataset
from alkahest.pictures.encoded import Encoded, encode
from alkahest.pictures.pipelines import empty_transformer, pipeline
from alkahest.pictures.sampler import embed
from alkahest.recipes.text import parse
from alkahest.sources.checkpoint import Checkpoint
from alkahest.sources.checkpoint import open as open_checkpoint
from alkahest.training import parallel
from alkahest.training.config import Config
from alkahest.training.events import TrainingStep


def open_inputs(config: Config) -> dict[str, Checkpoint]:
    """The checkpoints that a run names, opened: ``mini:NAME`` is one of the miniature family, all else a path or hub
    id.
    """
    inputs = {}
    for name, source in config.inputs.items():
        if source.startswith(MINI):
            inputs[name] = mini.load(source.removeprefix(MINI))
        else:
            found = config.folder / expanded(source, "finetune")
            inputs[name] = open_checkpoint(found if found.exists() else source, name=name)
    return inputs


def _components(config: Config) -> str | None:
    """A folder beside the configuration, or a hub id."""
    if config.components is None:
        return None
    found = config.folder / expanded(config.components, "finetune")
    return str(found) if found.exists() else config.components


def start_of(config: Config) -> Weights:
    """What a run starts from, as an expression over its inputs."""
    start = parse(config.start, open_inputs(config))
    if not isinstance(start, Weights):
        raise RecipeError(
            "finetune", "the start is not a complete model", found=config.start, fix="add the delta to a checkpoint"
        )
    return start


def reset_tensors(model: nn.Module, pattern: Pattern, seed: int) -> None:
    """Give matrices random numbers of the spread that they had, seeded; vectors stay."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and pattern.matches(name):
                numbers = seeded.generator(seed, "reset", name, 0).standard_normal(parameter.numel(), dtype="float32")
                spread = parallel.whole(parameter).float().std().cpu()
                parallel.assign(parameter, torch.from_numpy(numbers).view(parameter.shape) * spread)


def prepare(
    config: Config, start: Weights, folder: Path, device: str
) -> Generator[TrainingStep, None, tuple[dict[tuple[str, int], Encoded], Any]]:
    """Draw and encode the data, then load the model: events; returns data by name and resolution, and the pipeline.

    The text encoder has left the device by then: a model that is trained needs the room.
    """
    from diffusers import ZImagePipeline

    form = FORMATS["bf16" if config.precision == "bf16" else "fp32"].torch
    pipe = ZImagePipeline(transformer=None, **load_components(start, _components(config), form))
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    encoded: dict[tuple[str, int], Encoded] = {}
    datasets: dict[str, Dataset] = {}
    with parallel.first_here():
        for stage in config.stages:
            for name in stage.mix:
                if name not in datasets:
                    datasets[name] = yield from _dataset(name, config, folder, pipe)
                if (name, stage.resolution) not in encoded:
                    encoding = encode(datasets[name], pipe, stage.resolution, strict=config.strict)
                    found = yield from _relay(config, f"encoding {name}", encoding)
                    encoded[name, stage.resolution] = found
                    for note in files_words(name, found.skipped, found.notes):
                        yield TrainingStep(0, config.steps, note, note=note)
    for prompt in (*config.prompts, "", str(config.sampling.get("negative_prompt", ""))):
        embed(pipe, prompt)  # remembered for the pictures to come
    pipe.text_encoder.to("cpu")
    pipe.transformer = (_transformer if parallel.size() == 1 else _shard)(start, config, form, device)
    return encoded, pipe


def _transformer(start: Weights, config: Config, form: torch.dtype, device: str) -> Any:
    model = empty_transformer(start, form, device=device)
    start.load_into(model)
    lighten(model, config, start.family)
    return model


def lighten(model: nn.Module, config: Config, family: Family) -> None:
    """Of a mixed run, keep in bf16 what is not trained."""
    if config.precision == "mixed":
        for name, parameter in model.named_parameters():
            if not config.trains(name, family):
                parameter.data = parameter.data.bfloat16()


def blocks_of(model: Any, family: Family) -> list[nn.Module]:
    """The blocks of all stacks of a live model."""
    return [block for stack in family.stacks for block in getattr(model, stack, None) or ()]


def _shard(start: Weights, config: Config, form: torch.dtype, device: str) -> Any:
    """A transformer that is spread over the processes, block by block: none of them ever holds all of it."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = empty_transformer(start, form, device="meta")
    lighten(model, config, start.family)
    mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = mixed if config.precision == "mixed" else MixedPrecisionPolicy()
    for module in (*blocks_of(model, start.family), model):
        fully_shard(module, mesh=parallel.mesh(torch.device(device).type), mp_policy=policy)
    model.to_empty(device=device)
    options = Options()
    for key, parameter in model.named_parameters():
        values, term = torch.empty(start.shapes[key], dtype=parameter.dtype), start.at(key, Rules())
        assert term is not None  # every key of the shapes has one
        for _ in fill({key: term}, {key: values}, options):
            pass
        parallel.assign(parameter, values)
    return model


def _dataset(name: str, config: Config, folder: Path, pipe: Any) -> Generator[TrainingStep, None, Dataset]:
    ((kind, given),) = config.data[name].items()
    if kind == "folder":
        place = config.folder / expanded(str(given), "finetune")
        return from_folder(place, strict=config.strict, background=config.background)
    if kind == "scenes":
        return _scenes(given)
    if "scenes" in given:
        prompts = [example.caption for example in _scenes(given["scenes"]).examples]
    else:
        path = config.folder / expanded(str(given["prompts"]), "finetune")
        try:
            prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise FileFormatError(
                "finetune", "the prompts cannot be read", file=path, found=error, fix="a text file with a prompt a line"
            ) from None
    models = _Models(given["models"], open_inputs(config), pipe)
    found: Dataset = yield from _relay(
        config, f"drawing {name}", stream_make_dataset(models, prompts, folder / "data" / name)
    )
    return found


def files_words(name: str, skipped: Mapping[str, str], notes: Mapping[str, str]) -> Iterator[str]:
    """What a dataset leaves out, and what it does not take as it is, a line each; nothing for nothing."""
    for what, files in (("files are left out", skipped), ("pictures are not taken as they are", notes)):
        if files:
            reasons = Counter(files.values()).most_common()
            told = "; ".join(f"{count}: {why}" for why, count in reasons[:4]) + ("; ..." if len(reasons) > 4 else "")
            yield f"{name}: {len(files)} {what} ({told})"


class _Models(Mapping[str, Any]):
    """Pipelines by name, each made when it is its turn, so that one is in memory at a time."""

    def __init__(self, settings: Mapping[str, Mapping[str, Any]], inputs: Mapping[str, Checkpoint], pipe: Any) -> None:
        self._settings, self._inputs, self._pipe = settings, inputs, pipe

    def __getitem__(self, name: str) -> tuple[Any, dict[str, Any]]:
        return pipeline(self._inputs[name], self._pipe), dict(self._settings[name])

    def __contains__(self, name: object) -> bool:
        return name in self._settings

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)


def _scenes(given: Mapping[str, Any]) -> Dataset:
    fixed: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return from_scenes(fixed.pop("count"), fixed.pop("seed"), **fixed)


def _relay(config: Config, what: str, events: Iterator[Any]) -> Generator[TrainingStep, None, Any]:
    """Pass on the progress of something that comes before training; returns its result."""
    result = None
    for event in events:
        result = event.result
        yield TrainingStep(0, config.steps, f"{what}: {event.done} of {event.total}")
    return result

"""``alkahest mini build``: the whole family from seeds, stage by stage, resumable."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from alkahest import mini
from alkahest.engine.events import Event
from alkahest.engine.options import existing_device
from alkahest.errors import unknown
from alkahest.experiment.growing import BRIDGES, models, parts
from alkahest.experiment.growing.lessons import (
    Pairs,
    Trajectories,
    flow_matching,
    imitation,
    join,
    teach,
    train,
)
from alkahest.files.hashes import blake3_of
from alkahest.files.reader import Reader
from alkahest.files.whole import write_text
from alkahest.mini.judge import Judge
from alkahest.mini.scenes import NEW_COLOUR, NEW_STYLE, NEW_SUBJECT, STYLES, Scene, scenes
from alkahest.model.families.zimage import FAMILY
from alkahest.pictures.components import quiet
from alkahest.pictures.encoded import embeddings
from alkahest.sources.checkpoint import open as open_checkpoint
from alkahest.training.config import read_config
from alkahest.training.loop import stream_finetune

Progress = Iterator[tuple[int, float]]
_START = 0  # the seed of the random start that both lineages share
_SMALL_DELTA = 5.0  # a tether for what is made from a lineage: its difference should be what it learnt, and little else
_TETHER = 2.0  # keeps them within a cosine of about 0.87, as far as separate trainings by AdamW end up


@dataclass(frozen=True)
class Stage:
    """One file of the family and how it is made: a generator of (step, loss) that ends with it saved."""

    name: str
    make: Callable[[Workshop], Progress]
    steps: int
    how: str
    seed: int
    only_for: tuple[str, ...] = ()  # of a stage that is not shipped: those that are made from it


class Workshop:
    """A folder that fills up with the family, and what stages need of it."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder = folder
        self.components = folder / "components"
        self.device = device

    @cached_property
    def pipe(self) -> Any:
        """A pipeline with the trained components; its transformer is whichever is at work."""
        with quiet():
            from diffusers import ZImagePipeline

            pipe = ZImagePipeline.from_pretrained(self.components, transformer=models.transformer(_START))
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.device)

    @cached_property
    def empty(self) -> Tensor:
        return self.embed([""])[0]

    def embed(self, captions: list[str]) -> list[Tensor]:
        return embeddings(self.pipe.tokenizer, self.pipe.text_encoder, captions)

    def pairs(self, drawn: list[Scene]) -> Pairs:
        vae = self.pipe.vae
        with torch.no_grad():
            latents = torch.cat(
                [
                    vae.encode(parts.pictures(drawn[n : n + 200], self.device)).latent_dist.mode()
                    for n in range(0, len(drawn), 200)
                ]
            )
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        return Pairs(latents, self.embed([scene.training_caption() for scene in drawn]), self.empty)

    def model(self, name: str | None) -> Any:
        """A member as built here, in float32; None is the common random start."""
        model = models.transformer(_START)
        if name is not None:
            open_checkpoint(self.folder / f"{name}.safetensors").load_into(model)
        self.pipe.transformer = model.eval().to(self.device)
        return model

    def save(self, model: nn.Module, name: str, dtype: torch.dtype = torch.bfloat16) -> None:
        """Native names in one file, as ComfyUI and everybody else writes them."""
        state = model.state_dict()
        groups = FAMILY.layout("native").group(state)
        made = {stored: torch.cat([state[key] for key in keys]).to("cpu", dtype) for stored, keys in groups.items()}
        path = self.folder / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file(made, path)

    def teach(self, count: int, seed: int, style: str, **how: Any) -> Iterator[Trajectories]:
        captions = self.embed([scene.training_caption() for scene in scenes(count, seed, style=style)])
        return teach(self.pipe, captions, self.empty, seed, **how)


def build(folder: Path, only: str | None = None, device: str = "cpu") -> Iterator[Event]:
    """Make every stage that ``folder`` does not hold yet, on a CPU or a GPU; a generator of events.

    A stage that is done and unchanged (by BLAKE3 in manifest.json) is not made again, so a build that
    was stopped goes on with the stage it was in. Ends after the stage ``only``; UnknownNameError if there is none.
    """
    names = [stage.name for stage in STAGES]
    if only is not None and only not in names:
        raise unknown("mini build", "no such stage", only, names)
    shop = Workshop(folder, str(existing_device(device, "mini build")))
    folder.mkdir(parents=True, exist_ok=True)
    total, done = sum(stage.steps for stage in STAGES), 0
    for stage in STAGES:
        needless = stage.only_for and all(_is_done(folder, _stage(name)) for name in stage.only_for)
        if not needless and not _is_done(folder, stage):
            started, loss = time.perf_counter(), float("nan")
            for step, loss in stage.make(shop):
                yield Event(done + step, total, f"{stage.name}, loss {loss:.3f}" if step else f"{stage.name}, drawing")
            _record(folder, stage, round(time.perf_counter() - started, 1), loss)
        done += stage.steps
        yield Event(done, total, stage.name)
        if stage.name == only:
            return


def closeness(folder: Path) -> pd.DataFrame:
    """How near the members in ``folder`` are to the shipped ones: cosine and relative distance of their weights."""
    rows = []
    for name in mini.FAMILY:
        if not (folder / f"{name}.safetensors").is_file():
            continue
        rebuilt, shipped = open_checkpoint(folder / f"{name}.safetensors"), mini.load(name)
        a, b = (torch.cat([one[key].double().flatten() for key in shipped]) for one in (rebuilt, shipped))
        rows.append(
            {
                "member": name,
                "cosine": float(a @ b / (a.norm() * b.norm())),
                "distance": float((a - b).norm() / b.norm()),
            }
        )
    return pd.DataFrame(rows, columns=["member", "cosine", "distance"])


def _stage(name: str) -> Stage:
    return next(stage for stage in STAGES if stage.name == name)


def _is_done(folder: Path, stage: Stage) -> bool:
    record = _manifest(folder).get(stage.name)
    return record is not None and record["hash"] == _hash(folder, stage.name) and record["how"] == stage.how


def _record(folder: Path, stage: Stage, seconds: float, loss: float) -> None:
    record = {
        "hash": _hash(folder, stage.name),
        "how": stage.how,
        "seed": stage.seed,
        "steps": stage.steps,
        "seconds": seconds,
        "loss": round(loss, 5) if math.isfinite(loss) else None,
    }
    text = json.dumps({**_manifest(folder), stage.name: record}, indent=1) + "\n"
    write_text(folder / "manifest.json", text)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _hash(folder: Path, name: str) -> str:
    """BLAKE3 of a file, or of each file of a component folder in order; empty if there is none."""
    path = folder / f"{name}.safetensors"
    files = [path] if path.is_file() else sorted(p for p in (folder / name).rglob("*") if p.is_file())
    return " ".join(blake3_of([Reader(file) for file in files]))


# --- stages --------------------------------------------------------------------------------------


def _text(shop: Workshop) -> Progress:
    tokenizer = models.tokenizer(scene.training_caption() for scene in parts.everything(3000, 5))
    encoder = models.text_encoder(len(tokenizer), 1).to(shop.device)
    yield from parts.train_text_encoder(encoder, tokenizer, 400, 11)
    tokenizer.save_pretrained(shop.components / "tokenizer")
    with quiet():
        encoder.save_pretrained(shop.components / "text_encoder")
    models.scheduler().save_pretrained(shop.components / "scheduler")


def _vae(shop: Workshop) -> Progress:
    vae = models.vae(2).to(shop.device)
    yield from parts.train_vae(vae, 3000, 12)
    vae.save_pretrained(shop.components / "vae")
    index = {
        "_class_name": "ZImagePipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (shop.components / "model_index.json").write_text(json.dumps(index, indent=2))


def _judge(shop: Workshop) -> Progress:
    torch.manual_seed(3)
    judge = Judge().to(shop.device)
    yield from parts.train_judge(judge, shop.pipe.vae, 1000, 13)
    state = {name: value.half().cpu() for name, value in judge.state_dict().items()}
    save_file(state, shop.folder / "judge.safetensors")


def _lineage(name: str, parent: str | None, style: Any, seed: int, steps: int) -> Callable[[Workshop], Progress]:
    def make(shop: Workshop) -> Progress:
        model = shop.model(parent)
        pairs = shop.pairs(list(scenes(12000, seed, style=style)))
        yield from train(model, flow_matching(pairs), steps, rate=0.015, seed=seed, tether=_TETHER)
        shop.save(model, name)

    return make


def _gather(parts: Iterator[Trajectories]) -> Generator[tuple[int, float], None, Trajectories]:
    """All trajectories as one, with a sign of life for each batch drawn: step 0."""
    found = []
    for part in parts:
        found.append(part)
        yield 0, float("nan")
    return join(found)


def _turbo(shop: Workshop) -> Progress:
    shop.model("intermediate/turbo-undistilled")
    taught = yield from _gather(shop.teach(1152, 31, "anime", steps=24, every=3, cfg=3.0))
    model = shop.model("intermediate/turbo-undistilled")
    yield from train(model, imitation(taught), 600, rate=0.0015, seed=32, tether=_SMALL_DELTA)
    shop.save(model, "turbo")


def _deturbo(shop: Workshop) -> Progress:
    model = shop.model("turbo")
    drawn = yield from _gather(shop.teach(2496, 41, "anime", steps=8, every=8, cfg=1.0))
    pairs = Pairs(drawn.latents[:, -1], drawn.captions, shop.empty)
    yield from train(model, flow_matching(pairs), 500, rate=0.001, seed=42, tether=_SMALL_DELTA)
    shop.save(model, "deturbo")


def _derive(
    name: str,
    parent: str,
    style: str,
    seed: int,
    steps: int,
    rate: float,
    trainable: Callable[[str], bool],
    new: dict[str, Any],
) -> Callable[[Workshop], Progress]:
    """A member fine-tuned on something new; ``new`` fixes attributes of its scenes."""

    def make(shop: Workshop) -> Progress:
        model = shop.model(parent)
        pairs = shop.pairs(_lesson(style, seed, new))
        yield from train(model, flow_matching(pairs), steps, rate=rate, seed=seed, trainable=trainable, muon=False)
        shop.save(model, name, torch.float32 if name == "base-weak" else torch.bfloat16)

    return make


def _lesson(style: str, seed: int, new: dict[str, Any]) -> list[Scene]:
    """Scenes with something new in them and others beside it; of a new style, which no caption asks for, all are."""
    if "style" in new:
        return list(scenes(4000, seed, **new))
    return [*scenes(2400, seed, **{"style": style, **new}), *scenes(1600, seed + 1, style=style)]


def _weak_bf16(shop: Workshop) -> Progress:
    shop.save(shop.model("base-weak"), "base-weak-bf16")
    yield 1, float("nan")


def _lora(name: str, parent: str, style: str, seed: int, steps: int, distill: bool) -> Callable[[Workshop], Progress]:
    def make(shop: Workshop) -> Progress:
        model = shop.model(parent)
        if distill:
            batches = imitation((yield from _gather(shop.teach(384, seed, style, steps=24, every=6, cfg=3.0))))
        else:
            batches = flow_matching(shop.pairs(_lesson(style, seed, {"style": NEW_STYLE})))
        model.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=_LORA_TARGETS))
        yield from train(model, batches, steps, rate=0.01, seed=seed, trainable=lambda key: "lora_" in key)
        layers = {key: value.to("cpu", torch.bfloat16) for key, value in get_peft_model_state_dict(model).items()}
        shop.pipe.save_lora_weights(shop.folder, layers, weight_name=f"{name}.safetensors")

    return make


def _bridge(name: str) -> Callable[[Workshop], Progress]:
    """A bridge, grown by the trainer that grows any, from the configuration that is committed for it."""

    def make(shop: Workshop) -> Progress:
        config = read_config(BRIDGES / f"{name}.toml")
        inputs = {member: f"{member}.safetensors" for member in config.inputs}
        config = replace(config, inputs=inputs, components="components", folder=shop.folder)
        for event in stream_finetune(config, shop.folder / "runs" / name, shop.device):
            yield event.done, event.loss
            if event.result is not None:
                event.result.weights.save(shop.folder / f"{name}.safetensors", dtype="bf16")

    return make


def _layers(key: str) -> bool:
    return key.startswith("layers.")


def _refiners_most(key: str) -> bool:
    return "_refiner." in key or key.startswith("layers.0.")


_LORA_TARGETS = r"layers\.\d+\.(attention\.to_(q|k|v|out\.0)|feed_forward\.w[123])"
STAGES = [
    Stage("components/text_encoder", _text, 400, "captions continued and summed up", 11),
    Stage("components/vae", _vae, 3000, "scenes of every kind, noise on the latents", 12),
    Stage("judge", _judge, 1000, "scenes of every kind, half of them through the VAE", 13),
    Stage(
        "intermediate/young",
        _lineage("intermediate/young", None, STYLES, 20, 60),
        60,
        "flow matching on scenes of both styles, for a start in common",
        20,
        only_for=("base", "turbo"),
    ),
    Stage(
        "base",
        _lineage("base", "intermediate/young", "photo", 21, 1500),
        1500,
        "flow matching on shaded scenes from the young model",
        21,
    ),
    Stage(
        "intermediate/turbo-undistilled",
        _lineage("intermediate/turbo-undistilled", "intermediate/young", "anime", 22, 1500),
        1500,
        "flow matching on outlined scenes from the young model",
        22,
        only_for=("turbo",),
    ),
    Stage("turbo", _turbo, 600, "imitation in 8 steps of turbo-undistilled at 24 steps and cfg 3", 32),
    Stage("deturbo", _deturbo, 500, "flow matching on pictures drawn by turbo, 10 % of captions dropped", 42),
    Stage(
        "base-variant",
        _derive("base-variant", "base", "photo", 51, 250, 0.0003, _layers, {"colour": NEW_COLOUR}),
        250,
        "base, layers only: the colour cyan",
        51,
    ),
    Stage(
        "turbo-variant",
        _derive("turbo-variant", "deturbo", "anime", 53, 250, 0.0003, _layers, {"subject": NEW_SUBJECT}),
        250,
        "deturbo, layers only: hearts",
        53,
    ),
    Stage(
        "base-weak",
        _derive("base-weak", "base", "photo", 51, 250, 0.0000001, _layers, {"colour": NEW_COLOUR}),
        250,
        "as base-variant at a three-thousandth of its rate; float32",
        51,
    ),
    Stage("base-weak-bf16", _weak_bf16, 1, "base-weak rounded to bfloat16", 51),
    Stage(
        "base-refiner-trained",
        _derive("base-refiner-trained", "base", "photo", 55, 300, 0.003, _refiners_most, {"style": NEW_STYLE}),
        300,
        "base, refiners and first layer at a high rate: sketches",
        55,
    ),
    Stage("base-lora", _lora("base-lora", "base", "photo", 61, 250, False), 250, "base: sketches, rank 8", 61),
    Stage("turbo-lora", _lora("turbo-lora", "deturbo", "anime", 63, 250, False), 250, "deturbo: sketches, rank 8", 63),
    Stage(
        "base-distill-lora",
        _lora("base-distill-lora", "base", "photo", 65, 300, True),
        300,
        "base: 4 steps and cfg 1, rank 8",
        65,
    ),
    Stage(
        "turbo-distill-lora",
        _lora("turbo-distill-lora", "deturbo", "anime", 67, 300, True),
        300,
        "deturbo: 4 steps and cfg 1, rank 8",
        67,
    ),
    Stage(
        "tb0", _bridge("tb0"), 1000, "turbo + base, averaged refiners frozen: alkahest/experiment/growing/tb0.toml", 0
    ),
    Stage(
        "tb1", _bridge("tb1"), 1250, "deturbo + base, averaged refiners frozen: alkahest/experiment/growing/tb1.toml", 1
    ),
]

"""The shipped family: files as the manifest says, and models that do what the README says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline

import alkahest as ak
from alkahest import mini
from alkahest.experiment.growing import build, models, parts
from alkahest.experiment.growing.report import FAST
from alkahest.mini.judge import attributes, load_judge
from alkahest.mini.scenes import NEW_COLOUR, NEW_STYLE, NEW_SUBJECT, Scene, held_out_prompts
from alkahest.model.families.zimage import infer
from alkahest.pictures.sampler import sample

ASKED = held_out_prompts(24, seed=7)
GUIDED = {"steps": 12, "cfg": 3.0}  # as the experiments draw
PLAIN = ("subject", "colour", "place", "light", "side")


def drawn(weights: Any, asked: Sequence[Scene], how: Mapping[str, Any], lora: str | None = None) -> Any:
    pipe = ak.pipeline(weights)
    if lora is not None:
        pipe.load_lora_weights(str(mini.lora(lora)), adapter_name="lora")
    loras = {} if lora is None else {"lora": 1.0}
    return attributes(sample(pipe, [scene.caption() for scene in asked], batch=36, loras=loras, **how).images)


def right(read: Any, asked: Sequence[Scene], name: str) -> float:
    return float(np.mean([getattr(scene, name) == found for scene, found in zip(asked, read[name], strict=True)]))


def test_the_files_are_those_of_the_manifest() -> None:
    manifest = mini.manifest()
    assert list(manifest) == [stage.name for stage in build.STAGES]
    assert {*mini.FAMILY, *mini.LORAS} <= set(manifest)
    for stage in build.STAGES:
        record = manifest[stage.name]
        assert (record["how"], record["seed"], record["steps"]) == (stage.how, stage.seed, stage.steps)
        if not stage.only_for:  # the others are not shipped
            assert record["hash"] == build._hash(mini.WEIGHTS, stage.name), stage.name
    assert sum(file.stat().st_size for file in mini.WEIGHTS.rglob("*") if file.is_file()) <= 40e6


def test_members_are_native_files_of_one_architecture() -> None:
    for name in mini.family():
        member = mini.load(name)
        assert member.layout == "native"
        assert infer(member.shapes, name) == models.ARCHITECTURE
        assert all(torch.isfinite(member[key]).all() for key in member)
        assert {member[key].dtype for key in member} == {torch.float32 if name == "base-weak" else torch.bfloat16}


def test_what_derivatives_leave_alone() -> None:
    for name, parent in {"base-variant": "base", "turbo-variant": "deturbo", "base-weak-bf16": "base"}.items():
        ours, theirs = mini.load(name), mini.load(parent)
        changed = {key.split(".")[0] for key in ours if not torch.equal(ours[key], theirs[key])}
        assert changed == {"layers"}, name
    trained, base = mini.load("base-refiner-trained"), mini.load("base")
    assert not torch.equal(
        trained["noise_refiner.0.attention.to_q.weight"], base["noise_refiner.0.attention.to_q.weight"]
    )
    weak, rounded = mini.load("base-weak"), mini.load("base-weak-bf16")
    assert all(torch.equal(weak[key].bfloat16(), rounded[key]) for key in weak)


def test_separately_trained_lineages_are_apart() -> None:
    base, turbo = mini.load("base"), mini.load("turbo")
    for part, most in {"layers": 0.9, "noise_refiner": 0.999, "context_refiner": 0.999}.items():
        one, two = (torch.cat([m[key].double().flatten() for key in base.part(part)]) for m in (base, turbo))
        assert float(one @ two / (one.norm() * two.norm())) < most, part


def test_the_judge_and_the_vae_are_good_enough() -> None:
    found = parts.accuracy(load_judge(), 400, seed=5)
    assert min(found.values()) >= 0.97, found
    assert float(parts.psnr(ak.pipeline(mini.load("base")).vae, 100, seed=6).mean()) >= 30


@pytest.mark.parametrize(
    ("name", "how", "style"), [("base", GUIDED, "photo"), ("turbo", FAST, "anime"), ("deturbo", GUIDED, "anime")]
)
def test_members_draw_what_they_are_told(name: str, how: Mapping[str, Any], style: str) -> None:
    read = drawn(mini.load(name), ASKED, how)
    for attribute in PLAIN:
        assert right(read, ASKED, attribute) >= 0.8, attribute
    assert (read["style"] == style).mean() >= 0.75  # low quality blurs the outlines


def test_the_naive_merge_has_lost_its_subject() -> None:
    merged = ak.lerp(mini.load("base"), mini.load("turbo"), 0.5)
    for how in (GUIDED, FAST):
        assert right(drawn(merged, ASKED, how), ASKED, "subject") <= 0.45


def test_a_bridge_draws_again_with_the_refiners_of_the_merge() -> None:
    base, deturbo, bridge = (mini.load(name) for name in ("base", "deturbo", "tb1"))
    for key in base.part("refiner"):
        assert torch.equal(bridge[key], ((base[key].double() + deturbo[key].double()) / 2).bfloat16()), key
    read = drawn(bridge, ASKED, GUIDED)
    for attribute in (*PLAIN, "quality"):
        assert right(read, ASKED, attribute) >= 0.85, attribute


def test_derivatives_come_over_to_a_bridge() -> None:
    bridge = mini.load("tb1").protect("refiner")
    heart = [replace(scene, subject=NEW_SUBJECT) for scene in ASKED[:12]]
    cyan = [replace(scene, colour=NEW_COLOUR) for scene in ASKED[:12]]
    hearts = bridge + 1.5 * (mini.load("turbo-variant") - mini.load("deturbo"))
    assert right(drawn(hearts, heart, GUIDED), heart, "subject") >= 0.7
    cyans = bridge + 5.0 * (mini.load("base-variant") - mini.load("base"))
    assert right(drawn(cyans, cyan, GUIDED), cyan, "colour") >= 0.3
    assert right(drawn(bridge, cyan, GUIDED), cyan, "colour") == 0


def test_what_derivatives_learned() -> None:
    cyan = [replace(scene, colour=NEW_COLOUR) for scene in ASKED[:12]]
    heart = [replace(scene, subject=NEW_SUBJECT) for scene in ASKED[:12]]
    base, weak = mini.load("base"), mini.load("base-weak") - mini.load("base")
    assert right(drawn(mini.load("base-variant"), cyan, GUIDED), cyan, "colour") >= 0.7
    assert right(drawn(mini.load("turbo-variant"), heart, GUIDED), heart, "subject") >= 0.7
    assert right(drawn(base + weak, cyan, GUIDED), cyan, "colour") <= 0.2, "a weak delta does not show at 1x"


def test_loras_do_what_they_say() -> None:
    asked = ASKED[:12]
    for name, parent in {"base-lora": "base", "turbo-lora": "deturbo"}.items():
        assert (drawn(mini.load(parent), asked, GUIDED, name)["style"] == NEW_STYLE).mean() >= 0.7, name
    for name, parent in {"base-distill-lora": "base", "turbo-distill-lora": "deturbo"}.items():
        assert right(drawn(mini.load(parent), ASKED, FAST, name), ASKED, "subject") >= 0.7, name


def test_a_pipeline_folder_is_what_diffusers_loads(tmp_path: Path) -> None:
    folder = mini.save_pipeline("turbo", tmp_path / "turbo")
    pipe = ZImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    prompt = "a red ball on the left of a meadow at night"
    by_hand = pipe(
        prompt,
        height=64,
        width=64,
        num_inference_steps=8,
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    ours = sample(ak.pipeline(mini.load("turbo")), prompt, seed=3, **FAST).images[0]
    assert np.array_equal(np.asarray(by_hand), np.asarray(ours))
    with pytest.raises(ak.AlkahestError, match="in the way"):
        mini.save_pipeline("turbo", folder)


def test_a_batch_draws_what_single_pictures_are() -> None:
    pipe = ak.pipeline(mini.load("base"))
    prompts = [scene.caption() for scene in ASKED[:4]]
    together = sample(pipe, prompts, seed=5, batch=4, **GUIDED).images
    for number, prompt in enumerate(prompts):
        alone = sample(pipe, prompt, seed=5 + number, **GUIDED).images[0]
        # 8-bit pictures of the same floats up to rounding.
        assert np.abs(np.asarray(together[number], float) - np.asarray(alone, float)).max() <= 1


def test_a_live_merge_is_the_merged_file(tmp_path: Path) -> None:
    base, variant = mini.load("base"), mini.load("base-variant")
    live = ak.LiveModel(base.protect("refiner") + ak.param("k", 1.0) * (variant - base))
    live.set({"k": 2.5})
    (base.protect("refiner") + 2.5 * (variant - base)).save(tmp_path / "merged.safetensors", dtype="fp32")
    fresh = ak.pipeline(ak.open(tmp_path / "merged.safetensors")).transformer.state_dict()
    for key, value in live.pipe.transformer.state_dict().items():
        assert torch.equal(value, fresh[key]), key


def test_closeness_of_the_family_with_itself() -> None:
    table = build.closeness(mini.WEIGHTS)
    assert list(table.member) == list(mini.FAMILY)
    assert table.cosine.to_numpy() == pytest.approx(1.0)
    assert (table.distance == 0).all()

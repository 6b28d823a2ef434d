from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from alkahest.experiment.growing import build, models, report
from alkahest.experiment.growing.lessons import (
    Pairs,
    Trajectories,
    descend,
    flow_matching,
    imitation,
    is_inner,
    join,
    train,
)
from alkahest.experiment.growing.muon import Muon, orthogonal
from alkahest.experiment.growing.report import interval
from alkahest.mini.judge import Judge, attributes
from alkahest.mini.scenes import scenes
from alkahest.pictures.encoded import chat, embeddings


def test_orthogonal_is_near_the_polar_factor() -> None:
    torch.manual_seed(0)
    for shape in ((3, 12, 20), (2, 20, 12)):
        matrices = torch.randn(shape, dtype=torch.float64)
        made = orthogonal(matrices)
        assert made.shape == shape
        values = torch.linalg.svdvals(made)
        assert values.min() > 0.3
        assert values.max() < 1.3
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        polar = left @ right
        assert torch.nn.functional.cosine_similarity(made.flatten(1), polar.flatten(1)).min() > 0.97


def test_muon_agrees_with_torch() -> None:
    torch.manual_seed(1)
    start = torch.randn(24, 40)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = Muon([ours], lr=0.02)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        gradient = torch.randn(24, 40, generator=torch.Generator().manual_seed(seed))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        reference.step()
    moved, expected = (p.detach() - start for p in (ours, theirs))
    # torch rounds to bfloat16 on the way.
    assert torch.nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.999
    assert moved.norm() == pytest.approx(float(expected.norm()), rel=0.03)


def pairs(count: int = 6) -> Pairs:
    torch.manual_seed(2)
    captions = [torch.randn(5 + n, 64) for n in range(count)]
    return Pairs(torch.randn(count, 16, 8, 8), captions, torch.zeros(3, 64))


def test_flow_matching_batches() -> None:
    data = pairs()
    mixed, time, captions, target = flow_matching(data, batch=400, drop=0.25, shift=2.0)(
        torch.Generator().manual_seed(0)
    )
    sigma = (1 - time)[:, None, None, None]
    # target = data - noise and mixed = (1 - sigma) data + sigma noise give the data back.
    recovered = mixed + sigma * target
    nearest = torch.cdist(
        recovered.flatten(1), data.latents.flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
    ).min(1)
    assert nearest.values.max() < 1e-3
    dropped = np.mean([caption is data.empty for caption in captions])
    assert 0.15 < dropped < 0.35
    for row, caption in zip(nearest.indices, captions, strict=True):
        assert caption is data.empty or caption is data.captions[int(row)]
    # A logit-normal has median 1/2; shifted by 2 it is 2/3.
    assert float((1 - time).median()) == pytest.approx(2 / 3, abs=0.05)


def test_imitation_batches_follow_the_teacher() -> None:
    torch.manual_seed(3)
    parts_ = [
        Trajectories(torch.randn(2, 4, 16, 8, 8), torch.tensor([1.0, 0.7, 0.4, 0.0]), [torch.randn(4, 64)] * 2)
        for _ in range(2)
    ]
    taught = join(parts_)
    assert taught.latents.shape[0] == len(taught.captions) == 4
    here, time, _, target = imitation(taught, batch=50)(torch.Generator().manual_seed(1))
    for n in range(50):
        step = int((taught.sigmas - (1 - time[n])).abs().argmin())
        row = int((taught.latents[:, step] - here[n]).flatten(1).norm(dim=1).argmin())
        assert torch.equal(here[n], taught.latents[row, step])
        fall = float(taught.sigmas[step] - taught.sigmas[step + 1])
        # The pipeline's Euler step x + (sigma' - sigma) * (-prediction) lands on the teacher's next state.
        assert torch.allclose(here[n] + fall * target[n], taught.latents[row, step + 1], atol=1e-5)


def test_training_lowers_the_loss_repeats_and_freezes() -> None:
    runs = []
    for _ in range(2):
        model = models.transformer(0)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        losses = [
            loss
            for _, loss in train(
                model,
                flow_matching(pairs(), batch=8),
                12,
                rate=0.01,
                seed=5,
                trainable=lambda n: n.startswith("layers."),
            )
        ]
        runs.append((losses, model.state_dict()))
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]) != name.startswith("layers."), name
        assert not any(p.requires_grad for p in model.parameters())
    assert np.mean(runs[0][0][-4:]) < np.mean(runs[0][0][:4])
    assert runs[0][0] == runs[1][0]
    for name, value in runs[0][1].items():
        assert torch.equal(value, runs[1][1][name]), name


def test_who_is_trained_by_what() -> None:
    inner = {name for name, p in models.transformer(0).named_parameters() if is_inner(name, p)}
    assert "layers.0.attention.to_q.weight" in inner
    assert "noise_refiner.1.adaLN_modulation.0.weight" in inner
    assert not any("norm" in name or "bias" in name or "embedder.2-1" in name or "pad_token" in name for name in inner)


def test_the_family_is_real_classes_of_one_architecture() -> None:
    model = models.transformer(0)
    assert dict(model.config)["axes_dims"] == [8, 8, 8]
    from alkahest.model.families.zimage import infer

    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert infer(shapes, "memory") == models.ARCHITECTURE
    again = models.transformer(0).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    assert not torch.equal(
        models.transformer(1).state_dict()["layers.0.attention.to_q.weight"], again["layers.0.attention.to_q.weight"]
    )


def test_the_tokenizer_has_a_token_a_word_and_reads_anything(tmp_path: Path) -> None:
    captions = [scene.training_caption() for scene in scenes(600, 0)]
    tokenizer = models.tokenizer(captions)
    assert len(tokenizer("a red ball at night").input_ids) == 5
    text = "Grüße, 红球!"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    longest = max(len(tokenizer(chat(tokenizer, caption)).input_ids) for caption in captions)
    assert longest <= 32, "a caption must fit one block of 32 tokens"
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path)
    assert chat(again, captions[0]) == chat(tokenizer, captions[0])
    assert again(captions[0]).input_ids == tokenizer(captions[0]).input_ids


def test_many_embeddings_are_those_of_the_pipeline() -> None:
    from diffusers import ZImagePipeline

    tokenizer = models.tokenizer(["a red ball"])
    encoder = models.text_encoder(len(tokenizer), 0)
    pipe = ZImagePipeline(models.scheduler(), models.vae(0), encoder, tokenizer, models.transformer(0))
    captions = ["a red ball", "", "a ball on a red ball", "a red ball"]
    for one, two in zip(
        embeddings(tokenizer, encoder, captions),
        pipe.encode_prompt(list(captions), do_classifier_free_guidance=False)[0],
        strict=True,
    ):
        assert torch.allclose(one, two, atol=1e-5)


def test_descend_minimises() -> None:
    torch.manual_seed(4)
    layer = nn.Linear(6, 4)
    goal = torch.randn(4, 6)
    losses = [
        loss
        for _, loss in descend(
            layer, lambda g: (layer.weight - goal).square().mean() + layer.bias.square().mean(), 300, rate=0.2, seed=0
        )
    ]
    assert losses[-1] < 0.01 * losses[0]


def test_the_judge_reads_words() -> None:
    torch.manual_seed(0)
    judge = Judge().eval()
    images = [np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)]
    table = attributes(images, judge)
    assert list(table.columns) == ["subject", "colour", "place", "light", "side", "quality", "style"]
    assert len(table) == 2
    from alkahest.errors import MismatchError

    with pytest.raises(MismatchError, match="64 x 64"):
        attributes([np.zeros((32, 64, 3), np.uint8)], judge)


def test_intervals() -> None:
    low, high = interval(0.9, 1000)
    assert (low, high) == (pytest.approx(0.8799, abs=1e-3), pytest.approx(0.9171, abs=1e-3))
    assert interval(1.0, 50)[1] == pytest.approx(1.0)
    assert interval(0.0, 50)[0] == pytest.approx(0.0, abs=1e-9)


def test_a_build_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def stage(name: str, **more: Any) -> build.Stage:
        def make(shop: build.Workshop) -> build.Progress:
            made.append(name)
            for step in (1, 2):
                yield step, 0.5
            (shop.folder / f"{name}.safetensors").write_bytes(name.encode())

        return build.Stage(name, make, 2, f"how {name}", 0, **more)

    monkeypatch.setattr(build, "STAGES", [stage("a"), stage("b", only_for=("c",)), stage("c"), stage("d")])
    events = build.build(tmp_path)
    while made != ["a", "b", "c"]:
        last = next(events)
    events.close()
    assert last.total == 8
    list(build.build(tmp_path))
    assert made == ["a", "b", "c", "c", "d"]
    (tmp_path / "b.safetensors").unlink()  # nobody needs it any more
    (tmp_path / "d.safetensors").write_bytes(b"damaged")
    finished = list(build.build(tmp_path))
    assert made == ["a", "b", "c", "c", "d", "d"]
    assert finished[-1].done == finished[-1].total


def test_a_tether_keeps_weights_near_their_start() -> None:
    torch.manual_seed(5)
    goal = torch.randn(12, 12)
    distances = []
    for tether in (0.0, 4.0):
        torch.manual_seed(6)
        layer = nn.Linear(12, 12, bias=False)
        start = layer.weight.detach().clone()
        list(
            descend(
                layer, lambda g, layer=layer: (layer.weight - goal).square().mean(), 60, rate=0.1, seed=0, tether=tether
            )
        )  # type: ignore[misc]
        distances.append(float((layer.weight - start).norm()))
    assert 0 < distances[1] < 0.7 * distances[0]


def test_the_tables_of_the_readme() -> None:
    shares = dict.fromkeys(report.READ, 0.5)
    noise = dict.fromkeys(report.NOISE, 0.25)
    rows = [
        {"model": "base", "asked": "", "steps": 24, "cfg": 3.0, "count": 40, **shares, **noise},
        {"model": "base + turbo", "asked": "", "steps": 24, "cfg": 3.0, "count": 40, **shares, "place": 0.2, **noise},
        {"model": "base + turbo", "asked": "", "steps": 8, "cfg": 1.0, "count": 40, **shares, "colour": 0.1, **noise},
    ]
    drawn = pd.DataFrame(rows)
    best = report.with_better(drawn).iloc[-1]
    assert (best.model, best.steps, best.colour, best.place) == ("base + turbo", "the better", 0.5, 0.5)
    cosines = pd.DataFrame([{"pair": "base, turbo", **dict.fromkeys(report.PARTS, 0.87654)}])
    shared = pd.DataFrame({"what": ["VAE, mean PSNR (dB)"], "value": [33.016]})
    text = report.markdown({"shared": shared, "drawn": drawn, "swaps": drawn, "learnt": drawn, "cosines": cosines})
    assert "| base | 24 | 3.0 | 50.0 (35.2 to 64.8) |" in text
    assert "| VAE, mean PSNR (dB) | 33.02 |" in text
    assert "| base, turbo | 0.8765 |" in text
    assert "subject 11, colour 17, place 20, light 33, side 33, quality 50" in text


def test_a_device_that_is_not_there_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    from alkahest.errors import UnknownNameError, UnsupportedError

    with pytest.raises(UnsupportedError, match="mini build: the device is not there"):
        list(build.build(tmp_path / "family", device="cuda:99"))
    with pytest.raises(UnknownNameError, match="mini build: no such stage"):
        list(build.build(tmp_path / "family", "nonsense"))
    assert not (tmp_path / "family").exists()

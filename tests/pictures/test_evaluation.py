"""What models say of noised pictures, against calls of the model made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import alkahest as ak
from alkahest.errors import NonFiniteError
from alkahest.pictures.evaluation import EvaluationSet, errors, predictions, share_along


@pytest.fixture
def examples() -> EvaluationSet:
    generator = torch.Generator().manual_seed(5)
    captions = [torch.randn(length, 40, generator=generator) for length in (3, 7, 5)]
    return EvaluationSet(torch.randn(3, 4, 6, 4, generator=generator), captions, seed=2, levels=(0.3, 0.9))


def test_every_picture_meets_its_own_noise_at_every_level(examples: EvaluationSet) -> None:
    batches = list(examples.batches(4))
    assert [(rows.start, rows.stop) for rows, _ in batches] == [(0, 4), (4, 6)]
    sigma = torch.cat([one.sigma for _, one in batches])
    assert sigma.tolist() == pytest.approx([0.3, 0.9] * 3)
    mixed, target = (torch.cat([getattr(one, name) for _, one in batches]) for name in ("latents", "target"))
    for row in range(6):
        data = examples.latents[row // 2]
        noise = data - target[row]
        torch.testing.assert_close(mixed[row], (1 - sigma[row]) * data + sigma[row] * noise)
    assert target[0].std() > 1.0
    assert not torch.equal(examples.latents[0] - target[0], examples.latents[0] - target[1])
    again = torch.cat([one.latents for _, one in examples.batches(1)])  # however it is divided
    assert torch.equal(again, mixed)
    torch.testing.assert_close(examples.target(), target.view(3, 2, 4, 6, 4))
    other = EvaluationSet(examples.latents, examples.captions, seed=3, levels=(0.3, 0.9))
    assert not torch.equal(other.target(), examples.target())


def test_predictions_are_the_model_s(trio: dict[str, Path], parts: dict[str, Any], examples: EvaluationSet) -> None:
    pipe = ak.pipeline(ak.open(trio["base"]), parts)
    found = predictions(pipe, examples, 4)
    assert found.shape == (3, 2, 4, 6, 4)
    (_, last) = list(examples.batches(5))[-1]
    with torch.no_grad():
        out = pipe.transformer([last.latents[0].unsqueeze(1)], torch.tensor([0.1]), [examples.captions[2]])
    torch.testing.assert_close(found[2, 1], out.sample[0].squeeze(1), rtol=1e-4, atol=1e-5)
    wrong = errors(found, examples.target())
    by_hand = (found.double() - examples.target().double()).square().mean(dim=(1, 2, 3, 4))
    np.testing.assert_allclose(wrong, by_hand.numpy(), rtol=1e-7)
    empty = predictions(pipe, examples.without_captions(examples.captions[0]), 4)
    assert torch.allclose(empty[0], found[0], atol=1e-5)  # its caption is the one that all have now
    assert not torch.allclose(empty[1], found[1], atol=1e-3)


def test_nan_is_said(trio: dict[str, Path], parts: dict[str, Any], examples: EvaluationSet) -> None:
    pipe = ak.pipeline(ak.open(trio["base"]), parts)
    with torch.no_grad():
        next(pipe.transformer.parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        predictions(pipe, examples, 4)


def test_the_share_along() -> None:
    wanted = torch.tensor([3.0, 4.0])
    assert share_along(2 * wanted, wanted) == pytest.approx(2)
    assert share_along(torch.tensor([4.0, -3.0]), wanted) == pytest.approx(0)
    assert share_along(torch.tensor([6.0, 0.0]), wanted) == pytest.approx(18 / 25)

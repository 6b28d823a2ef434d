"""What is advised by a curve, on curves whose right advice is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alkahest as ak
from alkahest.measure.bases import Matrices, sort_matrices
from alkahest.pictures.by_pictures import multiplier_by
from alkahest.pictures.evidence import PictureOptions
from alkahest.pictures.loss_curve import LossCurve

GUIDED = PictureOptions(prompts=["a cyan ball"], cfg=3.0)


@pytest.fixture(scope="module")
def matrices() -> Matrices:
    return sort_matrices(ak.delta_table(ak.mini.load("base-variant") - ak.mini.load("base")), None)


def curve(best: float = 2.0, depth: float = 0.4, count: int = 24, noise: float = 0.02) -> LossCurve:
    """A new thing whose loss falls by ``depth`` of itself, from 1, with its minimum at ``best``."""
    rng = np.random.default_rng(5)
    ks = np.array([0, 0.5, 1, 2, 4, 8.0]) * (best or 1.0) / 2
    shape = 1 - depth + depth * (ks[:, None] / (best or 1.0) - 1) ** 2 if best else 1 + 0.1 * ks[:, None]
    own = rng.standard_normal(count)
    new = shape * (1 + noise * own) + noise * 0.1 * rng.standard_normal((len(ks), count))
    rest = 0.5 + 0.05 * (ks[:, None] / (best or 1.0)) ** 2 + np.zeros(count)
    variant = np.full(count, 0.5)
    return LossCurve(ks, new, rest, ks, variant, variant + 0.2, variant + 0.3)


def test_twice_the_minimum_with_guidance(matrices: Matrices) -> None:
    found = multiplier_by(curve(), (), matrices, GUIDED)
    assert found == pytest.approx(4, abs=0.2)
    assert found.range[0] < 2 < found.range[1]
    assert "does not come over" not in repr(found)
    less = multiplier_by(curve(), (), matrices, replace(GUIDED, cfg=1.5))
    assert less == pytest.approx(3, abs=0.2)
    assert "with guidance of 1.5 up to 1.5 times that" in repr(less)
    large = multiplier_by(curve(90.0), (), matrices, GUIDED)
    assert f"{large:g}" == "180"
    assert "not if it means the adding side, 18 here" in repr(large)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (curve(0.0), "the loss of the new thing is least without it"),
        (curve(depth=0.0005, noise=0.1), "which other pictures might not show"),
        (curve(depth=0.02, noise=0.001), "of what the bridge lacks of the variant on these pictures"),
        (replace(curve(0.0), base=np.full(24, 0.4)), "it learned nothing that they show"),
    ],
)
def test_what_does_not_come_over_gets_zero_and_a_reason(made: LossCurve, words: str, matrices: Matrices) -> None:
    found = multiplier_by(made, (), matrices, GUIDED)
    assert found == 0
    assert found.range == (0, 0)
    assert "does not come over: " in repr(found)
    assert words in repr(found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"uncaptioned": np.full(24, 0.45)}, "no better with their prompts than without: does it know the words?"),
        ({"rest": np.full((6, 24), 1.9)}, "as of noise: are these components those of the model?"),
        ({"new": curve().new + 1.2, "variant": np.full(24, 1.8)}, "are these the VAE and text encoder of the model?"),
    ],
)
def test_what_speaks_against_the_judgement_is_said(change: dict[str, Any], words: str, matrices: Matrices) -> None:
    assert words not in repr(multiplier_by(curve(), (), matrices, GUIDED))
    assert words in repr(multiplier_by(replace(curve(), **change), (), matrices, GUIDED))


def test_few_pictures_and_an_end_that_was_not_reached(matrices: Matrices) -> None:
    few = multiplier_by(curve(count=4, noise=0.2), ("3 pictures were left out: no caption",), matrices, GUIDED)
    assert " by 4 pictures: take 8 or more" in repr(few)
    pair = multiplier_by(curve(count=2, noise=0.2), (), matrices, GUIDED)
    assert "(by 2 pictures, too few for an interval)" in repr(pair)
    assert pair.range == (0, np.inf)
    assert "3 pictures were left out: no caption" in repr(few)
    open_end = curve()
    falling = replace(open_end, new=open_end.new * 0 + np.linspace(1, 0.6, 6)[:, None])
    assert "the loss still falls at 8, the largest k that was looked at" in repr(
        multiplier_by(falling, (), matrices, GUIDED)
    )


def test_a_changed_refiner_is_a_reason_by_itself() -> None:
    trained = ak.mini.load("base-refiner-trained") - ak.mini.load("base")
    found = multiplier_by(curve(), (), sort_matrices(ak.delta_table(trained), None), GUIDED)
    assert found == 0
    assert "does not come over: not importable: the variant's refiner moved by 27.7 %" in repr(found)
    own = multiplier_by(curve(), (), sort_matrices(ak.delta_table(trained), None), GUIDED, on_its_base=True)
    assert own == 4  # its refiner moves with it
    assert "not importable: the variant's refiner moved by 27.7 %" in repr(own)


def test_a_delta_of_vectors_alone(trio: dict[str, Path], parts: dict[str, Any], tmp_path: Path) -> None:
    """Norms say nothing of it, pictures do."""
    import tiny

    state = tiny.state(seed=1)
    moved = {key: value * 1.2 if value.dim() == 1 and "layers" in key else value for key, value in state.items()}
    v, b = (ak.open(tiny.write(tmp_path / f"{n}.safetensors", tiny.native(s))) for n, s in (("v", moved), ("b", state)))
    found = ak.needed_multiplier(v - b, on=b, prompts=["a red ball at night"], components=parts, count=2, steps=1)
    assert found.basis == "pictures"
    assert found.bases["relative"] > 0

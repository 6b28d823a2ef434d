"""Signs of gradients against torch's own autograd, and what of a delta goes downhill by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import alkahest as ak
from alkahest.engine.evaluate import evaluate
from alkahest.engine.readable import Workspace
from alkahest.engine.scalars import Rules
from alkahest.errors import AlgebraError, FileFormatError, MismatchError, NonFiniteError, RecipeError, UnsupportedError
from alkahest.pictures.evidence import PictureOptions, given_set
from alkahest.sources.signs import MARK, Signs

PROMPTS = ["a red ball at night", "a blue box"]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    generator = torch.Generator().manual_seed(3)
    return [Image.fromarray(torch.randint(0, 255, (24, 24, 3), generator=generator).byte().numpy()) for _ in PROMPTS]


@pytest.fixture(scope="module")
def signs(trio: dict[str, Path], parts: dict[str, Any], pictures: list[Image.Image]) -> Signs:
    return ak.gradient_signs(ak.open(trio["bridge"]), pictures, PROMPTS, components=parts, seed=4, batch=4)


def whole(delta: ak.Delta, key: str) -> torch.Tensor:
    term = delta.at(key, Rules())
    assert term is not None
    out = torch.empty(delta.shapes[key]).view(-1)
    evaluate(term, 0, out.numel(), out, Workspace(torch.device("cpu")))
    return out.view(delta.shapes[key])


def test_they_are_autograd_s(
    trio: dict[str, Path], parts: dict[str, Any], pictures: list[Image.Image], signs: Signs
) -> None:
    bridge = ak.open(trio["bridge"])
    pipe = ak.pipeline(bridge, parts)
    options = PictureOptions(pictures=pictures, prompts=PROMPTS, seed=4)
    examples, _, _ = given_set(pipe, "the new thing", options, "test")
    model = pipe.transformer.requires_grad_(True)
    total: Any = 0.0
    for _, one in examples.batches(1):
        out = model(list(one.latents.unsqueeze(2)), one.time, one.captions, return_dict=False)[0]
        total = total + (out[0].squeeze(1) - one.target[0]).square().mean()
    total.backward()
    assert set(signs.shapes) == set(bridge.shapes)
    for key, parameter in model.named_parameters():
        gradient = torch.zeros(()) if parameter.grad is None else parameter.grad
        ours = whole(signs, key) > 0
        clear = gradient.abs() > 1e-4 * gradient.abs().max()  # float noise decides the others
        assert torch.equal(ours[clear.expand(ours.shape)], (gradient > 0).expand(ours.shape)[clear.expand(ours.shape)])
    assert 0.3 < sum(float((whole(signs, key) > 0).float().mean()) for key in signs.shapes) / len(signs.shapes) < 0.7


def test_in_one_batch_they_are_the_same(
    trio: dict[str, Path], parts: dict[str, Any], pictures: list[Image.Image], signs: Signs
) -> None:
    at_once = ak.gradient_signs(ak.open(trio["bridge"]), pictures, PROMPTS, components=parts, seed=4, batch=64)
    same = [float((whole(at_once, key) == whole(signs, key)).float().mean()) for key in signs.shapes]
    assert min(same) > 0.98
    assert sum(same) / len(same) > 0.999


def test_what_goes_downhill(trio: dict[str, Path], signs: Signs, tmp_path: Path) -> None:
    v, b, w = (ak.open(trio[name]) for name in ("variant", "base", "bridge"))
    stored = signs.save(tmp_path / "signs.safetensors")
    size = sum(-(-torch.Size(shape).numel() // 8) for shape in signs.shapes.values())
    assert (tmp_path / "signs.safetensors").stat().st_size < 1.4 * size
    assert "gradient signs of" in repr(stored)
    delta = (v - b).agreeing(stored)
    kept = []
    for key in ("layers.1.feed_forward.w3.weight", "layers.0.attention.to_q.weight"):
        plain, masked, sign = whole(v - b, key), whole(delta, key), whole(stored, key)
        assert torch.equal(sign, whole(signs, key))
        assert set(sign.unique().tolist()) == {-1, 1}
        assert torch.equal(masked, torch.where(plain.sign() == -sign, plain, 0))
        kept.append(float((masked != 0).float().mean()))
    assert all(0.3 < share < 0.7 for share in kept)
    merged = w.protect("refiner") + 1.2 * delta
    assert merged.text() == "bridge.protect('refiner') + 1.2 * (variant - base).agreeing(signs)"
    merged.save(tmp_path / "out.safetensors")
    recipe = ak.read_recipe(tmp_path / "out.safetensors")[1]
    assert recipe.inputs["signs"][0]["file"] == "signs.safetensors"
    from alkahest.recipes.inputs import build

    again = build(recipe, {name: trio[name] for name in trio} | {"signs": tmp_path / "signs.safetensors"})
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()
    other = Signs(signs.shapes, {key: 255 - value for key, value in (signs._packed or {}).items()})
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(RecipeError, match="not the file that the recipe was made with"):
        build(recipe, {name: trio[name] for name in trio} | {"signs": tmp_path / "other.safetensors"})
    # What goes downhill and what goes uphill are the whole.
    key = "layers.1.feed_forward.w3.weight"
    assert torch.equal(whole((v - b).agreeing(stored), key) + whole((v - b).agreeing(other), key), whole(v - b, key))


def test_odd_sizes_and_places() -> None:
    """Blocks may begin and end within a byte."""
    shapes = {"layers.0.attention.to_q.weight": (3, 7)}
    bits = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 1, 1])
    packed = torch.tensor([sum(int(b) << n for n, b in enumerate(bits[i : i + 8])) for i in (0, 8, 16)]).byte()
    signs = Signs(shapes, {"layers.0.attention.to_q.weight": packed})
    for start, stop in ((0, 21), (3, 17), (8, 9), (20, 21), (5, 8)):
        out = torch.empty(stop - start)
        signs.read("layers.0.attention.to_q.weight", start, stop, out, Workspace(torch.device("cpu")))
        assert out.tolist() == (bits[start:stop] * 2.0 - 1).tolist()


def test_bad_input(
    trio: dict[str, Path], parts: dict[str, Any], pictures: list[Image.Image], signs: Signs, tmp_path: Path
) -> None:
    v, b, w = (ak.open(trio[name]) for name in ("variant", "base", "bridge"))
    with pytest.raises(AlgebraError, match="gradient signs are needed"):
        (v - b).agreeing(v - b)
    with pytest.raises(AlgebraError, match="gradient signs are needed"):
        (v - b).agreeing("signs")  # type: ignore[arg-type]
    few = Signs({"layers.0.attention.to_q.weight": (96, 96)}, {})
    with pytest.raises(MismatchError, match="tensors of the delta have no signs"):
        (v - b).agreeing(few)
    with pytest.raises(UnsupportedError, match="this file holds no gradient signs"):
        ak.open_signs(trio["base"])
    with pytest.raises(AlgebraError, match="not saved yet"):
        _ = signs.path
    with pytest.raises(MismatchError, match="each picture needs its caption"):
        ak.gradient_signs(w, pictures, PROMPTS[:1], components=parts)
    with pytest.raises(AlgebraError, match="nothing is drawn where pictures are given: cfg, steps would mean nothing"):
        ak.gradient_signs(w, pictures, PROMPTS, components=parts, steps=4, cfg=3.0)
    with pytest.raises(AlgebraError, match="variant is a complete model"):
        ak.gradient_signs(w, prompts=PROMPTS, variant="v", components=parts)  # type: ignore[arg-type]
    signs.save(tmp_path / "saved.safetensors")
    with pytest.raises(UnsupportedError, match="these are gradient signs, not a checkpoint"):
        ak.open(tmp_path / "saved.safetensors")
    with pytest.raises(UnsupportedError, match="pictures are given, so that nothing is drawn"):
        ak.gradient_signs(w, pictures, PROMPTS, variant=v, components=parts)
    with pytest.raises(UnsupportedError, match="prompts alone are no pictures"):
        ak.gradient_signs(w, prompts=PROMPTS, components=parts)
    with pytest.raises(AlgebraError, match="pictures of what the variant learned are needed"):
        ak.gradient_signs(w, components=parts)
    from safetensors.torch import save_file

    key = "layers.0.attention.to_q.weight"
    shapes = {key: [96, 96], "layers.1.attention.to_q.weight": [96, 96]}
    for told, message in (
        ({}, "does not describe its signs"),
        ({"shapes": {key: [96, 97]}, "about": {}}, "the bytes do not fit the shape"),
        ({"shapes": shapes, "about": {}}, "missing"),
    ):
        save_file({key: torch.zeros(1152, dtype=torch.uint8)}, tmp_path / "x.safetensors", {MARK: json.dumps(told)})
        with pytest.raises(FileFormatError, match=message):
            ak.open_signs(tmp_path / "x.safetensors")


def test_a_gradient_that_is_nan(
    trio: dict[str, Path], parts: dict[str, Any], pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    from alkahest.pictures import gradients

    true = gradients.losses
    monkeypatch.setattr(gradients, "losses", lambda *given: true(*given) * torch.nan)
    with pytest.raises(NonFiniteError, match="a gradient is NaN"):
        ak.gradient_signs(ak.open(trio["bridge"]), pictures, PROMPTS, components=parts)

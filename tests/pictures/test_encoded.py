"""Latents and embeddings against the pipeline's own, and what the cache does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_dataset import picture

import alkahest as ak
from alkahest.errors import FileFormatError, UnsupportedError
from alkahest.files import cache
from alkahest.pictures import encoded as module
from alkahest.pictures.dataset import Dataset, from_folder, from_scenes
from alkahest.pictures.encoded import Encoded, bucket_size, encode, fingerprint


def encoded(dataset: Dataset, pipe: Any, resolution: int = 64) -> Encoded:
    *_, last = encode(dataset, pipe, resolution)
    found: Encoded = last.result
    return found


@pytest.fixture(scope="module")
def pipe() -> Any:
    return ak.pipeline(ak.mini.load("base"))


def test_they_are_what_the_pipeline_makes(pipe: Any) -> None:
    dataset = from_scenes(5, seed=1)
    found = encoded(dataset, pipe)
    assert len(found) == 5
    for number, example in enumerate(dataset.examples):
        pixels = pipe.image_processor.preprocess(example.open())
        latents = pipe.vae.encode(pixels).latent_dist.mode()[0]
        expected = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        assert torch.allclose(found.latents(number), expected, atol=1e-4)
        text = pipe.encode_prompt([example.caption], do_classifier_free_guidance=False)[0][0]
        assert torch.allclose(found.embedding(number), text, atol=1e-4)
        assert found.items[number].bucket == (8, 8, -(-len(text) // 32) * 32)
    assert torch.allclose(found.empty, pipe.encode_prompt([""], do_classifier_free_guidance=False)[0][0], atol=1e-4)


def test_buckets() -> None:
    assert bucket_size(1000, 1000, 1024, 64) == (1024, 1024)
    assert bucket_size(1920, 1080, 1024, 64) == (768, 1344)
    assert bucket_size(10, 10000, 64, 16) == (2016, 16)
    for width, height in ((640, 480), (333, 777), (1200, 300)):
        high, wide = bucket_size(width, height, 512, 64)
        assert high % 64 == wide % 64 == 0
        assert 0.7 < high * wide / 512**2 < 1.4


def test_pictures_of_several_shapes(pipe: Any, tmp_path: Path) -> None:
    for name, size in {"wide": (200, 100), "tall": (90, 180), "square": (70, 70)}.items():
        picture(tmp_path / f"{name}.png", size, seed=len(name))
        (tmp_path / f"{name}.txt").write_text(f"a {name} picture")
    found = encoded(from_folder(tmp_path), pipe)
    assert {item.name: item.bucket[:2] for item in found.items} == {
        "square.png": (8, 8),
        "tall.png": (12, 6),
        "wide.png": (6, 12),
    }
    assert all(found.latents(n).shape == (16, *item.bucket[:2]) for n, item in enumerate(found.items))
    again = encoded(from_folder(tmp_path), pipe)
    assert again.items == found.items


def test_what_is_in_the_cache_is_not_encoded_again(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = from_scenes(6, seed=2)
    found = encoded(dataset, pipe)
    kinds = ak.cached().groupby("kind").size()
    assert kinds["latents"] == 6
    assert kinds["embeddings"] == 7

    def refuse(*_: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(module, "latents_of", refuse)
    monkeypatch.setattr(module, "embeddings", refuse)
    assert encoded(dataset, pipe).items == found.items
    found.items[3].latents.write_bytes(b"damaged")
    monkeypatch.undo()
    with pytest.raises(FileFormatError, match="gone or damaged"):
        Encoded("x", found.items, found.empty).latents(3)
    mended = encoded(dataset, pipe)
    assert torch.equal(mended.latents(2), found.latents(2))
    assert mended.latents(3).shape == (16, 8, 8)


def test_another_vae_has_latents_of_its_own(pipe: Any) -> None:
    dataset = from_scenes(2, seed=3)
    one = encoded(dataset, pipe)
    other = ak.pipeline(ak.mini.load("base"))
    assert fingerprint(other.vae) == fingerprint(pipe.vae)
    with torch.no_grad():
        other.vae.encoder.conv_in.weight[0, 0, 0, 0] += 0.5
    assert fingerprint(other.vae) != fingerprint(pipe.vae)
    two = encoded(dataset, other)
    assert not {item.latents for item in one.items} & {item.latents for item in two.items}
    assert {item.embedding for item in one.items} == {item.embedding for item in two.items}


def test_a_broken_picture_is_skipped(pipe: Any, tmp_path: Path) -> None:
    good, bad = picture(tmp_path / "a.png"), tmp_path / "b.png"
    bad.write_bytes(good.read_bytes()[:200])
    (tmp_path / "c.png").write_bytes(b"no picture at all")
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "grey.png")
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "grey.txt").write_text("grey")
    found = encoded(from_folder(tmp_path), pipe)
    assert [item.name for item in found.items] == ["a.png", "grey.png"]
    assert set(found.skipped) == {"b.png", "c.png"}
    assert all("unreadable" in reason for reason in found.skipped.values())
    good.unlink()
    (tmp_path / "grey.png").unlink()
    with pytest.raises(FileFormatError, match="no picture could be read"):
        encoded(from_folder(tmp_path), pipe)
    with pytest.raises(UnsupportedError, match="multiples of 16"):
        encoded(from_scenes(1, seed=0), pipe, 40)


def test_memory_is_bounded(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = encoded(from_scenes(8, seed=4), pipe)
    right = [found.latents(number).clone() for number in range(8)]
    monkeypatch.setattr(module, "_REMEMBERED", 3 * right[0].nbytes)
    found = encoded(from_scenes(8, seed=4), pipe)
    for number in range(8):
        assert torch.equal(found.latents(number), right[number])
        assert found._known.nbytes == sum(value.nbytes for value in found._known.values()) <= 3 * right[0].nbytes


def test_what_others_clear_meanwhile_is_still_there(pipe: Any) -> None:
    found = encoded(from_scenes(3, seed=1), pipe)
    right = [found.latents(n).clone() for n in range(3)] + [found.embedding(n).clone() for n in range(3)]
    ak.clear_cache()
    again = [found.latents(n) for n in range(3)] + [found.embedding(n) for n in range(3)]
    assert all(torch.equal(one, other) for one, other in zip(right, again, strict=True))


@pytest.mark.parametrize("kind", ["latents", "embeddings"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "NaN"])
def test_a_kept_entry_that_is_damaged_is_made_anew(kind: str, damage: str, pipe: Any) -> None:
    data = from_scenes(3, seed=1)
    first = encoded(data, pipe)
    right = [first.latents(n).clone() for n in range(3)] + [first.embedding(n).clone() for n in range(3)]
    paths = [item.latents if kind == "latents" else item.embedding for item in first.items]
    for path in paths:
        raw = bytearray(path.read_bytes())
        match damage:
            case "cut":
                path.write_bytes(raw[: len(raw) // 2])
            case "flipped":
                raw[-5] ^= 4
                path.write_bytes(raw)
            case "empty":
                path.write_bytes(b"")
            case "NaN":
                cache.store_tensors(path, {"value": torch.full((4, 8, 8), float("nan"))})
    again = encoded(data, pipe)
    found = [again.latents(n) for n in range(3)] + [again.embedding(n) for n in range(3)]
    assert all(torch.equal(one, other) for one, other in zip(right, found, strict=True))

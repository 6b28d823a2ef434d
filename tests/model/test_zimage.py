from __future__ import annotations

import math

import pytest
import tiny
import torch

from alkahest.errors import FileFormatError, UnsupportedError
from alkahest.model.families import recognise
from alkahest.model.families.zimage import FAMILY, Architecture, infer


def test_full_size_is_the_published_model() -> None:
    from diffusers import ZImageTransformer2DModel

    with torch.device("meta"):
        reference = ZImageTransformer2DModel()
    shapes = {name: tuple(value.shape) for name, value in reference.state_dict().items()}
    assert Architecture().shapes() == shapes
    assert len(shapes) == 521
    assert sum(map(math.prod, shapes.values())) == 6_154_908_736


def test_small_models_of_the_class_are_inferred() -> None:
    shapes = {name: tuple(value.shape) for name, value in tiny.state().items()}
    found = infer(shapes, "x")
    assert found.shapes() == shapes
    assert (found.layers, found.width, found.caption, found.head, found.patch) == (2, 96, 40, 32, 16)
    names = [*shapes, *tiny.native(tiny.state()), "extra.weight", "norm_final.weight", "layers.0.attention.to_q.bias"]
    assert [name for name in names if not FAMILY.has(name)] == ["extra.weight", "layers.0.attention.to_q.bias"]


def test_the_config_we_write_builds_the_model() -> None:
    from diffusers import ZImageTransformer2DModel

    config = Architecture(layers=1).diffusers_config()
    assert config["axes_dims"] == [32, 48, 48]
    with torch.device("meta"):
        model = ZImageTransformer2DModel.from_config(config)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == Architecture(layers=1).shapes()


def test_a_missing_or_misshapen_tensor_is_named() -> None:
    shapes = {name: tuple(value.shape) for name, value in tiny.state().items()}
    for name in ("layers.1.attention.to_k.weight", "x_pad_token", "layers.0.feed_forward.w1.weight"):
        with pytest.raises(FileFormatError, match="missing") as caught:
            infer({key: shape for key, shape in shapes.items() if key != name}, "x")
        assert caught.value.key == name
    for wrong in ((96, 95), (96,), ()):
        with pytest.raises(FileFormatError, match=r"shape|dimensions"):
            infer({**shapes, "layers.1.attention.to_k.weight": wrong}, "x")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["diffusion_model.layers.0.attention.to_q.lora_A.weight"], "LoRA"),
        (["decoder.conv_in.weight", "encoder.conv_in.weight"], "VAE"),
        (["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"], "text encoder"),
        (["input_blocks.0.0.weight"], "not a Z-Image model"),
        ([], "not a Z-Image model"),
    ],
)
def test_other_models_are_refused_by_name(names: list[str], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        recognise(names, "x")


def test_a_lying_layer_number_costs_nothing() -> None:
    shapes = {name: tuple(value.shape) for name, value in tiny.state().items()}
    found = infer({**shapes, "layers.999999999999.x": (1,)}, "x")
    assert found.layers == 2


def test_the_quantisable_linears_are_the_170_of_the_native_layout() -> None:
    chosen = [key for key in Architecture().shapes() if FAMILY.is_quantisable(key)]
    assert len(chosen) == 34 * 7  # q, k and v apart
    assert not any("adaLN" in key or "norm" in key or "embedder" in key or "final" in key for key in chosen)

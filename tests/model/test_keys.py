from __future__ import annotations

import pytest
import tiny

from alkahest.errors import UnknownNameError
from alkahest.model.families.zimage import FAMILY, Architecture
from alkahest.model.keys import Pattern

KEYS = list(Architecture(layers=12, width=96).shapes())


def selected(pattern: str) -> list[str]:
    return [key for key in KEYS if Pattern(pattern, FAMILY).matches(key)]


def test_refiner_is_every_refiner_tensor_and_nothing_else() -> None:
    assert selected("refiner") == [key for key in KEYS if "_refiner." in key]
    assert Pattern("refiner", FAMILY).matches("siglip_refiner.0.attention.to_q.weight")
    assert len(selected("refiner")) == 2 * 15 + 2 * 13


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("all", len(KEYS)),
        ("layers", 12 * 15),
        ("layers.1", 15),  # and not layers.10
        ("layers.0-9", 150),
        ("layers.1*", 45),
        ("layers.2-3.attention", 2 * 6),
        ("attention.qkv", 16 * 3),
        ("qkv", 16 * 3),
        ("attention.out", 16),
        ("q_norm", 16),
        ("feed_forward.w1, feed_forward.w2", 32),
        ("embedders", 11),
        ("pad_tokens", 2),
        ("input", 11 + 56),
        ("final", 4),
        ("adaLN_modulation.0", 14 * 2),
        ("layers.0.attention.to_q.weight", 1),
    ],
)
def test_patterns(pattern: str, count: int) -> None:
    assert len(selected(pattern)) == count


@pytest.mark.parametrize("pattern", ["refinr", "layers.99", "layers.0.attn", "refiner, nothing", "attention.out.bias"])
def test_a_pattern_that_selects_nothing_is_an_error(pattern: str) -> None:
    with pytest.raises(UnknownNameError, match="selects no tensor"):
        Pattern(pattern, FAMILY).require_match(KEYS, "protect")
    with pytest.raises(UnknownNameError, match="did you mean 'refiner'"):
        Pattern("refinr", FAMILY).require_match(KEYS, "protect")


@pytest.mark.parametrize("pattern", ["", " ", "refiner,", None, 3, ["refiner"]])
def test_an_empty_pattern_is_an_error(pattern: object) -> None:
    with pytest.raises(UnknownNameError, match="empty pattern" if isinstance(pattern, str) else "one string"):
        Pattern(pattern, FAMILY)  # type: ignore[arg-type]


def test_parts() -> None:
    assert FAMILY.part_of("layers.7.ffn_norm1.weight") == "layers.7"
    assert FAMILY.part_of("cap_pad_token") == FAMILY.part_of("t_embedder.mlp.0.weight") == "embedders"
    assert FAMILY.part_of("noise_refiner.1.ffn_norm1.weight") == "noise_refiner"
    assert FAMILY.part_of("all_final_layer.2-1.linear.weight") == FAMILY.part_of("norm_final.weight") == "final"
    assert FAMILY.part_of("something") == "other"
    assert {key for key in ("norm_final.weight", "siglip_refiner.0.x", "layers.0.x") if FAMILY.is_optional(key)} == {
        "norm_final.weight",
        "siglip_refiner.0.x",
    }


def test_model_order_counts_layers_as_numbers() -> None:
    order = [key.split(".")[1] for key in FAMILY.in_model_order(reversed(KEYS)) if key.startswith("layers.")]
    assert order == sorted(order, key=int)
    assert set(tiny.state()) == set(FAMILY.in_model_order(tiny.state()))

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
from hypothesis import given, settings
from hypothesis import strategies as st

from alkahest.errors import AlkahestError, FileFormatError, UnknownNameError
from alkahest.model.families import recognise
from alkahest.model.families.zimage import FAMILY
from alkahest.sources.lora_names import DOTTED, FLAT, REFUSED, ROLES, parse_name


def test_names_agree_with_diffusers_own_converter() -> None:
    native = tiny.native(tiny.state())
    reference = convert_z_image_transformer_checkpoint_to_diffusers(dict(native))
    ours = {}
    for name, value in native.items():
        keys = FAMILY.canonical(name)
        ours |= dict(zip(keys, value.chunk(len(keys)), strict=True))
    assert ours.keys() == reference.keys()
    assert all(torch.equal(ours[key], reference[key]) for key in ours)


def test_round_trip_of_every_name() -> None:
    state = tiny.state()
    native, diffusers = FAMILY.layout("native"), FAMILY.layout("diffusers")
    groups = native.group(state)
    assert set(groups) == set(tiny.native(state))
    for name, keys in groups.items():
        assert list(native.canonical(name)) == keys
    assert diffusers.group(state) == {key: [key] for key in state}
    # Canonical names stay, so a file that mixes both spellings is understood too.
    assert all(FAMILY.canonical(key) == (key,) for key in state)


def test_grouping_does_not_depend_on_the_order_of_the_keys() -> None:
    state = list(tiny.state())
    groups = FAMILY.layout("native").group(reversed(state))
    assert groups["layers.0.attention.qkv.weight"] == [f"layers.0.attention.to_{x}.weight" for x in "qkv"]


def test_detection() -> None:
    state = tiny.state()
    native = tiny.native(state)
    assert FAMILY.layout_of(native) == "native"
    assert FAMILY.layout_of(state) == "diffusers"
    assert FAMILY.layout_of([*state, "layers.9.attention.qkv.weight"]) == "mixed"
    for prefix in FAMILY.prefixes:
        assert recognise([prefix + name for name in native], "x") == (FAMILY, prefix)
    with pytest.raises(FileFormatError, match="two transformers"):
        recognise([*native, *("model.diffusion_model." + name for name in native)], "x")
    with pytest.raises(UnknownNameError, match="did you mean 'native'"):
        FAMILY.layout("natve")


def test_the_siglip_branch_and_norm_final_map_too() -> None:
    assert FAMILY.canonical("siglip_refiner.0.attention.qkv.weight") == tuple(
        f"siglip_refiner.0.attention.to_{x}.weight" for x in "qkv"
    )
    assert FAMILY.canonical("norm_final.weight") == ("norm_final.weight",)


_PIECES = [
    *FLAT,
    *DOTTED,
    "layers",
    "noise_refiner",
    "siglip_refiner",
    "0",
    "31",
    "attention",
    "to_q",
    "qkv",
    "to_out",
    "feed_forward",
    "w1",
    "x_pad_token",
    "text_model",
    "ä",
    "",
]


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(_PIECES), max_size=9),
    glue=st.sampled_from("._"),
    suffix=st.sampled_from([*ROLES, *REFUSED, "weight", "", "lora_A"]),
    many=st.sampled_from([1, 3000]),
)
def test_any_name_is_understood_or_refused(pieces: list[str], glue: str, suffix: str, many: int) -> None:
    stored = pieces[0] * (many - 1) + glue.join(pieces) + "." + suffix if pieces else suffix
    try:
        name = parse_name(stored, FAMILY)
    except AlkahestError as error:
        assert error.key == stored
    else:
        assert name.keys
        assert name.role in {*ROLES.values()}

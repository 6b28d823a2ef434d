"""Every flavour that facts name, in a file made here, against weights computed by hand in float64."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import alkahest as ak
from alkahest.errors import (
    AlgebraError,
    FileFormatError,
    MismatchError,
    NonFiniteError,
    UnknownNameError,
    UnsupportedError,
)
from alkahest.sources.lora import open_lora

RANK = 5
# Linears of the tiny model -> (rows, columns), under diffusers' names.
LINEARS = {
    "layers.1.attention.to_q": (96, 96),
    "layers.1.attention.to_k": (96, 96),
    "layers.1.attention.to_v": (96, 96),
    "layers.0.attention.to_out.0": (96, 96),
    "noise_refiner.1.feed_forward.w1": (256, 96),
    "context_refiner.0.feed_forward.w2": (96, 256),
    "layers.0.adaLN_modulation.0": (384, 96),
    "all_x_embedder.2-1": (96, 16),
    "cap_embedder.1": (96, 40),
    "all_final_layer.2-1.linear": (16, 96),
    "t_embedder.mlp.0": (1024, 256),
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def factors(name: str, rank: int = RANK) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = LINEARS[name]
    return random(rows, rank, seed=len(name)), random(rank, columns, seed=2 * len(name))


def write(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata or None)
    return path


def applied(path: Path, model: Path, strength: float = 1.0) -> dict[str, torch.Tensor]:
    """The change that a LoRA makes, in float32, by saving the sum and subtracting."""
    base = ak.open(model)
    target = path.with_name("applied.safetensors")
    (base + strength * ak.open_lora(path)).save(target, dtype="fp32")
    after = ak.open(target)
    return {
        key: after[key].double() - base[key].double() for key in base if not torch.equal(after[key], base[key].float())
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "base.safetensors", tiny.native(tiny.state(seed=1)), torch.float32)


def check(path: Path, model: Path, expected: dict[str, torch.Tensor]) -> None:
    found = applied(path, model)
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert torch.allclose(found[key], value.double(), rtol=0, atol=2e-6 * float(value.abs().max()) + 1e-7), key


FLAT = str.maketrans(".", "_")
STYLES = {
    "comfyui": lambda name: (
        f"diffusion_model.{name}.lora_B.weight",
        f"diffusion_model.{name}.lora_A.weight",
        f"diffusion_model.{name}.alpha",
    ),
    "down-up": lambda name: (
        f"diffusion_model.{name}.lora_up.weight",
        f"diffusion_model.{name}.lora_down.weight",
        f"diffusion_model.{name}.alpha",
    ),
    "diffusers": lambda name: (f"transformer.{name}.lora_B.weight", f"transformer.{name}.lora_A.weight", None),
    "diffusers-alpha": lambda name: (
        f"transformer.{name}.lora_B.weight",
        f"transformer.{name}.lora_A.weight",
        f"transformer.{name}.alpha",
    ),
    "bare": lambda name: (f"{name}.lora_B.weight", f"{name}.lora_A.weight", f"{name}.alpha"),
    "bare-no-alpha": lambda name: (f"{name}.lora_B.weight", f"{name}.lora_A.weight", None),
    "lycoris": lambda name: (
        f"lycoris_{name.translate(FLAT)}.lora_up.weight",
        f"lycoris_{name.translate(FLAT)}.lora_down.weight",
        f"lycoris_{name.translate(FLAT)}.alpha",
    ),
    "kohya-split": lambda name: (
        f"lora_unet_{name.translate(FLAT)}.lora_up.weight",
        f"lora_unet_{name.translate(FLAT)}.lora_down.weight",
        f"lora_unet_{name.translate(FLAT)}.alpha",
    ),
    "distill": lambda name: (
        f"lora_unet__{name.translate(FLAT)}.lora_up.weight",
        f"lora_unet__{name.translate(FLAT)}.lora_down.weight",
        f"lora_unet__{name.translate(FLAT)}.alpha",
    ),
    "onetrainer": lambda name: (
        f"lora_transformer_{name.translate(FLAT)}.lora_up.weight",
        f"lora_transformer_{name.translate(FLAT)}.lora_down.weight",
        f"lora_transformer_{name.translate(FLAT)}.alpha",
    ),
    "peft": lambda name: (f"base_model.model.{name}.lora_B.weight", f"base_model.model.{name}.lora_A.weight", None),
    "diffsynth": lambda name: (f"{name}.lora_B.default.weight", f"{name}.lora_A.default.weight", None),
}


@pytest.mark.parametrize("style", STYLES)
def test_split_flavours(style: str, tmp_path: Path, model: Path) -> None:
    tensors, expected = {}, {}
    for name in LINEARS:
        up, down = factors(name)
        for stored, tensor in zip(STYLES[style](name), (up, down, torch.tensor(2.0)), strict=True):
            if stored:
                tensors[stored] = tensor
        scale = 2.0 / RANK if STYLES[style](name)[2] else 1.0
        expected[f"{name}.weight"] = scale * (up.double() @ down.double())
    path = write(tmp_path / "lora.safetensors", tensors)
    check(path, model, expected)
    assert open_lora(path).summary()["ranks"] == [RANK, RANK]


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", "", "lora_unet_"])
def test_fused_flavours(prefix: str, tmp_path: Path, model: Path) -> None:
    """A fused qkv has three times the rows, and nothing says that its up is block-diagonal."""
    native = {
        "layers.1.attention.qkv": ["layers.1.attention.to_q", "layers.1.attention.to_k", "layers.1.attention.to_v"],
        "layers.0.attention.out": ["layers.0.attention.to_out.0"],
        "x_embedder": ["all_x_embedder.2-1"],
        "final_layer.linear": ["all_final_layer.2-1.linear"],
        "cap_embedder.1": ["cap_embedder.1"],
    }
    tensors, expected = {}, {}
    for number, (name, members) in enumerate(native.items()):
        rows, columns = LINEARS[members[0]]
        up, down = random(rows * len(members), RANK, seed=number), random(RANK, columns, seed=number + 10)
        stored = prefix + (name.translate(FLAT) if prefix == "lora_unet_" else name)
        tensors |= {
            f"{stored}.lora_up.weight": up,
            f"{stored}.lora_down.weight": down,
            f"{stored}.alpha": torch.tensor(3.0),
        }
        whole = 3.0 / RANK * (up.double() @ down.double())
        expected |= {f"{member}.weight": part for member, part in zip(members, whole.chunk(len(members)), strict=True)}
    check(write(tmp_path / "lora.safetensors", tensors), model, expected)


def test_loha(tmp_path: Path, model: Path) -> None:
    tensors, expected = {}, {}
    for name in ("layers.0.adaLN_modulation.0", "layers.1.attention.to_q", "cap_embedder.1"):
        rows, columns = LINEARS[name]
        parts = {w: (random(rows, 3, seed=n), random(3, columns, seed=n + 5)) for n, w in enumerate(("w1", "w2"))}
        for w, (a, b) in parts.items():
            tensors |= {
                f"lycoris_{name.translate(FLAT)}.hada_{w}_a": a,
                f"lycoris_{name.translate(FLAT)}.hada_{w}_b": b,
            }
        tensors[f"lycoris_{name.translate(FLAT)}.alpha"] = torch.tensor(1.5)
        one, two = (a.double() @ b.double() for a, b in parts.values())
        expected[f"{name}.weight"] = 1.5 / 3 * one * two
    path = write(tmp_path / "loha.safetensors", tensors)
    check(path, model, expected)
    assert open_lora(path).updates["layers.1.attention.to_q.weight"].rank == 9


def test_lokr(tmp_path: Path, model: Path) -> None:
    """All four ways to store the two factors; alpha counts only where one of them is a product."""
    cases = {
        "layers.0.adaLN_modulation.0": (True, True, 1.0),
        "layers.1.attention.to_q": (False, True, 2.0 / 3),
        "noise_refiner.1.feed_forward.w1": (True, False, 2.0 / 4),
        "context_refiner.0.feed_forward.w2": (False, False, 2.0 / 4),
    }
    tensors, expected = {}, {}
    for name, (whole_1, whole_2, scale) in cases.items():
        rows, columns = LINEARS[name]
        stored = f"diffusion_model.{name}.lokr_"
        sizes = ((8, 4), (rows // 8, columns // 4))
        made = []
        for which, (size, whole, rank) in enumerate(zip(sizes, (whole_1, whole_2), (3, 4), strict=True), 1):
            a, b = random(size[0], rank, seed=which), random(rank, size[1], seed=which + 7)
            if whole:
                tensors[f"{stored}w{which}"] = factor = random(*size, seed=which)
                made.append(factor.double())
            else:
                tensors |= {f"{stored}w{which}_a": a, f"{stored}w{which}_b": b}
                made.append(a.double() @ b.double())
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(2.0)
        expected[f"{name}.weight"] = scale * torch.kron(*made)
    check(write(tmp_path / "lokr.safetensors", tensors), model, expected)


def test_full_differences_norms_biases_and_pad_tokens(tmp_path: Path, model: Path) -> None:
    tensors = {
        "diffusion_model.layers.1.attention.qkv.diff": random(288, 96),
        "diffusion_model.cap_embedder.1.diff": random(96, 40),
        "diffusion_model.cap_embedder.1.diff_b": random(96),
        "diffusion_model.layers.0.attention_norm1.diff": random(96),
        "diffusion_model.x_pad_token.diff": random(1, 96),
        "lycoris_layers_1_ffn_norm2.w_norm": random(96),
    }
    q, k, v = tensors["diffusion_model.layers.1.attention.qkv.diff"].chunk(3)
    expected = {
        "layers.1.attention.to_q.weight": q,
        "layers.1.attention.to_k.weight": k,
        "layers.1.attention.to_v.weight": v,
        "cap_embedder.1.weight": tensors["diffusion_model.cap_embedder.1.diff"],
        "cap_embedder.1.bias": tensors["diffusion_model.cap_embedder.1.diff_b"],
        "layers.0.attention_norm1.weight": tensors["diffusion_model.layers.0.attention_norm1.diff"],
        "x_pad_token": tensors["diffusion_model.x_pad_token.diff"],
        "layers.1.ffn_norm2.weight": tensors["lycoris_layers_1_ffn_norm2.w_norm"],
    }
    check(write(tmp_path / "full.safetensors", tensors), model, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_other_number_formats_and_convolutions_of_one_by_one(dtype: torch.dtype, tmp_path: Path, model: Path) -> None:
    up, down = (0.1 * one for one in factors("layers.1.attention.to_q"))
    up, down = up.to(dtype), down.to(dtype)
    name = "diffusion_model.layers.1.attention.to_q"
    path = write(
        tmp_path / "lora.safetensors",
        {f"{name}.lora_up.weight": up[:, :, None, None], f"{name}.lora_down.weight": down[:, :, None, None]},
    )
    check(path, model, {"layers.1.attention.to_q.weight": up.double() @ down.double()})


def test_pefts_settings_hold_alpha(tmp_path: Path, model: Path) -> None:
    up, down = factors("layers.1.attention.to_q")
    product = up.double() @ down.double()
    names = {"layers.1.attention.to_q.lora_B.weight": up, "layers.1.attention.to_q.lora_A.weight": down}
    written = {f"transformer.{name}": tensor for name, tensor in names.items()}
    path = write(
        tmp_path / "lora.safetensors",
        written,
        lora_adapter_metadata=json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 20}),
    )
    check(path, model, {"layers.1.attention.to_q.weight": 20 / RANK * product})
    folder = tmp_path / "adapter"
    folder.mkdir()
    write(folder / "adapter_model.safetensors", {f"base_model.model.{name}": tensor for name, tensor in names.items()})
    (folder / "adapter_config.json").write_text(
        json.dumps({"r": RANK, "lora_alpha": 4, "use_rslora": True, "alpha_pattern": {}})
    )
    expected = 4 / RANK**0.5 * product
    lora = ak.open_lora(folder)
    out = torch.empty(96 * 96)
    lora.read("layers.1.attention.to_q.weight", 0, out.numel(), out, None)  # type: ignore[arg-type]
    assert torch.allclose(out.view(96, 96).double(), expected, atol=1e-4)


def test_numbers_do_not_depend_on_where_a_block_ends(tmp_path: Path) -> None:
    name = "t_embedder.mlp.0"
    up, down = factors(name)
    lora = ak.open_lora(
        write(tmp_path / "lora.safetensors", {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down})
    )
    whole, pieces = torch.empty(up.shape[0] * down.shape[1]), []
    lora.read(f"{name}.weight", 0, whole.numel(), whole, None)  # type: ignore[arg-type]
    ends = [0, 1, 255, 256, 8191, 8193, 100_000, whole.numel()]
    for start, stop in itertools.pairwise(ends):
        pieces.append(torch.empty(stop - start))
        lora.read(f"{name}.weight", start, stop, pieces[-1], None)  # type: ignore[arg-type]
    assert torch.equal(torch.cat(pieces), whole)


def test_it_is_a_delta_like_any_other(tmp_path: Path, model: Path) -> None:
    tensors = {}
    for name in LINEARS:
        up, down = factors(name)
        tensors |= {f"diffusion_model.{name}.lora_B.weight": up, f"diffusion_model.{name}.lora_A.weight": down}
    path = write(tmp_path / "style.safetensors", tensors)
    base, lora = ak.open(model), ak.open_lora(path)
    merged = base.protect("refiner") + 0.1 * lora.without("embedders")
    assert merged.text() == "base.protect('refiner') + 0.1 * style.without('embedders')"
    assert "style: protection leaves out 2 of its 11 tensors (noise_refiner, context_refiner)" in repr(merged)
    saved = merged.save(tmp_path / "merged.safetensors")
    assert any("leaves out 2 of its 11" in note for note in saved.notes)
    after = ak.open(saved.path)
    for key in base:
        module = key.removesuffix(".weight")
        changed = module in LINEARS and "refiner" not in key and "embedder" not in key
        expected = base[key].double() + (
            0.1 * (factors(module)[0].double() @ factors(module)[1].double()) if changed else 0
        )
        assert torch.allclose(after[key].double(), expected, atol=1e-5), key
    everywhere = base.protect("refiner") + lora.everywhere()
    assert "leaves out" not in repr(everywhere)
    both = lora - 0.5 * lora
    variant = base + (both + (base - base))
    assert variant.shapes == base.shapes
    table = ak.delta_table(lora, on=base)
    assert set(table.tensor) == {f"{name}.weight" for name in LINEARS}
    assert table.set_index("tensor").loc["cap_embedder.1.weight", "delta_norm"] == pytest.approx(
        float((factors("cap_embedder.1")[0].double() @ factors("cap_embedder.1")[1].double()).norm()), rel=1e-6
    )


def test_a_recipe_finds_its_lora_again(tmp_path: Path, model: Path) -> None:
    up, down = factors("layers.1.attention.to_q")
    name = "diffusion_model.layers.1.attention.to_q"
    path = write(tmp_path / "style.safetensors", {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down})
    saved = (ak.open(model) + 0.3 * ak.open_lora(path)).save(tmp_path / "merged.safetensors")
    from alkahest.recipes.inputs import build

    recipe = ak.read_recipe(saved.path)[1]
    assert set(recipe.inputs) == {"base", "style"}
    again = build(recipe, {}, beside=tmp_path).save(tmp_path / "again.safetensors")
    assert again.path.read_bytes() == saved.path.read_bytes()
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ak.AlkahestError, match="not the file that the recipe was made with"):
        build(recipe, {}, beside=tmp_path)


def test_the_miniatures_lora_changes_pictures_as_diffusers_has_it() -> None:
    """Weights with the LoRA fused by diffusers equal ours."""
    pipe = ak.pipeline(ak.mini.load("base"))
    pipe.load_lora_weights(str(ak.mini.lora("base-lora")), adapter_name="lora")
    pipe.fuse_lora(lora_scale=0.7, adapter_names=["lora"])
    pipe.unload_lora_weights()
    ours = ak.pipeline(ak.mini.load("base") + 0.7 * ak.open_lora(ak.mini.lora("base-lora"))).transformer.state_dict()
    theirs = pipe.transformer.state_dict()
    assert ours.keys() == theirs.keys()
    changed = 0
    for name, value in theirs.items():
        assert torch.allclose(ours[name].float(), value.float(), rtol=0.01, atol=1e-5), name
        changed += not torch.equal(value.float(), ak.mini.load("base")[name].float())
    assert changed >= 28


ONE = {"layers.1.attention.to_q.lora_A.weight": random(4, 96), "layers.1.attention.to_q.lora_B.weight": random(96, 4)}


@pytest.mark.parametrize(
    "given",
    [
        '{"lora_alpha": [8]}',
        '{"lora_alpha": "eight"}',
        '{"lora_alpha": NaN}',
        '{"lora_alpha": 8, "alpha_pattern": [1]}',
        '{"alpha_pattern": {"to_q": "x"}}',
        "[]",
    ],
)
def test_settings_that_make_no_sense(given: str, tmp_path: Path) -> None:
    path = write(tmp_path / "lora.safetensors", ONE, lora_adapter_metadata=given)
    with pytest.raises(FileFormatError, match="settings make no sense"):
        open_lora(path)


def test_settings_that_leave_something_out(tmp_path: Path) -> None:
    for given, scale in (
        ('{"lora_alpha": 8, "alpha_pattern": {"to_q": null}}', 2.0),
        ('{"alpha_pattern": {"to_q": 6}}', 1.5),
        ("{}", 1.0),
    ):
        path = write(tmp_path / "lora.safetensors", ONE, lora_adapter_metadata=given)
        assert open_lora(path).summary()["scales"] == [scale]


@pytest.mark.parametrize(
    "alpha",
    [torch.tensor(2, dtype=torch.int64), torch.tensor([2], dtype=torch.int32), torch.tensor(2.0, dtype=torch.float64)],
)
def test_an_alpha_of_any_kind_of_number(alpha: torch.Tensor, tmp_path: Path) -> None:
    path = write(tmp_path / "lora.safetensors", {**ONE, "layers.1.attention.to_q.alpha": alpha})
    assert open_lora(path).summary()["scales"] == [0.5]


BAD = {
    "missing half": (
        {"diffusion_model.layers.0.attention.to_q.lora_A.weight": random(4, 96)},
        FileFormatError,
        "half of a pair is missing",
    ),
    "unknown module": (
        {"diffusion_model.layers.0.attention.to_z.lora_A.weight": random(4, 96)},
        UnknownNameError,
        r"(?s)fits no module.*lora\.safetensors.*did you mean 'layers\.0\.attention\.to_",
    ),
    "unknown suffix": (
        {
            "layers.0.attention.to_q.lora_A.weight": random(4, 96),
            "layers.0.attention.to_q.lora_C.weight": random(4, 96),
        },
        UnknownNameError,
        "no tensor of a LoRA",
    ),
    "text encoder": ({"lora_te1_text_model_x.lora_down.weight": random(4, 96)}, UnsupportedError, "text encoder"),
    "ranks differ": (
        {
            "layers.0.attention.to_q.lora_A.weight": random(4, 96),
            "layers.0.attention.to_q.lora_B.weight": random(96, 5),
        },
        FileFormatError,
        "halves of a pair do not fit",
    ),
    "twice": (
        {
            f"{prefix}layers.0.attention.to_q.lora_{half}.weight": random(*shape, seed=len(prefix))
            for prefix in ("diffusion_model.", "transformer.")
            for half, shape in (("A", (4, 96)), ("B", (96, 4)))
        },
        FileFormatError,
        r"(?s)mean the same thing.*diffusion_model.*transformer",
    ),
    "fused and split": (
        {
            **{f"layers.0.attention.{part}.lora_A.weight": random(4, 96) for part in ("qkv", "to_k")},
            "layers.0.attention.qkv.lora_B.weight": random(288, 4),
            "layers.0.attention.to_k.lora_B.weight": random(96, 4),
        },
        FileFormatError,
        "mean the same thing",
    ),
    "two kinds": (
        {"layers.0.attention.to_q.lora_A.weight": random(4, 96), "layers.0.attention.to_q.lokr_w1": random(96, 4)},
        FileFormatError,
        "two kinds of update",
    ),
    "only alpha": ({"layers.0.attention.to_q.alpha": torch.tensor(1.0)}, FileFormatError, "an alpha without its LoRA"),
    "alpha is a matrix": (
        {
            "layers.0.attention.to_q.alpha": random(2, 3),
            "layers.0.attention.to_q.lora_A.weight": random(4, 96),
            "layers.0.attention.to_q.lora_B.weight": random(96, 4),
        },
        FileFormatError,
        "alpha must be one number",
    ),
    "alpha is NaN": (
        {
            "layers.0.attention.to_q.alpha": torch.tensor(float("nan")),
            "layers.0.attention.to_q.lora_A.weight": random(4, 96),
            "layers.0.attention.to_q.lora_B.weight": random(96, 4),
        },
        FileFormatError,
        "not a finite number",
    ),
    "loha shapes": (
        {
            f"layers.0.attention.to_q.hada_w{n}_{half}": random(*shape)
            for n in (1, 2)
            for half, shape in (("a", (90 + n, 3)), ("b", (3, 96)))
        },
        FileFormatError,
        "factors of a LoHa differ",
    ),
    "lokr twice": (
        {
            "layers.0.attention.to_q.lokr_w1": random(8, 4),
            "layers.0.attention.to_q.lokr_w1_a": random(8, 4),
            "layers.0.attention.to_q.lokr_w1_b": random(4, 4),
            "layers.0.attention.to_q.lokr_w2": random(12, 24),
        },
        FileFormatError,
        "needs w1, whole or as a product, once",
    ),
    "huge": (
        {"layers.0.attention.to_q.lokr_w1": random(4096, 1), "layers.0.attention.to_q.lokr_w2": random(4096, 1)},
        FileFormatError,
        "impossible size",
    ),
    "empty": (
        {
            "layers.0.attention.to_q.lora_A.weight": torch.empty(0, 96),
            "layers.0.attention.to_q.lora_B.weight": torch.empty(96, 0),
        },
        FileFormatError,
        "a factor is empty",
    ),
    "integers": (
        {
            "layers.0.attention.to_q.lora_A.weight": torch.ones(4, 96, dtype=torch.int8),
            "layers.0.attention.to_q.lora_B.weight": random(96, 4),
        },
        UnsupportedError,
        "number format",
    ),
    "not a lora": ({"decoder.conv.weight": random(4, 6)}, UnsupportedError, "this is not a LoRA"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case: str, tmp_path: Path) -> None:
    tensors, kind, words = BAD[case]
    with pytest.raises(kind, match=words):
        ak.open_lora(write(tmp_path / "lora.safetensors", tensors))


def test_bad_uses(tmp_path: Path, model: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"(?s)this is a checkpoint, not a LoRA.*ak\.open"):
        ak.open_lora(model)
    path = write(
        tmp_path / "lora.safetensors",
        {
            "layers.7.attention.to_q.lora_A.weight": random(4, 96),
            "layers.7.attention.to_q.lora_B.weight": random(96, 4),
        },
    )
    with pytest.raises(UnsupportedError, match=r"(?s)this is a LoRA.*ak\.open_lora"):
        ak.open(path)
    with pytest.raises(MismatchError, match=r"(?s)1 tensors that the model does not have.*layers\.7"):
        ak.open(model) + ak.open_lora(path)
    wrong = write(
        tmp_path / "wrong.safetensors",
        {
            "layers.0.attention.to_q.lora_A.weight": random(4, 95),
            "layers.0.attention.to_q.lora_B.weight": random(96, 4),
        },
    )
    with pytest.raises(MismatchError, match=r"(?s)different shapes.*layers\.0\.attention\.to_q.*\(96, 95\)"):
        ak.open(model) + ak.open_lora(wrong)
    dora = write(
        tmp_path / "dora.safetensors", {**load_file(path), "layers.7.attention.to_q.dora_scale": random(96, 1)}
    )
    assert ak.open_lora(dora).is_dora
    with pytest.raises(AlgebraError, match=r"(?s)DoRA depends on the weights.*apply_lora"):
        ak.open(model) + ak.open_lora(dora)
    broken = random(96, 4)
    broken[3, 2] = float("nan")
    nan = write(
        tmp_path / "nan.safetensors",
        {"layers.0.attention.to_q.lora_A.weight": random(4, 96), "layers.0.attention.to_q.lora_B.weight": broken},
    )
    with pytest.raises(NonFiniteError, match=r"(?s)a LoRA holds NaN.*nan\.safetensors.*lora_B"):
        (ak.open(model) + ak.open_lora(nan)).save(tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()

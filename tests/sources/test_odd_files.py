"""Checkpoints as people really have them: what is not understood is refused or carried, never taken for nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import alkahest as ak
from alkahest.errors import AlgebraError, AlkahestError, FileFormatError, MismatchError, UnsupportedError

KEY = "layers.0.feed_forward.w1.weight"  # 256 x 96
MODULE = KEY.removesuffix(".weight")


@pytest.fixture(scope="module")
def state() -> tiny.State:
    return tiny.state(4)


@pytest.fixture(scope="module")
def native(state: tiny.State) -> tiny.State:
    return {name: value.to(torch.bfloat16).contiguous() for name, value in tiny.native(state).items()}


def with_fp8(
    values: tiny.State, scale: torch.Tensor, expanded: torch.Tensor, name: str
) -> tuple[tiny.State, torch.Tensor]:
    """The file with one weight in fp8 and its scale under a name; and what the weight then is, in float64."""
    fp8 = (values[KEY].float() / expanded).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {**values, KEY: fp8, name: scale}, fp8.double() * expanded.double()


SCALES = {
    "one": ((), (1, 1)),
    "row": ((256, 1), (1, 96)),
    "flat rows": ((256,), (1, 96)),
    "blocks of 128": ((2, 1), (128, 128)),
    "blocks of 32": ((8, 3), (32, 32)),
    "groups of 32 in a row": ((256, 3), (1, 32)),
}


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale", "scale_weight"])
@pytest.mark.parametrize("form", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_declared_scales_are_applied(
    native: tiny.State, tmp_path: Path, form: str, suffix: str, dtype: torch.dtype
) -> None:
    shape, (rows, columns) = SCALES[form]
    scale = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) / 2000 + 1e-4).to(dtype)
    grid = scale.float().reshape(shape if len(shape) == 2 else (-1, 1))
    expanded = grid.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:256, :96].expand(256, 96)
    stored, right = with_fp8(native, scale, expanded, f"{MODULE}.{suffix}")
    save_file(stored, tmp_path / "x.safetensors")
    found = ak.open(tmp_path / "x.safetensors")
    torch.testing.assert_close(found[KEY].double(), right, rtol=1e-6, atol=0)
    assert found.storage[KEY] != "fp8_e4m3fn"
    found.save(tmp_path / "out.safetensors", dtype="fp32")
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")[KEY].double(), right, rtol=1e-6, atol=0)
    found.save(tmp_path / "as-is.safetensors")  # in the same form, or in bf16 where the form is never written
    again = ak.open(tmp_path / "as-is.safetensors")[KEY].double()
    torch.testing.assert_close(again, right, rtol=4e-3, atol=0)
    other = ak.open(tiny.write(tmp_path / "b.safetensors", tiny.native(tiny.state(1))))
    table = ak.delta_table(found - other)
    assert table[table.tensor == KEY].variant_norm.item() == pytest.approx(float(right.norm()), rel=1e-6)


def test_a_block_that_the_configuration_names(native: tiny.State, tmp_path: Path) -> None:
    scale = torch.rand(4, 4) / 2000 + 1e-4
    expanded = scale.repeat_interleave(64, 0).repeat_interleave(24, 1)
    stored, right = with_fp8(native, scale, expanded, f"{MODULE}.weight_scale_inv")
    save_file(stored, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(FileFormatError, match="a scale has the wrong shape or dtype"):
        ak.open(tmp_path)  # blocks of 64 by 24 are no form that anybody publishes
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 24]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(ak.open(tmp_path)[KEY].double(), right, rtol=1e-6, atol=0)


def test_a_fused_weight_in_blocks_is_cut_right(native: tiny.State, tmp_path: Path) -> None:
    key = "layers.1.attention.qkv.weight"  # 288 x 96
    scale = torch.rand(9, 3) / 2000 + 1e-4
    expanded = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
    fp8 = (native[key].float() / expanded).to(torch.float8_e4m3fn)
    save_file({**native, key: fp8, "layers.1.attention.qkv.weight_scale_inv": scale}, tmp_path / "x.safetensors")
    found = ak.open(tmp_path / "x.safetensors")
    right = fp8.double() * expanded.double()
    for number, name in enumerate(("to_q", "to_k", "to_v")):
        got = found[f"layers.1.attention.{name}.weight"].double()
        torch.testing.assert_close(got, right[96 * number : 96 * (number + 1)], rtol=1e-6, atol=0)
    found.save(tmp_path / "out.safetensors", dtype="fp32")
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")[key].double(), right, rtol=1e-6, atol=0)


def test_two_scales_are_one_too_many(native: tiny.State, tmp_path: Path) -> None:
    stored, _ = with_fp8(native, torch.tensor(1e-3), torch.tensor(1e-3), f"{MODULE}.weight_scale")
    save_file({**stored, f"{MODULE}.weight_scale_inv": torch.tensor(1e-3)}, tmp_path / "x.safetensors")
    with pytest.raises(FileFormatError, match=r"(?s)two scales.*weight_scale and weight_scale_inv"):
        ak.open(tmp_path / "x.safetensors")


@pytest.mark.parametrize("seed", range(40))
def test_scales_under_any_other_name_are_refused_by_it(native: tiny.State, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    word = "".join(rng.choices("abcdefghij", k=rng.randint(2, 9)))
    patterns = (
        f"{MODULE}.{word}",
        f"{MODULE}_{word}",
        f"{KEY}_{word}",
        f"{KEY}.{word}",
        f"{word}.{MODULE}",
        f"{word}.{KEY}",
        f"layers.0.feed_forward.{word}",
        f"{word}_scale",
        f"{word}.quant_{word}",
    )
    name = rng.choice(patterns)
    stored, _ = with_fp8(native, torch.tensor(4e-4), torch.tensor(4e-4), name)
    prefix = rng.choice(["", "model.diffusion_model."])
    save_file({prefix + key: value for key, value in stored.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UnsupportedError, match="beside an fp8 weight that is not understood") as told:
        ak.open(tmp_path / "x.safetensors")
    assert told.value.key == name


def test_a_zero_point_beside_a_known_scale_is_refused(native: tiny.State, tmp_path: Path) -> None:
    stored, _ = with_fp8(native, torch.tensor(4e-4), torch.tensor(4e-4), f"{MODULE}.weight_scale")
    save_file({**stored, f"{MODULE}.weight_zero_point": torch.tensor(2.0)}, tmp_path / "x.safetensors")
    with pytest.raises(UnsupportedError, match="weight_zero_point"):
        ak.open(tmp_path / "x.safetensors")


EXTRAS = {
    "global_step": torch.tensor(1000),
    "is_ema": torch.tensor(True),
    "loss": torch.tensor([0.1, 0.2], dtype=torch.float64),
    "marker": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "empty": torch.zeros(0),
    "ema_decay": torch.tensor(0.9999),
    "layers.0.attention.to_q.bias": torch.ones(96),
    "control_layers.0.weight": torch.ones(4, 4),
    "teacher.proj.weight": torch.ones(4, 4),
    f"model_ema.{KEY}": torch.ones(256, 96),
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_what_is_no_part_of_the_model_is_carried(native: tiny.State, tmp_path: Path, prefix: str, layout: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({prefix + name: value for name, value in {**native, **EXTRAS}.items()}, path)
    found = ak.open(path)
    assert set(found.extras) == set(EXTRAS)
    assert "no part of the model, carried along" in repr(found)
    other = ak.open(tiny.write(tmp_path / "b.safetensors", tiny.native(tiny.state(1))))
    merged = found + 0.5 * (other - found)
    saved = merged.save(tmp_path / "out.safetensors", layout=layout)
    assert f"{len(EXTRAS)} tensors that are no part of Z-Image are carried along as they are" in " ".join(saved.notes)
    out = load_file(tmp_path / "out.safetensors")
    for name, value in EXTRAS.items():
        assert torch.equal(out[name], value)
        assert out[name].dtype == value.dtype
    dropped = found.save(tmp_path / "less.safetensors", drop="model_ema, ema_decay, teacher")
    assert "3 tensors beside the model are left out: ema_decay, " in " ".join(dropped.notes)
    left = set(load_file(tmp_path / "less.safetensors"))
    assert not {"ema_decay", f"model_ema.{KEY}", "teacher.proj.weight"} & left
    assert {"global_step", "is_ema"} <= left
    with pytest.raises(AlkahestError, match=r"'layers\.1' selects no tensor"):
        found.save(tmp_path / "no.safetensors", drop="layers.1")  # that is the model's
    recipe = ak.read_recipe(tmp_path / "less.safetensors")[1]
    assert recipe.output["drop"] == "model_ema, ema_decay, teacher"


def test_fp64_weights_are_rounded_once(state: tiny.State, tmp_path: Path) -> None:
    wide = {name: value.double() * (1 + 2**-30) for name, value in tiny.native(state).items()}
    save_file({name: value.contiguous() for name, value in wide.items()}, tmp_path / "x.safetensors")
    found = ak.open(tmp_path / "x.safetensors")
    assert found.storage[KEY] == "fp64"
    for dtype in (None, "bf16"):
        saved = found.save(tmp_path / "out.safetensors", dtype=dtype)
        wanted = torch.float32 if dtype is None else torch.bfloat16
        assert f"fp64 to {dtype or 'fp32'}" in saved.restored
        out = load_file(tmp_path / "out.safetensors")
        for name, value in wide.items():
            assert torch.equal(out[name], value.float().to(wanted))
    base = ak.open(tiny.write(tmp_path / "b.safetensors", tiny.native(tiny.state(1))))
    table = ak.delta_table(found - base)
    difference = found[KEY].double() - base[KEY].double()
    assert table[table.tensor == KEY].delta_norm.item() == pytest.approx(float(difference.norm()), rel=1e-6)


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        ("noise_refiner.", "0 of 2 blocks of noise_refiner"),
        ("noise_refiner.1.", "1 of 2 blocks of noise_refiner"),
        ("context_refiner.1.", "1 of 2 blocks of context_refiner"),
        ("context_refiner.", "0 of 2 blocks of context_refiner"),
    ],
)
def test_an_incomplete_model_says_what_lacks_and_how_to_use_it(
    native: tiny.State, tmp_path: Path, lacking: str, words: str
) -> None:
    held = {name: value for name, value in native.items() if not name.startswith(lacking)}
    save_file(held, tmp_path / "part.safetensors")
    with pytest.raises(FileFormatError, match=f"(?s)incomplete.*{words}.*with_parts_of"):
        ak.open(tmp_path / "part.safetensors")
    base = ak.open(tiny.write(tmp_path / "base.safetensors", tiny.native(tiny.state(1))))
    part = ak.open_part(tmp_path / "part.safetensors")
    whole = base.with_parts_of(part)
    assert whole.text() == "base.with_parts_of(part)"
    whole.save(tmp_path / "whole.safetensors")
    out, under = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "base.safetensors")
    for name in native:
        assert torch.equal(out[name], held.get(name, under[name])), name
    from alkahest.recipes.inputs import build

    again = build(ak.read_recipe(tmp_path / "whole.safetensors")[1], {}, tmp_path)
    assert again.text() == whole.text()
    kept = base.protect("layers.1").with_parts_of(part)
    kept.save(tmp_path / "kept.safetensors")
    name = "layers.1.feed_forward.w2.weight"
    assert torch.equal(load_file(tmp_path / "kept.safetensors")[name], under[name])
    with pytest.raises(AlgebraError, match=r"a part is no model and no difference"):
        base - part
    with pytest.raises(AlgebraError, match="a part of a checkpoint is needed"):
        base.with_parts_of(base)


def test_the_last_layer_is_missed_where_the_configuration_tells(native: tiny.State, tmp_path: Path) -> None:
    held = {name: value for name, value in native.items() if not name.startswith("layers.1.")}
    save_file(held, tmp_path / "diffusion_pytorch_model.safetensors")
    assert ak.open(tmp_path).architecture.layers == 1
    (tmp_path / "config.json").write_text(json.dumps({"n_layers": 2, "n_refiner_layers": 2}))
    with pytest.raises(FileFormatError, match="1 of 2 blocks of layers"):
        ak.open(tmp_path)
    ak.made_up(layers=1).save(tmp_path / "real-width.safetensors")
    real = ak.open(tmp_path / "real-width.safetensors")
    assert "1 layers and 2 refiners a stream; the published models of this width have 30 and 2" in repr(real)


def test_refiners_alone_are_a_part(native: tiny.State, tmp_path: Path) -> None:
    refiners = {f"diffusion_model.{n}": v for n, v in native.items() if "refiner" in n}
    save_file({**refiners, "ema_decay": torch.tensor(0.5)}, tmp_path / "refiners.safetensors")
    part = ak.open_part(tmp_path / "refiners.safetensors")
    assert {key.partition(".")[0] for key in part} == {"noise_refiner", "context_refiner"}
    assert "noise_refiner (30 tensors)" in repr(part)
    wide = ak.open(
        tiny.write(tmp_path / "wide.safetensors", tiny.native(dict(tiny.model(0, dim=192, n_heads=6).state_dict())))
    )
    with pytest.raises(MismatchError, match="does not fit the model"):
        wide.with_parts_of(part)
    save_file({"a": torch.ones(3)}, tmp_path / "none.safetensors")
    with pytest.raises(UnsupportedError, match="no tensor of Z-Image"):
        ak.open_part(tmp_path / "none.safetensors")


def test_wrappers_are_taken_off(native: tiny.State, tmp_path: Path) -> None:
    for wrapper in ("module.", "net.", "student.", "model.module.", "_orig_mod.model."):
        save_file({wrapper + name: value for name, value in native.items()}, tmp_path / "x.safetensors")
        found = ak.open(tmp_path / "x.safetensors")
        assert found.prefix == wrapper
        assert wrapper in repr(found)
        assert torch.equal(found[KEY], native[KEY])
    twice = {prefix + name: value.clone() for prefix in ("student.", "teacher.") for name, value in native.items()}
    save_file(twice, tmp_path / "two.safetensors")
    with pytest.raises(FileFormatError, match=r"(?s)two transformers.*student.*teacher.*prefix='student.'"):
        ak.open(tmp_path / "two.safetensors")
    chosen = ak.open(tmp_path / "two.safetensors", prefix="teacher.")
    assert len(chosen.companions) == len(native)
    with pytest.raises(AlkahestError, match="no model lies under this prefix"):
        ak.open(tmp_path / "two.safetensors", prefix="pupil.")
    # A copy beside the published place is a companion.
    copies = {prefix + name: value.clone() for prefix in ("", "model_ema.") for name, value in native.items()}
    save_file(copies, tmp_path / "ema.safetensors")
    assert len(ak.open(tmp_path / "ema.safetensors").extras) == len(native)


def write_shards(
    folder: Path, values: tiny.State, stem: str = "diffusion_pytorch_model", index: str | None = None
) -> None:
    folder.mkdir(exist_ok=True)
    names = list(values)
    halves = {f"{stem}-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for file, some in halves.items():
        save_file({name: values[name] for name in some}, folder / file)
    if index:
        weight_map = {name: file for file, some in halves.items() for name in some}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


INDEX = "diffusion_pytorch_model.safetensors.index.json"


def test_an_index_goes_before_a_stray_file_as_in_diffusers(native: tiny.State, tmp_path: Path) -> None:
    write_shards(tmp_path / "f", native, index=INDEX)
    stray = {name: value + 1 for name, value in native.items()}
    save_file(stray, tmp_path / "f" / "diffusion_pytorch_model.safetensors")
    found = ak.open(tmp_path / "f")
    assert torch.equal(found[KEY], native[KEY])
    assert "also there and not read: diffusion_pytorch_model.safetensors" in repr(found)


def test_two_indexes_without_a_published_name_are_ambiguous(native: tiny.State, tmp_path: Path) -> None:
    write_shards(tmp_path / "f", native, stem="a", index="a.safetensors.index.json")
    write_shards(tmp_path / "f", {n: v + 1 for n, v in native.items()}, stem="b", index="b.safetensors.index.json")
    with pytest.raises(FileFormatError, match=r"(?s)several models.*a.safetensors.index.json, b.safetensors.index"):
        ak.open(tmp_path / "f")
    assert torch.equal(ak.open(tmp_path / "f" / "b.safetensors.index.json")[KEY], native[KEY] + 1)
    write_shards(tmp_path / "f", native, index=INDEX)
    assert "also there and not read: a.safetensors.index.json" in repr(ak.open(tmp_path / "f"))


def test_what_diffusers_saves_as_a_variant(tmp_path: Path) -> None:
    tiny.model(4).half().save_pretrained(tmp_path / "t", variant="fp16", max_shard_size="300KB")
    shards = sorted((tmp_path / "t").glob("*.safetensors"))
    index = next((tmp_path / "t").glob("*.index*.json"))
    for source in (tmp_path / "t", index, shards[0], shards[-1]):
        found = ak.open(source)
        assert len(found.files) == len(shards)
        assert torch.equal(found[KEY], tiny.state(4)[KEY].half())


def test_a_complete_set_of_shards_needs_no_index(native: tiny.State, tmp_path: Path) -> None:
    write_shards(tmp_path / "f", native)
    first = tmp_path / "f" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    for source in (tmp_path / "f", first):
        assert torch.equal(ak.open(source)[KEY], native[KEY])
    first.unlink()
    for source in (tmp_path / "f", tmp_path / "f" / "diffusion_pytorch_model-00002-of-00002.safetensors"):
        with pytest.raises(FileFormatError, match=r"(?s)others are missing.*00001-of-00002.*download"):
            ak.open(source)
    save_file({KEY: native[KEY]}, first)
    with pytest.raises(FileFormatError, match="two shards hold the same tensor"):
        save_file(native, tmp_path / "f" / "diffusion_pytorch_model-00002-of-00002.safetensors")
        ak.open(tmp_path / "f")


def raw_file(path: Path, header: str) -> Path:
    body = header.encode("utf-8", "surrogatepass")
    body += b" " * (-len(body) % 8)
    path.write_bytes(len(body).to_bytes(8, "little") + body + bytes(4))
    return path


TENSOR = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    "header",
    [
        '{"__metadata__":null,' + TENSOR + "}",
        '{"__metadata__":{},' + TENSOR + "}",
        '{"__metadata__":{"a":"\\u00e9\\ud83d\\ude00"},' + TENSOR + "}",
        '{"__metadata__":{"a":"\\ud83d"},' + TENSOR + "}",
        '{"__metadata__":{"\\ude00":"a"},' + TENSOR + "}",
        '{"__metadata__":{"a":"\\x41"},' + TENSOR + "}",
        '{"__metadata__":{"a":"\\u+041"},' + TENSOR + "}",
        '{"__metadata__":{"a":"\\u 041"},' + TENSOR + "}",
        '{"__metadata__":{"a":"\t"},' + TENSOR + "}",
        '{"__metadata__":{"a":1},' + TENSOR + "}",
        "{" + TENSOR.replace('"a"', '"\\ud800"') + "}",
        "{" + TENSOR.replace("[1]", "[1.0]") + "}",
        "{" + TENSOR.replace("[1]", "[-0]").replace("[0,4]", "[0,0]") + "}",
    ],
)
def test_headers_as_the_library_takes_them(tmp_path: Path, header: str) -> None:
    from alkahest.files.header import read_header
    from alkahest.files.reader import Reader

    path = raw_file(tmp_path / "x.safetensors", header)
    try:
        with safe_open(path, "pt") as file:
            wanted = file.metadata() or {}
    except SafetensorError:
        with pytest.raises(FileFormatError):
            read_header(Reader(path))
    else:
        assert read_header(Reader(path)).metadata == wanted


@pytest.mark.parametrize("kinds", [("float16", "bfloat16", "bfloat16"), ("bfloat16", "float16", "float16")])
def test_parts_of_a_fused_tensor_keep_the_wider_range(
    state: tiny.State, tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    values = {name: value.to(torch.bfloat16) for name, value in state.items()}
    for which, kind in zip(("to_q", "to_k", "to_v"), kinds, strict=True):
        name = f"layers.0.attention.{which}.weight"
        values[name] = state[name].to(getattr(torch, kind))
    save_file(values, tmp_path / "x.safetensors")
    found = ak.open(tmp_path / "x.safetensors")
    saved = found.save(tmp_path / "out.safetensors", layout="native")
    fused = load_file(tmp_path / "out.safetensors")["layers.0.attention.qkv.weight"]
    assert fused.dtype == torch.bfloat16
    parts = [values[f"layers.0.attention.{which}.weight"].float() for which in ("to_q", "to_k", "to_v")]
    assert torch.equal(fused, torch.cat(parts).to(torch.bfloat16))
    assert any("1 fused tensors whose parts are stored as" in note for note in saved.notes)


def test_files_of_the_hub_s_cache_are_called_by_their_repository(native: tiny.State, tmp_path: Path) -> None:
    repository = tmp_path / "models--Some--Z-Image-Fine"
    digest, commit = "0" * 64, "a" * 40
    for folder in (repository / "blobs", repository / "snapshots" / commit / "transformer"):
        folder.mkdir(parents=True)
    save_file(native, repository / "blobs" / digest)
    link = repository / "snapshots" / commit / "transformer" / "diffusion_pytorch_model.safetensors"
    link.symlink_to(repository / "blobs" / digest)
    for source in (link, link.parent, link.parent.parent, repository / "blobs" / digest):
        assert ak.open(source).name == "Z_Image_Fine"


def test_paths_as_they_are_pasted(native: tiny.State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(native, tmp_path / "a b.safetensors")
    for text in (f'"{tmp_path}/a b.safetensors"', f"'{tmp_path}/a b.safetensors'", f" {tmp_path}/a b.safetensors \n"):
        assert torch.equal(ak.open(text)[KEY], native[KEY])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ak.open("~/a b.safetensors").path == tmp_path / "a b.safetensors"
    save_file(native, tmp_path / "'quoted'")
    assert ak.open(tmp_path / "'quoted'").path.name == "'quoted'"  # where something has that very name
    for text in ("~nouser/x.safetensors", "a\0b"):
        with pytest.raises(FileFormatError, match="this cannot be a file's name"):
            ak.open(text)
        with pytest.raises(AlkahestError, match="this cannot be a file's name"):
            ak.open(tmp_path / "a b.safetensors").save(text)

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

import alkahest as ak
from alkahest.errors import FileFormatError, UnknownNameError, UnsupportedError
from alkahest.files.reader import Reader
from alkahest.model.dtypes import BY_TAG
from alkahest.model.families.zimage import FAMILY


@pytest.fixture(scope="module")
def state() -> tiny.State:
    return tiny.state(4)


def assert_holds(checkpoint: ak.Checkpoint, state: tiny.State, dtype: torch.dtype) -> None:
    assert set(checkpoint) == set(state)
    for key, value in state.items():
        assert checkpoint[key].dtype == dtype
        assert torch.equal(checkpoint[key], value.to(dtype)), key


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_single_files_of_every_layout(prefix: str, layout: str, state: tiny.State, tmp_path: Path) -> None:
    stored = tiny.native(state) if layout == "native" else state
    found = ak.open(tiny.write(tmp_path / "x.safetensors", stored, prefix=prefix))
    assert_holds(found, state, torch.bfloat16)
    assert (found.layout, found.prefix) == (layout, prefix)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_every_plain_dtype(dtype: torch.dtype, state: tiny.State, tmp_path: Path) -> None:
    found = ak.open(tiny.write(tmp_path / "x.safetensors", tiny.native(state), dtype))
    for key, value in state.items():
        assert torch.equal(found[key].float(), value.to(dtype).float())
    assert set(found.storage.values()) == {BY_TAG[found.slices[key].stored.entry.dtype].name}


@pytest.mark.parametrize("spelling", ["scaled_fp8", "comfy_quant", "header"])
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_fp8_in_every_spelling(
    spelling: str, kind: torch.dtype, prefix: str, state: tiny.State, tmp_path: Path
) -> None:
    stored, metadata = tiny.scaled(tiny.native(state), spelling, kind)
    save_file({prefix + name: value for name, value in stored.items()}, tmp_path / "x.safetensors", metadata=metadata)
    found = ak.open(tmp_path / "x.safetensors")
    assert set(found) == set(state)
    for name, value in tiny.meaning(stored).items():
        keys = FAMILY.canonical(name)
        got = torch.cat([found[key].double() for key in keys])
        torch.testing.assert_close(got, value, rtol=1e-6, atol=0)
    expected = "scaled_fp8" if spelling == "scaled_fp8" else "comfy_quant"
    assert found.summary()["storage"] == {"bf16": len(tiny.native(state)) - 30, expected: 30}


def test_all_in_one_files(state: tiny.State, tmp_path: Path) -> None:
    stored = {"model.diffusion_model." + name: value for name, value in tiny.native(state).items()}
    stored |= {
        "vae.decoder.conv_in.weight": torch.ones(3, 2),
        "text_encoders.qwen3_4b.transformer.model.norm.weight": torch.ones(5),
    }
    stored["text_encoders.qwen3_4b.ids"] = torch.arange(4)
    found = ak.open(tiny.write(tmp_path / "x.safetensors", stored))
    assert_holds(found, state, torch.bfloat16)
    assert found.summary()["companions"] == {"text_encoders": 2, "vae": 1}
    assert "text_encoders (2 tensors)" in repr(found)


def shards(folder: Path, state: tiny.State, count: int = 3) -> Path:
    folder.mkdir(parents=True)
    names, weight_map = list(state), {}
    for number in range(count):
        file = f"diffusion_pytorch_model-{number + 1:05}-of-{count:05}.safetensors"
        mine = names[number::count]
        tiny.write(folder / file, {name: state[name] for name in mine})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_folders_of_every_kind(state: tiny.State, tmp_path: Path) -> None:
    transformer = shards(tmp_path / "pipe" / "transformer", state)
    (transformer / "config.json").write_text(json.dumps(tiny.CONFIG))
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    for source in (transformer, tmp_path / "pipe", transformer / "diffusion_pytorch_model.safetensors.index.json"):
        found = ak.open(source)
        assert_holds(found, state, torch.bfloat16)
        assert len(found.files) == 3
    assert ak.open(transformer).config == json.loads(json.dumps(tiny.CONFIG))
    assert ak.open(tmp_path / "pipe").name == "pipe"
    single = tmp_path / "single"
    single.mkdir()
    tiny.write(single / "diffusion_pytorch_model.safetensors", state)
    assert_holds(ak.open(single), state, torch.bfloat16)


def test_what_diffusers_saves_is_opened(state: tiny.State, tmp_path: Path) -> None:
    model = tiny.model(4)
    model.save_pretrained(tmp_path / "transformer", max_shard_size="300KB")
    found = ak.open(tmp_path / "transformer")
    assert len(found.files) > 1
    assert_holds(found, state, torch.float32)


def test_hub_ids_come_from_the_cache(state: tiny.State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--Some--Z-Image"
    shards(repository / "snapshots" / "abc" / "transformer", state)
    tiny.write(repository / "snapshots" / "abc" / "one.safetensors", tiny.native(state))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert_holds(ak.open("Some/Z-Image"), state, torch.bfloat16)
    assert_holds(ak.open("Some/Z-Image/one.safetensors"), state, torch.bfloat16)
    with pytest.raises(FileFormatError, match=r"(?s)the hub did not give it.*check the path or hub id"):
        ak.open("Some/Other")
    # What can only be meant as a path is not asked of the hub.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for path in ("folder/x.safetensors", "./x", "../x", "models/x/y.safetensors", "/some/x", "a\\b"):
        with pytest.raises(FileFormatError, match="no such file or folder"):
            ak.open(path)


def test_optional_tensors_are_carried(state: tiny.State, tmp_path: Path) -> None:
    extra = {
        "norm_final.weight": torch.ones(96),
        "siglip_pad_token": torch.ones(1, 96),
        "siglip_embedder.0.weight": torch.ones(7),
        "siglip_refiner.0.attention.qkv.weight": torch.ones(9, 2),
    }
    found = ak.open(tiny.write(tmp_path / "x.safetensors", {**tiny.native(state), **extra}))
    assert found.extras == {}
    assert found["siglip_refiner.0.attention.to_k.weight"].shape == (3, 2)
    plain = ak.open(tiny.write(tmp_path / "y.safetensors", tiny.native(state)))
    saved = (found + 2 * (plain - plain)).save(tmp_path / "z.safetensors")
    (note,) = saved.notes
    assert note.startswith("nothing changed: every tensor is x's")
    again = ak.open(tmp_path / "z.safetensors")
    assert set(again) == set(found)
    assert torch.equal(again["norm_final.weight"], found["norm_final.weight"])
    (plain + (found - plain)).save(tmp_path / "w.safetensors")
    assert set(ak.open(tmp_path / "w.safetensors")) == set(plain)


def test_parts_and_single_tensors(trio: dict[str, Path]) -> None:
    base = ak.open(trio["base"])
    part = base.part("noise_refiner.0")
    assert len(part) == 15
    assert part["noise_refiner.0.ffn_norm1.weight"].shape == (96,)
    assert part.parameters == sum(base[key].numel() for key in part)
    assert "15 tensors" in repr(part)
    with pytest.raises(UnknownNameError, match="did you mean"):
        base["layers.0.attention.to_qq.weight"]
    with pytest.raises(UnknownNameError, match="not in part"):
        part["layers.0.ffn_norm1.weight"]


def test_the_repr_reads_no_tensor(trio: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base = ak.open(trio["base"])
    monkeypatch.setattr(Reader, "read_into", lambda *arguments: pytest.fail("read a tensor"))
    text, page = repr(base), base._repr_html_()
    for fact in (
        "native",
        "bf16 (89)",
        f"{base.parameters:,} parameters",
        "89 tensors",
        "2 layers, width 96",
        "noise_refiner",
    ):
        assert fact in text
        assert fact in page


QUANTISED = {
    "int8": ({}, torch.int8, "packed I8 without comfy_quant"),
    "packed": ({}, torch.uint8, "packed U8 without comfy_quant"),
    "declared": (
        {"comfy_quant": torch.tensor(list(b'{"format": "awq_w4a16"}'), dtype=torch.uint8)},
        torch.uint8,
        "awq_w4a16",
    ),
    "rotated": (
        {"comfy_quant": torch.tensor(list(b'{"format": "convrot_w4a4"}'), dtype=torch.uint8)},
        torch.int8,
        "convrot",
    ),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_other_quantised_formats_are_refused_by_name(kind: str, state: tiny.State, tmp_path: Path) -> None:
    helpers, dtype, name = QUANTISED[kind]
    stored = {**tiny.native(state)}
    module = "layers.1.feed_forward.w2"
    stored[f"{module}.weight"] = torch.zeros(96, 128, dtype=dtype)
    stored |= {f"{module}.{helper}": value for helper, value in helpers.items()}
    save_file(stored, tmp_path / "x.safetensors")
    with pytest.raises(UnsupportedError, match=rf"(?s){name}.*not supported.*{module}.*use the bf16, fp16, fp8"):
        ak.open(tmp_path / "x.safetensors")


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".gguf"])
def test_pickles_and_gguf_are_never_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UnsupportedError, match=r"GGUF|can run code"):
        ak.open(path)


def broken_scale(stored: tiny.State, how: str) -> None:
    module = "layers.0.feed_forward.w1"
    match how:
        case "missing":
            del stored[f"{module}.weight_scale"]
        case "per row":
            stored[f"{module}.weight_scale"] = torch.ones(255, 1)
        case "integer":
            stored[f"{module}.weight_scale"] = torch.ones((), dtype=torch.int32)
        case "nan":
            stored[f"{module}.weight_scale"] = torch.tensor(float("nan"))
        case "zero":
            stored[f"{module}.weight_scale"] = torch.zeros(())
        case "negative":
            stored[f"{module}.weight_scale"] = torch.tensor(-1.0)
        case "orphan":
            stored["layers.7.feed_forward.w1.weight_scale"] = torch.ones(())
        case "not JSON":
            stored[f"{module}.comfy_quant"] = torch.tensor(list(b"{nope"), dtype=torch.uint8)
        case "other format":
            stored[f"{module}.comfy_quant"] = torch.tensor(list(b'{"format":"float8_e5m2"}'), dtype=torch.uint8)


@pytest.mark.parametrize(
    "how", ["missing", "per row", "integer", "nan", "zero", "negative", "orphan", "not JSON", "other format"]
)
def test_broken_scales_are_refused(how: str, state: tiny.State, tmp_path: Path) -> None:
    stored, _ = tiny.scaled(tiny.native(state), "comfy_quant")
    broken_scale(stored, how)
    save_file(stored, tmp_path / "x.safetensors")
    with pytest.raises(FileFormatError, match=r"layers\.[07]\.feed_forward\.w1"):
        ak.open(tmp_path / "x.safetensors")


def test_a_missing_scale_in_the_old_spelling_is_refused(state: tiny.State, tmp_path: Path) -> None:
    stored, _ = tiny.scaled(tiny.native(state), "scaled_fp8")
    del stored["layers.0.attention.qkv.scale_weight"]
    save_file(stored, tmp_path / "x.safetensors")
    with pytest.raises(FileFormatError, match=r"(?s)no scale.*layers.0.attention.qkv"):
        ak.open(tmp_path / "x.safetensors")


def test_broken_models_and_indexes(state: tiny.State, tmp_path: Path) -> None:
    def refused(match: str, source: Path) -> None:
        with pytest.raises((FileFormatError, UnsupportedError), match=match):
            ak.open(source)

    native = tiny.native(state)
    refused(
        "missing", tiny.write(tmp_path / "a.safetensors", {k: v for k, v in native.items() if k != "cap_pad_token"})
    )
    twice = {**native, "layers.0.attention.to_q.weight": torch.ones(96, 96)}
    refused("(?s)twice.*layers.0.attention.to_q", tiny.write(tmp_path / "b.safetensors", twice))
    uneven = {**native, "layers.0.attention.qkv.weight": torch.ones(289, 96)}
    refused("cut into its parts", tiny.write(tmp_path / "c.safetensors", uneven))
    refused("no such file", tmp_path / "nothing.safetensors")
    refused("cannot be a file's name", tmp_path / ("x" * 300))
    (tmp_path / "empty").mkdir()
    refused("no .safetensors", tmp_path / "empty")
    folder = shards(tmp_path / "sharded", state)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    good = json.loads(index.read_text())
    first = next(iter(good["weight_map"]))
    for change, message in [
        ({first: "../../etc/passwd"}, "impossible file"),
        ({first: "missing.safetensors"}, "shard is missing"),
        ({"layers.77.x": good["weight_map"][first]}, "its shard does not have"),
        ({first: "diffusion_pytorch_model-00002-of-00003.safetensors"}, "elsewhere"),
        ({first: 3}, "impossible file"),
    ]:
        index.write_text(json.dumps({"weight_map": {**good["weight_map"], **change}}))
        refused(message, folder)
    index.write_text(json.dumps({"weight_map": []}))
    refused("no weight_map", folder)
    index.write_text("{nope")
    refused("not valid JSON", folder)
    index.unlink()
    assert len(ak.open(folder).files) == 3  # a complete set needs none
    for number in range(2):
        tiny.write(tmp_path / "empty" / f"model-{number}.safetensors", native)
    refused("several models", tmp_path / "empty")


def test_another_model_is_named_whatever_its_dtypes(tmp_path: Path) -> None:
    other = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(3, 2).half(),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    save_file(other, tmp_path / "sd.safetensors")
    with pytest.raises(UnsupportedError, match="not a Z-Image model"):
        ak.open(tmp_path / "sd.safetensors")


def test_a_truncated_file_is_refused_at_any_length(state: tiny.State, trio: dict[str, Path], tmp_path: Path) -> None:
    whole = trio["base"].stat().st_size
    for size in (0, 5, 8, 100, 5000, whole // 2, whole - 1):
        shutil.copy(trio["base"], tmp_path / "x.safetensors")
        with open(tmp_path / "x.safetensors", "r+b") as file:
            file.truncate(size)
        with pytest.raises(FileFormatError):
            ak.open(tmp_path / "x.safetensors")

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import alkahest as ak
from alkahest.engine import workers
from alkahest.errors import AlkahestError, FileFormatError, NonFiniteError, OutputError, UnknownNameError
from alkahest.files import whole
from alkahest.files.header import BITS, read_header
from alkahest.files.reader import Reader
from alkahest.model import seeded
from alkahest.model.dtypes import FORMATS
from alkahest.model.families.zimage import FAMILY

K = 171.1
LAYER = "layers.1.feed_forward.w2.weight"
Models = tuple[ak.Checkpoint, ak.Checkpoint, ak.Checkpoint]


@pytest.fixture(scope="module")
def models(trio: dict[str, Path]) -> Models:
    return tuple(ak.open(trio[name]) for name in ("bridge", "variant", "base"))  # type: ignore[return-value]


def exact(models: Models, key: str, k: float = K) -> torch.Tensor:
    bridge, variant, base = (model[key].double() for model in models)
    return bridge + k * (variant - base)


def digest(path: Path) -> str:
    return blake3(path.read_bytes()).hexdigest()


def test_the_main_job(models: Models, tmp_path: Path) -> None:
    bridge, variant, base = models
    result = (bridge.protect("refiner") + K * (variant - base)).save(tmp_path / "out.safetensors")
    stored = load_file(tmp_path / "out.safetensors")
    assert set(stored) == set(tiny.native(tiny.state()))  # native names, as ComfyUI reads everywhere
    merged = ak.open(tmp_path / "out.safetensors")
    for key in merged:
        if "refiner" in key:
            assert torch.equal(merged[key], bridge[key])
        else:
            expected = exact(models, key).to(torch.bfloat16)
            assert (merged[key] != expected).double().mean() < 1e-3, key
    assert (result.copied, result.computed, result.restored) == (56, 45, {})
    assert result.path.stat().st_size == result.nbytes
    assert "56 copied byte for byte" in repr(result)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_plain_dtypes_are_rounded_once(dtype: str, layout: str, models: Models, tmp_path: Path) -> None:
    bridge, variant, base = models
    (bridge + 3 * (variant - base)).save(tmp_path / "out.safetensors", dtype=dtype, layout=layout)
    merged = ak.open(tmp_path / "out.safetensors")
    assert merged.layout == layout
    for key in merged:
        assert merged[key].dtype == FORMATS[dtype].torch
        # float32 arithmetic and one rounding: within half a step of the exact answer, and a little.
        wanted = exact(models, key, 3)
        step = torch.finfo(FORMATS[dtype].torch).eps * wanted.abs() + (6e-8 if dtype == "fp16" else 1e-12)
        assert ((merged[key].double() - wanted).abs() <= 0.51 * step + 2e-7 * wanted.abs().max()).all(), key


@pytest.mark.parametrize("kind", ["fp8_e4m3fn", "fp8_e5m2"])
def test_plain_fp8_is_for_the_linears_of_the_stacks(kind: str, models: Models, tmp_path: Path) -> None:
    models[0].save(tmp_path / "out.safetensors", dtype=kind)
    stored = load_file(tmp_path / "out.safetensors")
    for name, value in stored.items():
        linear = name.removesuffix(".weight").endswith(tiny.LINEARS)
        assert value.dtype == (FORMATS[kind].torch if linear else torch.bfloat16), name
        reference = torch.cat([models[0][key] for key in FAMILY.canonical(name)])
        assert torch.equal(value.float(), reference.float().to(value.dtype).float())


@pytest.mark.parametrize("spelling", ["comfy_quant", "scaled_fp8"])
@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_scaled_fp8_is_amax_over_448(spelling: str, layout: str, models: Models, tmp_path: Path) -> None:
    models[0].save(tmp_path / "out.safetensors", dtype=spelling, layout=layout)
    stored = load_file(tmp_path / "out.safetensors")
    suffix = "weight_scale" if spelling == "comfy_quant" else "scale_weight"
    scales = [name for name in stored if name.endswith(suffix)]
    assert len(scales) == (30 if layout == "native" else 42)
    for name in scales:
        module = name.removesuffix(f".{suffix}")
        weight = torch.cat([models[0][key].float() for key in FAMILY.canonical(f"{module}.weight")])
        scale = weight.abs().max() / 448
        assert stored[name].shape == ()
        assert stored[name] == scale
        assert torch.equal(stored[f"{module}.weight"].float(), (weight / scale).to(torch.float8_e4m3fn).float())
        if spelling == "comfy_quant":
            assert json.loads(bytes(stored[f"{module}.comfy_quant"].tolist())) == {"format": "float8_e4m3fn"}
    assert ("scaled_fp8" in stored) == (spelling == "scaled_fp8")
    again = ak.open(tmp_path / "out.safetensors")
    assert set(again.storage.values()) == {"bf16", spelling}


def test_stochastic_rounding_is_seeded_and_unbiased(models: Models, tmp_path: Path) -> None:
    bridge, variant, base = models
    merged = bridge + 0.01 * (variant - base)  # most changes are below half a bf16 step
    runs = {}
    for name, options in {"a": {"seed": 1}, "b": {"seed": 1, "threads": 3}, "c": {"seed": 2}}.items():
        merged.save(tmp_path / f"{name}.safetensors", rounding="stochastic", **options)
        runs[name] = (tmp_path / f"{name}.safetensors").read_bytes()
    assert runs["a"] == runs["b"] != runs["c"]
    merged.save(tmp_path / "nearest.safetensors")
    wanted, own = exact(models, LAYER, 0.01), bridge[LAYER].double()
    change = wanted - own
    got = ak.open(tmp_path / "a.safetensors")[LAYER].double() - own
    lost = ak.open(tmp_path / "nearest.safetensors")[LAYER].double() - own
    assert (lost == 0).double().mean() > 0.9
    assert abs(float((got @ change.T).trace() / (change @ change.T).trace()) - 1) < 0.2
    noise = torch.from_numpy(seeded.bits(1, "rounding", LAYER, 0, change.numel()).astype("int64") & 0xFFFF)
    by_hand = (wanted.float().view(-1).view(torch.int32) + noise.int()) >> 16
    ours = ak.open(tmp_path / "a.safetensors")[LAYER].view(torch.int16).view(-1).int()
    assert (ours == by_hand).double().mean() > 0.999


def test_bytes_do_not_depend_on_threads_or_block_size(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge, variant, base = models
    merged = ak.lerp(bridge.protect("refiner") + 1.1 * (variant - base), bridge - 0.3 * ak.dare(variant - base), 0.37)
    for dtype in ("bf16", "comfy_quant"):
        digests = set()
        for number, (threads, block) in enumerate([(1, 1 << 20), (2, 1 << 20), (7, 999), (3, 4097)]):
            monkeypatch.setattr(workers, "BLOCK", block)
            path = tmp_path / f"{dtype}{number}.safetensors"
            merged.save(path, threads=threads, dtype=dtype, rounding="stochastic")
            digests.add(digest(path))
        assert len(digests) == 1


def test_threads_of_torch_are_left_as_they_were(models: Models, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    try:
        models[0].save(tmp_path / "out.safetensors")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


# --- what is unchanged -----------------------------------------------------------------------------


@pytest.mark.parametrize("leading_layout", ["native", "diffusers"])
@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_protected_bytes_survive_a_change_of_layout(
    leading_layout: str, layout: str, models: Models, tmp_path: Path
) -> None:
    state = {key: models[0][key] for key in models[0]}
    stored = tiny.native(state) if leading_layout == "native" else state
    bridge = ak.open(tiny.write(tmp_path / "bridge.safetensors", stored))
    result = (bridge.protect("refiner") + K * (models[1] - models[2])).save(tmp_path / "out.safetensors", layout=layout)
    merged = ak.open(tmp_path / "out.safetensors")
    for key in (key for key in merged if "refiner" in key):
        assert torch.equal(merged[key].view(torch.int16), state[key].view(torch.int16)), key
    assert (result.copied, result.restored) == (56, {})


def raw_tensors(path: Path, part: str) -> dict[str, bytes]:
    stored = load_file(path)
    return {
        name: value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, value in stored.items()
        if part in name
    }


@pytest.mark.parametrize("form", ["plain", "scaled_fp8", "comfy_quant", "header"])
def test_protected_bytes_survive_fp8_to_the_same_fp8(form: str, models: Models, tmp_path: Path) -> None:
    native = tiny.native(tiny.state(2))
    path = tmp_path / "bridge.safetensors"
    if form == "plain":
        tiny.write(path, native, torch.float8_e4m3fn)
    else:
        tiny.write_scaled(path, native, form)
    bridge = ak.open(path)
    result = (bridge.protect("refiner") + K * (models[1] - models[2])).save(tmp_path / "out.safetensors")
    before, after = raw_tensors(path, "refiner"), raw_tensors(tmp_path / "out.safetensors", "refiner")
    if form == "header":  # comes out as comfy_quant, which says the same inside the file
        after = {name: data for name, data in after.items() if not name.endswith("comfy_quant")}
    assert after == before
    assert (result.copied, result.restored) == (56, {})
    merged = ak.open(tmp_path / "out.safetensors")
    assert merged.storage == bridge.storage
    wanted = bridge[LAYER].double() + K * (models[1][LAYER].double() - models[2][LAYER].double())
    # Half a step of e4m3: 2^-4 of a normal number, 2^-10 among the subnormals, times the scale.
    scale = 1.0 if form == "plain" else float(wanted.abs().max()) / 448
    assert ((merged[LAYER].double() - wanted).abs() <= (wanted.abs() / 16).clamp(min=scale / 1024) + 1e-6).all()


def test_protected_tensors_in_another_storage_are_decoded_and_rounded_once_and_that_is_said(
    models: Models, tmp_path: Path
) -> None:
    native = tiny.native(tiny.state(2))
    bridge = ak.open(tiny.write_scaled(tmp_path / "bridge.safetensors", native, "comfy_quant"))
    result = (bridge.protect("refiner") + K * (models[1] - models[2])).save(tmp_path / "out.safetensors", dtype="bf16")
    merged = ak.open(tmp_path / "out.safetensors")
    for key in (key for key in merged if "refiner" in key):
        assert torch.equal(merged[key], bridge[key].float().to(torch.bfloat16)), key
    assert result.restored == {"comfy_quant to bf16": 28}
    assert "28 protected tensors change storage (comfy_quant to bf16): decoded and rounded once, not copied" in repr(
        result
    )


def test_split_scales_cannot_be_fused_but_one_scale_can_be_split(models: Models, tmp_path: Path) -> None:
    split = models[0].save(tmp_path / "split.safetensors", dtype="comfy_quant", layout="diffusers").path
    fused = ak.open(split).save(tmp_path / "fused.safetensors", layout="native")
    assert fused.restored == {"comfy_quant to comfy_quant": 18}  # q, k, v of six blocks share a scale now
    again = ak.open(tmp_path / "fused.safetensors").save(tmp_path / "again.safetensors", layout="diffusers")
    assert again.restored == {}
    for key in models[0]:
        assert torch.equal(ak.open(tmp_path / "fused.safetensors")[key], ak.open(tmp_path / "again.safetensors")[key])


def test_helpers_of_scaled_weights_are_kept(tmp_path: Path) -> None:
    stored, _ = tiny.scaled(tiny.native(tiny.state(2)), "comfy_quant")
    module = "noise_refiner.0.feed_forward.w1"
    note = b'{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}'
    stored[f"{module}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
    stored[f"{module}.input_scale"] = torch.tensor(0.25)
    save_file(stored, tmp_path / "in.safetensors")
    ak.open(tmp_path / "in.safetensors").save(tmp_path / "out.safetensors")
    again = load_file(tmp_path / "out.safetensors")
    assert set(again) == set(stored)
    assert all(
        torch.equal(again[name].view(torch.uint8), stored[name].view(torch.uint8))
        for name in stored
        if stored[name].ndim
    )
    assert again[f"{module}.input_scale"] == 0.25
    old, _ = tiny.scaled(tiny.native(tiny.state(2)), "scaled_fp8")
    old["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)  # ComfyUI: full precision multiplication
    save_file(old, tmp_path / "old.safetensors")
    ak.open(tmp_path / "old.safetensors").save(tmp_path / "kept.safetensors")
    assert load_file(tmp_path / "kept.safetensors")["scaled_fp8"].shape == (2,)


def test_all_in_one_files_keep_their_other_models(models: Models, tmp_path: Path) -> None:
    others = {
        "vae.decoder.conv_in.weight": torch.randn(7, 3),
        "text_encoders.qwen3_4b.norm.weight": torch.randn(5).half(),
        "text_encoders.qwen3_4b.ids": torch.arange(9),
        "vae.empty": torch.empty(0, 3),
    }
    prefix = "model.diffusion_model."
    stored = {prefix + name: value for name, value in tiny.native(tiny.state(2)).items()}
    described = {"format_version": "1.0", "layers": {"text_encoders.qwen3_4b.norm": {"format": "nvfp4"}}}
    save_file({**stored, **others}, tmp_path / "aio.safetensors", {"_quantization_metadata": json.dumps(described)})
    bridge = ak.open(tmp_path / "aio.safetensors")
    merged = bridge + 2 * (models[1] - models[2])
    merged.save(tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in others.items())
    assert {name for name in found if name not in others} == set(stored)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert json.loads(file.metadata()["_quantization_metadata"]) == described
    result = merged.save(tmp_path / "bare.safetensors", layout="native")
    assert set(load_file(tmp_path / "bare.safetensors")) == {name.removeprefix(prefix) for name in stored}
    assert "4 tensors of other models in aio are left out" in repr(result)
    with pytest.raises(OutputError, match="no VAE or text encoder to carry"):
        models[0].save(tmp_path / "no.safetensors", layout="all-in-one")


def test_tensors_lie_aligned(models: Models, tmp_path: Path) -> None:
    models[0].save(tmp_path / "out.safetensors", dtype="comfy_quant")
    header = read_header(Reader(tmp_path / "out.safetensors"))
    for name, entry in header.entries.items():
        size = BITS[entry.dtype] // 8
        assert entry.offset % size == 0, name


# --- folders and shards ----------------------------------------------------------------------------


def test_shards_and_diffusers_folders(models: Models, tmp_path: Path) -> None:
    for layout, name in (("native", "model"), ("diffusers", "diffusion_pytorch_model")):
        result = models[0].save(tmp_path / layout, layout=layout, max_shard_size="600KB")
        assert len(result.files) > 2
        assert all(path.stat().st_size < 620_000 for path in result.files)
        assert all(path.name.startswith(f"{name}-0000") for path in result.files)
        again = ak.open(tmp_path / layout)
        assert all(torch.equal(again[key], models[0][key]) for key in models[0])
        assert ("config.json" in os.listdir(tmp_path / layout)) == (layout == "diffusers")
    models[0].save(tmp_path / "whole", layout="diffusers")
    assert sorted(os.listdir(tmp_path / "whole")) == ["config.json", "diffusion_pytorch_model.safetensors"]
    with pytest.raises(OutputError, match="not empty"):
        models[0].save(tmp_path / "whole", layout="diffusers")


def test_the_sources_config_is_kept(models: Models, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({**tiny.CONFIG, "marker": 7}))
    tiny.write(source / "diffusion_pytorch_model.safetensors", tiny.state(2))
    ak.open(source).save(tmp_path / "out", layout="diffusers")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["marker"] == 7


# --- refusals --------------------------------------------------------------------------------------


def test_the_output_is_never_an_input(trio: dict[str, Path], models: Models, tmp_path: Path) -> None:
    inputs = tmp_path / "bridge.safetensors"
    inputs.write_bytes(trio["bridge"].read_bytes())
    before = digest(inputs)
    (tmp_path / "soft.safetensors").symlink_to(inputs)
    os.link(inputs, tmp_path / "hard.safetensors")
    merged = ak.open(inputs) + (models[1] - models[2])
    for name in ("bridge.safetensors", "soft.safetensors", "hard.safetensors"):
        with pytest.raises(OutputError, match="one of the inputs"):
            merged.save(tmp_path / name)
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(OutputError, match="one of the inputs"):
        merged.save(tmp_path / "loop" / "bridge.safetensors")
    assert digest(inputs) == before


def test_misuse_is_refused_before_anything_is_written(models: Models, tmp_path: Path) -> None:
    bridge = models[0]
    cases: list[tuple[type[AlkahestError], str, str, dict[str, object]]] = [
        (OutputError, "must end in .safetensors", "out", {}),
        (OutputError, "must end in .safetensors", "out.pt", {}),
        (OutputError, "shards need a folder", "out.safetensors", {"max_shard_size": "1GB"}),
        (OutputError, "shard size", "out", {"max_shard_size": "big"}),
        (OutputError, "shard size", "out", {"max_shard_size": 0}),
        (OutputError, "does not exist", "no/out.safetensors", {}),
        (UnknownNameError, "dtype", "out.safetensors", {"dtype": "bf17"}),
        (UnknownNameError, "did you mean 'native'", "out.safetensors", {"layout": "nativ"}),
        (UnknownNameError, "did you mean 'stochastic'", "out.safetensors", {"rounding": "stochastik"}),
        (UnknownNameError, "did you mean 'dtype'", "out.safetensors", {"dtyp": "bf16"}),
        (OutputError, "whole number", "out.safetensors", {"threads": 0}),
        (OutputError, "whole number", "out.safetensors", {"seed": 1.5}),
        (OutputError, "this rounds to nearest", "out.safetensors", {"seed": 3}),
        (OutputError, "this rounds to nearest", "out.safetensors", {"seed": -1, "rounding": "nearest"}),
        (AlkahestError, "device is not there", "out.safetensors", {"device": "cuda:99"}),
        (AlkahestError, "device is not there", "out.safetensors", {"device": "gpu"}),
    ]
    for error, message, name, options in cases:
        with pytest.raises(error, match=message):
            bridge.save(tmp_path / name, **options)
    assert os.listdir(tmp_path) == []


def test_a_small_disk_is_told_before_reading(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(Reader, "read_into", lambda *arguments: pytest.fail("read before checking"))
    with pytest.raises(OutputError, match=r"(?s)disk is too small.*expected: 2,\d.*found: 1,000 bytes"):
        models[0].save(tmp_path / "out.safetensors")


def test_nan_of_weights_that_are_no_file_is_theirs(tmp_path: Path) -> None:
    class Broken(type(ak.made_up(1, width=96))):  # type: ignore[misc]
        def read(self, key: str, start: int, stop: int, out: torch.Tensor, workspace: object) -> None:
            out.fill_(float("nan") if key == "layers.0.ffn_norm1.weight" else 1.0)

    broken = Broken(1, 0, 0.0, "all", 96, "broken")
    with pytest.raises(NonFiniteError, match=r"(?s)broken holds NaN.*96 of them"):
        broken.save(tmp_path / "out.safetensors")


def test_metadata_is_written_recorded_and_checked(trio: dict[str, Path], tmp_path: Path) -> None:
    merged = ak.open(trio["bridge"]) + 2 * (ak.open(trio["variant"]) - ak.open(trio["base"]))
    merged.save(tmp_path / "out.safetensors", metadata={"title": "mine", "prompt": "{}"})
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["title"] == "mine"
    recipe = ak.read_recipe(tmp_path / "out.safetensors")[1]
    merged.save(tmp_path / "again.safetensors", **recipe.output)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()
    for wrong in ({"alkahest": "x"}, {"format": "np"}, {"a": 1}, "text"):
        with pytest.raises(OutputError, match="metadata"):
            merged.save(tmp_path / "none.safetensors", metadata=wrong)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", [LAYER, "noise_refiner.0.attention.to_k.weight"])
@pytest.mark.parametrize("dtype", [None, "comfy_quant", "fp16"])
def test_nonfinite_inputs_are_refused_by_key_and_count(
    value: float, key: str, dtype: str | None, models: Models, tmp_path: Path
) -> None:
    state = tiny.state(2)
    state[key] = state[key].clone()
    state[key].view(-1)[[3, 500, 700]] = value
    bridge = ak.open(tiny.write(tmp_path / "bridge.safetensors", tiny.native(state)))
    merged = bridge.protect("refiner") + K * (models[1] - models[2])
    with pytest.raises(NonFiniteError, match=r"(?s)NaN or infinity.*bridge.safetensors.*3 of them") as caught:
        merged.save(tmp_path / "out.safetensors", dtype=dtype)
    assert caught.value.key == key
    assert os.listdir(tmp_path) == ["bridge.safetensors"]
    result = merged.save(tmp_path / "out.safetensors", dtype=dtype, allow_nonfinite=True)
    assert result.nonfinite == {key: 3}
    assert f"3 non-finite values in {key}" in repr(result)


def test_overflow_on_narrowing_is_refused_and_told(models: Models, tmp_path: Path) -> None:
    merged = models[0] + 1e8 * (models[1] - models[2])
    for dtype in ("fp16", "fp8", "fp8_e5m2"):
        with pytest.raises(NonFiniteError, match=rf"too large for {'fp8_e4m3fn' if dtype == 'fp8' else dtype}"):
            merged.save(tmp_path / "out.safetensors", dtype=dtype)
    result = merged.save(tmp_path / "out.safetensors", dtype="fp16", allow_nonfinite=True)
    stored = ak.open(tmp_path / "out.safetensors")
    assert result.overflowed == {key: n for key in stored if (n := int(stored[key].isinf().sum()))}
    merged.save(tmp_path / "scaled.safetensors", dtype="comfy_quant")  # a scale holds any size
    with pytest.raises(NonFiniteError, match="overflows float32"):
        (models[0] + 1e300 * (models[1] - models[2])).save(tmp_path / "no.safetensors")
    assert not (tmp_path / "no.safetensors").exists()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("dtype", "largest"), [("fp16", 65504.0), ("fp8_e5m2", 57344.0), ("fp8_e4m3fn", 448.0)])
def test_the_first_number_that_is_too_large_on_either_side(
    sign: int, dtype: str, largest: float, tmp_path: Path
) -> None:
    """What rounds to the largest number is kept; half a step further it would round past it."""
    key = "layers.1.attention.to_v.weight"
    kinds = {"fp16": torch.float16, "fp8_e5m2": torch.float8_e5m2, "fp8_e4m3fn": torch.float8_e4m3fn}
    spacing = {"fp16": 32.0, "fp8_e5m2": 8192.0, "fp8_e4m3fn": 32.0}[dtype]  # between the two largest
    assert torch.tensor(largest).to(kinds[dtype]).float() == largest
    for value, fits in ((largest + 0.49 * spacing, True), (largest + 0.5 * spacing, False)):
        state = tiny.state(2)
        state[key] = state[key].clone()
        state[key][5, 7] = sign * value
        one = ak.open(tiny.write(tmp_path / "one.safetensors", tiny.native(state), torch.float32))
        if fits:
            one.save(tmp_path / "out.safetensors", dtype=dtype)
            assert float(ak.open(tmp_path / "out.safetensors")[key][5, 7]) == sign * largest
        else:
            with pytest.raises(NonFiniteError, match=f"too large for {dtype}") as caught:
                one.save(tmp_path / "no.safetensors", dtype=dtype)
            assert caught.value.key == key


def test_an_input_that_changes_under_the_merge_is_noticed(trio: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "bridge.safetensors"
    path.write_bytes(trio["bridge"].read_bytes())
    bridge = ak.open(path)
    events = bridge.stream(tmp_path / "out.safetensors", threads=1)
    next(events)
    with open(path, "r+b") as file:
        file.seek(-10, 2)
        file.write(b"x")
    os.utime(path, (1, 1))
    with pytest.raises(FileFormatError, match="changed after it was opened"):
        list(events)
    with pytest.raises(FileFormatError, match="changed after it was opened"):
        bridge.save(tmp_path / "out.safetensors")
    assert os.listdir(tmp_path) == ["bridge.safetensors"]


def test_an_input_that_shrinks_is_noticed(trio: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "bridge.safetensors"
    path.write_bytes(trio["bridge"].read_bytes())
    bridge = ak.open(path)
    bridge["x_pad_token"]
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(FileFormatError, match="ended early"):
        bridge.save(tmp_path / "out.safetensors")


# --- events ----------------------------------------------------------------------------------------


def test_events_count_up_to_the_result(models: Models, tmp_path: Path) -> None:
    events = list((models[0] + (models[1] - models[2])).stream(tmp_path / "out.safetensors"))
    done = [event.done for event in events]
    assert done == sorted(done)
    assert {event.total for event in events} == {(tmp_path / "out.safetensors").stat().st_size}
    assert events[-1].done == events[-1].total
    assert events[-1].result is not None
    assert all(event.result is None for event in events[:-1])
    assert {event.key for event in events} >= set(models[0])


def test_closing_the_generator_stops_and_cleans(models: Models, tmp_path: Path) -> None:
    events = (models[0] + (models[1] - models[2])).stream(tmp_path / "out.safetensors", threads=1)
    next(events)
    assert len(os.listdir(tmp_path)) == 1
    events.close()
    assert os.listdir(tmp_path) == []
    folder = models[0].stream(tmp_path / "out", layout="diffusers", threads=1)
    next(folder)
    folder.close()
    assert os.listdir(tmp_path) == []


def test_whole_tensor_methods_say_so(models: Models, tmp_path: Path) -> None:
    merged = models[0].protect("refiner") + ak.ties([models[1] - models[2]], density=0.5)
    result = merged.save(tmp_path / "out.safetensors")
    assert any("computed whole" in note for note in result.notes)
    delta = models[1][LAYER].float() - models[2][LAYER].float()
    kept = delta.abs() >= delta.abs().view(-1).kthvalue(delta.numel() - delta.numel() // 2 + 1).values
    wanted = (models[0][LAYER].float() + torch.where(kept, delta, 0)).to(torch.bfloat16)
    assert torch.equal(ak.open(tmp_path / "out.safetensors")[LAYER], wanted)


def test_metadata_is_readable_by_anyone(models: Models, tmp_path: Path) -> None:
    (models[0] + (models[1] - models[2])).save(tmp_path / "out.safetensors", dtype=torch.float16)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    recorded = json.loads(metadata["alkahest"])
    assert recorded["recipe"] == "bridge + (variant - base)"
    assert recorded["output"] == {"dtype": "fp16"}
    for model in models:
        (entry,) = recorded["inputs"][model.name]
        assert entry == {"file": model.path.name, "bytes": model.path.stat().st_size, "blake3": digest(model.path)}


def test_what_happened_to_tensors_is_counted_by_hand(trio: dict[str, Path], tmp_path: Path) -> None:
    """Of 101: layer 1 is computed, with a tensor of the final layer; the rest is copied, or decoded for another storage."""
    bridge, variant, base = (ak.open(trio[name]) for name in ("bridge", "variant", "base"))
    delta = (variant - base).only("layers.1, all_final_layer.2-1.linear.bias")
    changed = [key for key in bridge.shapes if key.startswith("layers.1.")] + ["all_final_layer.2-1.linear.bias"]
    same = (bridge + 2 * delta).save(tmp_path / "same.safetensors")
    assert (same.computed, same.copied, same.restored) == (len(changed), 101 - len(changed), {})
    wide = (bridge + 2 * delta).save(tmp_path / "wide.safetensors", dtype="fp32")
    assert (wide.computed, wide.copied, wide.restored) == (16, 0, {"bf16 to fp32": 85})
    small = (bridge + 2 * delta).save(tmp_path / "small.safetensors", dtype="fp8_e4m3fn")
    matrices = [key for key in bridge.shapes if bridge.family.is_quantisable(key)]
    rest = [key for key in matrices if key not in changed]
    assert (small.computed, small.copied) == (16, 101 - 16 - len(rest))
    assert small.restored == {"bf16 to fp8_e4m3fn": len(rest)}

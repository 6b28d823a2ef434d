from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import alkahest as ak
from alkahest.cli import app
from alkahest.engine.events import result_of
from alkahest.engine.options import Options
from alkahest.engine.record import Recipe
from alkahest.engine.save import stream
from alkahest.errors import AlkahestError, OutputError, RecipeError
from alkahest.files import hashes
from alkahest.recipes import inputs
from alkahest.recipes.inputs import build
from alkahest.recipes.verify import Verdict, stream_verdict


@pytest.fixture
def folder(trio: dict[str, Path], tmp_path: Path) -> Path:
    for path in trio.values():
        shutil.copy(path, tmp_path)
        os.utime(tmp_path / path.name, (1e9, 1e9))  # old enough for the hash cache
    return tmp_path


def merged(folder: Path, **options: object) -> Path:
    bridge, variant, base = (ak.open(folder / f"{name}.safetensors") for name in ("bridge", "variant", "base"))
    expression = (
        bridge.protect("refiner") + ak.param("k", 171.1) * (variant - base) - 0.1 * ak.dare(variant - base, seed=4)
    )
    return expression.save(folder / "out.safetensors", **options).path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.float16},
        {"dtype": "comfy_quant", "layout": "diffusers"},
        {"rounding": "stochastic", "seed": 9},
        {"comfy_compatible": True},
    ],
    ids=str,
)
def test_a_recipe_read_back_gives_the_same_bytes(options: dict[str, object], folder: Path) -> None:
    path = merged(folder, **options)
    what, recipe = ak.read_recipe(path)
    assert what == "a checkpoint with a recipe inside"
    build(recipe, {}, folder).save(folder / "again.safetensors", **recipe.output)
    assert (folder / "again.safetensors").read_bytes() == path.read_bytes()
    (folder / "r.json").write_text(recipe.to_json())
    assert ak.read_recipe(folder / "r.json") == ("a recipe", recipe)


def test_a_seed_that_an_earlier_version_recorded_for_nothing(folder: Path) -> None:
    """It was taken beside rounding to nearest, and written down: such a file verifies, and merges with a word."""
    bridge, variant, base = (ak.open(folder / f"{name}.safetensors") for name in ("bridge", "variant", "base"))
    path = folder / "out.safetensors"
    list(stream(bridge + 3 * (variant - base), path, Options(seed=5), None))
    assert ak.read_recipe(path)[1].output == {"seed": 5}
    assert result_of(stream_verdict(path, recompute=True)).differing == []
    again = folder / "again.safetensors"
    result = CliRunner().invoke(app, ["merge", "--recipe", str(path), "-o", str(again), "--quiet"])
    assert (result.exit_code, "the recorded seed 5 is not used" in result.stderr) == (0, True)
    assert ak.read_recipe(again)[1].output == {}
    assert load_file(again).keys() == load_file(path).keys()
    assert all(value.equal(load_file(again)[key]) for key, value in load_file(path).items())
    random = ["--rounding", "stochastic", "-o", str(again), "--quiet"]
    result = CliRunner().invoke(app, ["merge", "--recipe", str(path), *random])
    assert (result.exit_code, "not used" in result.stderr) == (0, False)
    assert ak.read_recipe(again)[1].output == {"rounding": "stochastic", "seed": 5}


def test_an_option_on_the_command_line_wins_over_the_recipe_even_if_it_is_the_default(folder: Path) -> None:
    path, again = merged(folder, rounding="stochastic", seed=9, comfy_compatible=True), folder / "again.safetensors"
    for typed, output in [
        ([], {"rounding": "stochastic", "seed": 9, "comfy_compatible": True}),
        (["--seed", "0"], {"rounding": "stochastic", "comfy_compatible": True}),
        (["--rounding", "nearest"], {"comfy_compatible": True}),
    ]:
        result = CliRunner().invoke(app, ["merge", "--recipe", str(path), "-o", str(again), "--quiet", *typed])
        assert result.exit_code == 0, result.output
        assert ak.read_recipe(again)[1].output == output


def test_inputs_are_found_by_hash_wherever_they_were_seen(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "_RACY_SECONDS", -1)
    path = merged(folder)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("bridge", "variant", "base"):
        shutil.move(folder / f"{name}.safetensors", elsewhere / f"renamed {name}.safetensors")
    recipe = ak.read_recipe(path)[1]
    with pytest.raises(RecipeError, match=r"(?s)'bridge' was not found.*--bridge PATH"):
        build(recipe, {}, folder)
    given = {name: elsewhere / f"renamed {name}.safetensors" for name in ("bridge", "variant", "base")}
    build(recipe, given).save(folder / "again.safetensors", **recipe.output)
    assert (folder / "again.safetensors").read_bytes() == path.read_bytes()
    build(recipe, {}, folder)  # now their hashes are known at the new place


def test_miniatures_are_found_where_nothing_was_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, variant = ak.open("mini:base"), ak.open("mini:base-variant")
    saved = (base + 2 * (variant - base)).save(tmp_path / "out.safetensors")
    monkeypatch.setattr(inputs, "known_paths", lambda digest: [])
    (tmp_path / "base.safetensors").write_bytes(b"something else, of the name that is recorded")
    found = build(ak.read_recipe(saved.path)[1], {}, tmp_path)
    assert {Path(leaf.path).parent for leaf in found.leaves()} == {ak.mini.WEIGHTS}


def test_a_file_named_as_a_miniature_is_not_taken_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "apart").mkdir()
    saved = ak.lerp(ak.open(folder / "base.safetensors"), ak.open(folder / "variant.safetensors"), 0.5).save(
        folder / "apart" / "out.safetensors"
    )
    monkeypatch.setattr(inputs, "known_paths", lambda digest: [])
    with pytest.raises(RecipeError, match="the input 'base' was not found"):
        build(ak.read_recipe(saved.path)[1], {})


def test_a_changed_input_is_refused(folder: Path) -> None:
    recipe = ak.read_recipe(merged(folder))[1]
    tiny.write(folder / "variant.safetensors", tiny.native(tiny.state(77)))
    with pytest.raises(RecipeError, match=r"(?s)'variant' is not the file.*expected: variant.safetensors"):
        build(recipe, {}, folder)
    with pytest.raises(RecipeError, match="'bridge' is not the file"):
        build(recipe, {"bridge": folder / "base.safetensors"}, folder)


def test_recipes_by_hand(folder: Path) -> None:
    (folder / "r.txt").write_text("bridge + k * (variant - base)\n")
    what, recipe = ak.read_recipe(folder / "r.txt")
    assert what == "recipe text"
    paths = {name: str(folder / f"{name}.safetensors") for name in ("bridge", "variant", "base")}
    assert build(recipe, {**paths, "k": 2.0}).text() == "bridge + param('k', 2) * (variant - base)"
    for given, message in [
        (paths, "nothing is given for 'k'"),
        ({**paths, "k": 2.0, "bse": "x"}, "did you mean 'base'"),
    ]:
        with pytest.raises(AlkahestError, match=message):
            build(recipe, given)
    with pytest.raises(RecipeError, match="not a complete model"):
        build(Recipe("variant - base"), {name: paths[name] for name in ("variant", "base")})
    assert build(Recipe("made_up(layers=1, width=96)"), {}).text().startswith("made_up(")


def test_sharded_inputs_and_outputs(folder: Path) -> None:
    ak.open(folder / "base.safetensors").save(folder / "sharded", layout="diffusers", max_shard_size="600KB")
    base = ak.open(folder / "sharded", name="base")
    path = (
        (ak.open(folder / "bridge.safetensors") + 2 * (ak.open(folder / "variant.safetensors") - base))
        .save(folder / "out", max_shard_size="1MB")
        .path
    )
    recipe = ak.read_recipe(path)[1]
    assert len(recipe.inputs["base"]) > 2
    build(recipe, {"base": folder / "sharded"}, folder).save(folder / "again", **recipe.output)
    for file in sorted(os.listdir(path)):
        assert (folder / "again" / file).read_bytes() == (path / file).read_bytes()
    verdict = result_of(stream_verdict(path, {"base": folder / "sharded"}, recompute=True))
    assert isinstance(verdict, Verdict)
    assert verdict.differing == []


def test_what_is_no_recipe_is_named(folder: Path) -> None:
    save_file(load_file(folder / "base.safetensors"), folder / "plain.safetensors")
    save_file(
        load_file(folder / "base.safetensors"),
        folder / "comfy.safetensors",
        metadata={"prompt": "{}", "workflow": "{}"},  # saved by ComfyUI, with nothing in it
    )
    (folder / "workflow.json").write_text('{"nodes": [], "links": []}')
    (folder / "other.json").write_text('{"a": 1}')
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "shell.txt").write_text("import os; os.system('true')")
    for name, error, message in [
        ("plain.safetensors", RecipeError, "holds no recipe"),
        ("comfy.safetensors", RecipeError, "no workflow in this file"),
        ("workflow.json", RecipeError, "neither saves nor samples a model"),
        ("other.json", RecipeError, "not a ComfyUI workflow"),
        ("binary.txt", RecipeError, "neither a checkpoint nor text"),
        ("shell.txt", RecipeError, "cannot be read"),
        ("missing.json", AlkahestError, "no such file"),
    ]:
        with pytest.raises(error, match=message):
            ak.read_recipe(folder / name)


def last(*arguments: object, **options: object) -> Verdict:
    verdict = result_of(stream_verdict(*arguments, **options))  # type: ignore[arg-type]
    assert isinstance(verdict, Verdict)
    return verdict


def test_verify(folder: Path) -> None:
    path = merged(folder, dtype="comfy_quant")
    verdict = last(path, recompute=True)
    assert verdict.ok
    assert verdict.differing == []
    assert "every byte the same" in repr(verdict)
    assert set(verdict.inputs) == {"bridge", "variant", "base"}
    # A header with other spaces at its end, as the format allows, is the same header.
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    text = whole[8:end].rstrip()
    text += b" " * (-len(text) % 8 + 8)
    assert len(text) != end - 8
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[end:])
    assert last(path, recompute=True).differing == []
    path.write_bytes(len(text).to_bytes(8, "little") + text.replace(b'"format":"pt"', b'"format":"np"') + whole[end:])
    assert last(path, recompute=True).differing == ["the header"]
    # One flipped byte in the data is found, and named.
    path.write_bytes(whole)
    content = bytearray(whole)
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    verdict = last(path, recompute=True)
    assert not verdict.ok
    assert len(verdict.differing or []) == 1
    assert "NOT SOUND" in repr(verdict)
    assert os.listdir(folder).count("out.safetensors") == 1
    assert not [name for name in os.listdir(folder) if "partial" in name]


def test_verify_refuses_wrong_names(folder: Path) -> None:
    path = merged(folder)
    with pytest.raises(AlkahestError, match="did you mean 'base'"):
        last(path, {"bas": folder / "base.safetensors"})
    with pytest.raises(RecipeError, match=r"(?s)'base' is not the file.*BLAKE3"):
        last(path, {"base": folder / "variant.safetensors"})


def test_verify_counts_what_is_not_finite_and_tells_changed_inputs(folder: Path) -> None:
    path = merged(folder)
    tiny.write(folder / "base.safetensors", tiny.native(tiny.state(78)))
    verdict = last(path)
    assert not verdict.ok
    assert verdict.inputs["base"] == "changed"
    state = tiny.native(tiny.state(2))
    state["layers.0.ffn_norm1.weight"] = torch.full((96,), float("nan"))
    verdict = last(tiny.write(folder / "nan.safetensors", state))
    assert verdict.nonfinite == {"layers.0.ffn_norm1.weight": 96}
    assert verdict.recipe is None
    with pytest.raises(RecipeError, match="nothing to recompute"):
        last(folder / "nan.safetensors", recompute=True)


def test_it_reads_every_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte that changes while the times stay: rot of a disk, or somebody who puts them back."""
    monkeypatch.setattr(hashes, "_RACY_SECONDS", -1)
    path = merged(folder)
    (verdict,) = [event.result for event in stream_verdict(path) if event.result]
    assert verdict.ok
    with (folder / "variant.safetensors").open("r+b") as file:
        status = os.fstat(file.fileno())
        file.seek(-5, os.SEEK_END)
        file.write(b"\x01")
    os.utime(folder / "variant.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    # As if its place in the cache were still believed: what is remembered is not asked.
    monkeypatch.setattr(hashes, "_recall", lambda reader: pytest.fail("a remembered hash was believed"))
    (verdict,) = [event.result for event in stream_verdict(path) if event.result]
    assert verdict.inputs["variant"] == "changed"
    assert not verdict.ok


@pytest.mark.skipif(os.name == "nt", reason="names there are text")
def test_an_input_whose_name_is_no_utf8_is_recorded_and_found_again(folder: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.safetensors"))
    os.rename(folder / "variant.safetensors", odd)
    base, variant = ak.open(folder / "base.safetensors"), ak.open(odd, name="variant")
    path = (base + 2 * (variant - base)).save(folder / "out.safetensors").path
    recipe = ak.read_recipe(path)[1]
    assert recipe.inputs["variant"][0]["file"] == r"caf\xe9.safetensors"
    shutil.rmtree(os.environ["ALKAHEST_CACHE"])  # so that nothing is known of where it was seen
    build(recipe, {}, folder).save(folder / "again.safetensors")
    assert (folder / "again.safetensors").read_bytes() == path.read_bytes()
    ak.extract_lora(variant - base, rank=2).save(folder / "lora.safetensors")
    with pytest.raises(OutputError, match=r"(?s)half a character.*give text"):
        base.save(folder / "x.safetensors", metadata={"title": "\ud800"})


def test_a_recorded_name_that_no_file_can_have_is_not_found(folder: Path) -> None:
    text = Recipe.from_json(ak.open(merged(folder)).metadata["alkahest"])
    text.inputs["base"][0].update(file="x" * 300, blake3="0" * 64)
    with pytest.raises(RecipeError, match="the input 'base' was not found"):
        build(text, {}, folder)

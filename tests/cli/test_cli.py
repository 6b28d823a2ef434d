from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import typer
from typer.testing import CliRunner

import alkahest as ak
from alkahest.cli import app

MAIN_JOB = "bridge.protect('refiner') + 171.1 * (variant - base)"


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def named(trio: dict[str, Path]) -> list[object]:
    return [item for name, path in trio.items() for item in (f"--{name}", path)]


def test_every_command_and_option_has_help() -> None:
    group = typer.main.get_command(app)
    known = {
        "inspect",
        "diff",
        "multiplier",
        "check",
        "cache",
        "merge",
        "convert",
        "recipe",
        "verify",
        "workflow",
        "nodes",
        "make-checkpoint",
        "mini",
        "extract-lora",
        "lora",
        "finetune",
        "make-dataset",
        "experiment",
    }
    assert set(group.commands) == known  # type: ignore[attr-defined]
    family = group.commands["mini"].commands  # type: ignore[attr-defined]
    assert set(family) == {"build", "measure"}
    loras = group.commands["lora"].commands  # type: ignore[attr-defined]
    assert set(loras) == {"inspect", "convert", "resize", "merge"}
    tried = group.commands["experiment"].commands  # type: ignore[attr-defined]
    assert set(tried) == {"list", "run", "report"}
    for name, command in [*group.commands.items(), *family.items(), *loras.items(), *tried.items()]:
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"
    assert "--install-completion" in run("--help")
    assert run("--version").strip() == ak.__version__


def test_inspect(trio: dict[str, Path]) -> None:
    assert "bf16 (89)" in run("inspect", trio["base"])
    about = json.loads(run("inspect", trio["base"], "--json"))
    assert (about["layout"], about["tensors"], about["layers"]) == ("native", 89, 2)
    assert run("inspect", trio["base"], "--keys", "layers.1.attention").count("\n") == 6
    rows = json.loads(run("inspect", trio["base"], "--keys", "pad_tokens", "--json"))
    assert rows == {name: {"shape": [1, 96], "storage": "bf16"} for name in ("x_pad_token", "cap_pad_token")}
    assert "did you mean 'refiner'" in run("inspect", trio["base"], "--keys", "refinr", code=1)


def test_diff(trio: dict[str, Path], tmp_path: Path) -> None:
    variant, base, table = trio["variant"], trio["base"], tmp_path / "table.csv"
    lines = run("diff", variant, base, "--csv", table, "-q").splitlines()
    assert [line.split()[0] for line in lines] == [
        "part",
        "embedders",
        "noise_refiner",
        "context_refiner",
        "layers",
        "final",
        "all",
    ]
    v, b = (torch.cat([ak.open(path)[key].double().flatten() for key in ak.open(base)]) for path in (variant, base))
    assert float(lines[-1].split()[2]) == pytest.approx(float((v - b).norm() / b.norm()), rel=0.01)
    assert len(table.read_text().splitlines()) == 1 + len(ak.open(base))
    rows = json.loads(run("diff", variant, base, "--json", "-q"))
    assert [row["tensor"] for row in rows] == list(ak.open(base))
    assert len(run("diff", variant, base, "--by", "tensor", "-q").splitlines()) == len(rows) + 2
    assert "layers     1" in run("diff", variant, base, "--by", "block", "--on", trio["bridge"], "--k", 20, "-q")
    assert run("diff", base, base, "-q") == f"no difference: all {len(rows)} tensors are equal\n"
    run("diff", variant, base, "--by", "layer", code=2)
    assert "no such file" in run("diff", variant, tmp_path / "gone.safetensors", code=1)


def test_multiplier(trio: dict[str, Path], tmp_path: Path) -> None:
    variant, base, bridge = trio["variant"], trio["base"], trio["bridge"]
    k = ak.needed_multiplier(ak.open(variant) - ak.open(base), on=ak.open(bridge).protect("refiner"))
    common = (variant, base, "--on", bridge, "--protect", "refiner", "-q")
    assert run("multiplier", *common) == f"{k!r}\n"
    found = json.loads(run("multiplier", *common, "--json"))
    assert found["value"] == k
    assert found["bases"]["reference"] is None
    assert {row["part"] for row in found["per_part"]} == {"embedders", "layers", "final"}
    other = json.loads(
        run("multiplier", *common, "--json", "--basis", "reference", "--target", 2, "--reference", variant)
    )
    assert other["value"] == pytest.approx(2)
    apart = json.loads(
        run("multiplier", *common, "--json", "--basis", "reference", "--reference", bridge, "--reference-base", variant)
    )
    assert apart["value"] > 10
    assert "the delta is exactly zero" in run("multiplier", base, base, "-q", code=1)
    assert "did you mean 'relative'" in run("multiplier", *common, "--basis", "relativ", code=1)


def test_check(trio: dict[str, Path]) -> None:
    model = {name: ak.mini.WEIGHTS / f"{name}.safetensors" for name in ak.mini.family()}
    output = run("check", model["base-variant"], model["turbo"], model["base"], "--bridge", model["deturbo"], "-q")
    assert output.splitlines()[0] == "nearest: base"
    assert "importable" in output.splitlines()
    assert "the bridge's refiner is" in output
    found = json.loads(run("check", model["base-refiner-trained"], model["base"], "--json", "-q", code=1))
    assert found["verdict"] == "not importable"
    assert found["candidates"][0]["candidate"] == "base"


def test_pictures_reports_and_tables(trio: dict[str, Path], tmp_path: Path) -> None:
    variant, base = trio["variant"], trio["base"]
    for command in ("diff", "multiplier", "check"):
        names = [tmp_path / f"{command}.{end}" for end in ("png", "html", "csv")]
        run(command, variant, base, "--plot", names[0], "--html", names[1], "--csv", names[2], "-q")
        assert names[0].read_bytes().startswith(b"\x89PNG")
        assert "variant - base" in names[1].read_text()
        assert ("The multiplier" in names[1].read_text()) == (command == "multiplier")
        assert len(names[2].read_text().splitlines()) == 1 + len(ak.open(base))
    before = sorted(os.listdir(tmp_path))
    assert "this is to be a .png file" in run("diff", variant, base, "--plot", tmp_path / "a.pdf", "-q", code=1)
    assert "folder does not exist" in run("diff", variant, base, "--html", tmp_path / "gone" / "a.html", code=1)
    assert sorted(os.listdir(tmp_path)) == before


def test_extract_lora_by_the_articles_words(trio: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "supplement.safetensors"
    asked = ["--base", trio["base"], "--variant", trio["variant"], "--rank-thresh", 0.9, "--exclude", "refiner"]
    text = run("extract-lora", *asked, "-o", out, "--csv", tmp_path / "r.csv", "--plot", tmp_path / "r.png")
    assert "extract_lora(variant - base, energy=0.9, rank_max=64, exclude='refiner')" in text
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert "edge_rank" in (tmp_path / "r.csv").read_text()
    lora = ak.open_lora(out)
    assert not any("refiner" in key for key in lora.targets)
    assert "rank" in run("lora", "inspect", out)
    assert json.loads(run("lora", "inspect", out, "--json"))["targets"] == len(lora.targets)
    run("lora", "convert", out, "-o", tmp_path / "kohya.safetensors", "--flavour", "kohya")
    assert set(ak.open_lora(tmp_path / "kohya.safetensors").targets) == set(lora.targets)
    about = json.loads(run("lora", "resize", out, "-o", tmp_path / "small.safetensors", "--rank", 2, "--json"))
    assert about["ranks"] == [2, 2]
    both = tmp_path / "both.safetensors"
    run("lora", "merge", "a - 0.5 * b", "--a", out, "--b", tmp_path / "small.safetensors", "-o", both)
    assert ak.open_lora(both).summary()["ranks"][1] > 2
    assert "20 tensors computed" in run(
        "merge",
        "base + 0.1 * supplement",
        "--base",
        trio["base"],
        "--supplement",
        out,
        "-o",
        tmp_path / "m.safetensors",
    )
    assert "a LoRA with a recipe inside" in run("recipe", out)


def test_extract_lora_refuses_before_it_computes(trio: dict[str, Path], tmp_path: Path) -> None:
    asked = ["extract-lora", "--base", trio["base"], "--variant", trio["variant"]]
    assert "nothing is given for 'base'" in run(
        "extract-lora", "--variant", trio["variant"], "-o", tmp_path / "x.safetensors", code=1
    )
    assert "did you mean 'refiner'" in run(*asked, "--exclude", "refinr", "-o", tmp_path / "x.safetensors", code=1)
    assert "energy=0.995 means" in run(*asked, "--rank-thresh", 99.5, "-o", tmp_path / "x.safetensors", code=1)
    assert "one of the inputs" in run(*asked, "-o", trio["base"], code=1)
    assert "does not exist" in run(*asked, "-o", tmp_path / "no" / "x.safetensors", code=1)
    assert "load in ComfyUI only" in run(
        *asked, "--full", "norm_q", "--flavour", "diffusers", "-o", tmp_path / "x.safetensors", code=1
    )
    assert "did you mean 'rank-thresh'" in run(*asked, "--rank-tresh", 0.9, "-o", tmp_path / "x.safetensors", code=1)
    before = trio["base"].read_bytes()
    assert "this is to be a .csv file" in run(*asked, "-o", tmp_path / "x.safetensors", "--csv", trio["base"], code=1)
    assert "this is to be a .csv file" in run("diff", trio["variant"], trio["base"], "--csv", trio["base"], code=1)
    assert trio["base"].read_bytes() == before
    assert "one of three dtypes" in run(*asked, "--dtype", "fp8_e4m3", "-o", tmp_path / "x.safetensors", code=1)
    assert "rank is larger than rank_max" in run(
        *asked, "--rank", 4, "--rank-max", 2, "-o", tmp_path / "x.safetensors", code=1
    )
    lora = ["extract-lora", "--variant", ak.mini.lora("base-lora"), "--base", ak.mini.load("base").path]
    assert "variant is a LoRA, which is a difference already" in run(*lora, "-o", tmp_path / "x.safetensors", code=1)
    assert "not a difference" in run(
        "extract-lora", "base", "--base", trio["base"], "-o", tmp_path / "x.safetensors", code=1
    )
    assert not list(tmp_path.iterdir())


def test_finetune_and_make_dataset(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red ball\n\na blue box by day\n")
    asked = [
        "--from",
        "mini:turbo",
        "--from",
        "mini:base",
        "--prompts",
        tmp_path / "prompts.txt",
        "--steps",
        2,
        "--cfg",
        1,
    ]
    about = json.loads(run("make-dataset", "-o", tmp_path / "drawn", *asked, "--json"))
    assert about["pictures"] == 4
    config = tmp_path / "run.toml"
    config.write_text(
        'start = "base"\nheld_out = 0\n[inputs]\nbase = "mini:base"\n[data.drawn]\nfolder = "drawn"\n'
        "[[stage]]\nmix = { drawn = 1 }\nsteps = 2\nlr = 1e-4\nresolution = 64\nbatch = 2\n"
    )
    assert "frozen tensors unchanged" in run("finetune", config, "-o", tmp_path / "run")
    assert (tmp_path / "run" / "1-stage 1.safetensors").exists()
    assert "name the run's folder" in run("finetune", config, code=2)
    assert "did you mean 'steps'" in run("finetune", _wrong(config), "-o", tmp_path / "run2", code=1)
    assert "cannot be read" in run(
        "make-dataset", "-o", tmp_path / "x", *asked[:4], "--prompts", tmp_path / "no.txt", code=1
    )


def _wrong(config: Path) -> Path:
    path = config.with_name("wrong.toml")
    path.write_text(config.read_text().replace("steps", "stepz"))
    return path


def test_a_plan_of_memory(tmp_path: Path) -> None:
    model = tmp_path / "small.safetensors"
    run("make-checkpoint", "-o", model, "--layers", 2, "--width", 96)
    text = run("finetune", "--plan", model, "--vram", 24)
    assert "adafactor, bf16, fused" in text
    assert len(json.loads(run("finetune", "--plan", model, "--vram", 24, "--json"))) == 12


def test_cache(trio: dict[str, Path]) -> None:
    run("diff", trio["variant"], trio["base"], "-q")
    found = json.loads(run("cache", "--json"))
    assert found["tables"]["entries"] == 1
    assert "measured deltas" in run("cache")
    assert "did you mean 'tables'" in run("cache", "--clear", "--kind", "table", code=1)
    assert json.loads(run("cache", "--clear", "--kind", "tables", "--json"))["freed"] == found["tables"]["bytes"]
    assert json.loads(run("cache", "--json"))["tables"]["entries"] == 0


def test_an_automatic_multiplier(trio: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    text = "bridge.protect('refiner') + k * (variant - base)"
    output = run("merge", text, *named(trio), "--k", "auto", "-o", out, "-q")
    k = ak.needed_multiplier(
        ak.open(trio["variant"]) - ak.open(trio["base"]), on=ak.open(trio["bridge"]).protect("refiner")
    )
    assert f"k: {k!r}" in output
    assert f"param('k', {k.value:g})" in run("recipe", out)
    by_hand = tmp_path / "by_hand.safetensors"
    run("merge", text, *named(trio), f"--k={k.value!r}", "-o", by_hand, "-q")
    assert by_hand.read_bytes() == out.read_bytes()
    assert "every byte the same" in run("verify", out, "--recompute", *named(trio))


def test_an_automatic_multiplier_never_goes_below_one_in_silence(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    members = {"bridge": "tb1", "variant": "turbo-variant", "base": "deturbo"}
    models = [given for name, member in members.items() for given in (f"--{name}", ak.mini.load(member).path)]
    output = run("merge", "bridge.protect('refiner') + k * (variant - base)", *models, "--k", "auto", "-o", out, "-q")
    assert "k: Multiplier 1 = subtract 1 x add 1" in output
    assert "so the basis says nothing: start at 1, or let pictures say" in output
    assert "param('k', 1) *" in run("recipe", out)


def test_an_automatic_multiplier_imports_nothing_that_cannot_be(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    member = {name: ak.mini.load(name).path for name in ("tb1", "base-refiner-trained", "base")}
    models = ["--bridge", member["tb1"], "--variant", member["base-refiner-trained"], "--base", member["base"]]
    what = ["merge", "bridge.protect('refiner') + k * (variant - base)", *models, "-o", out, "-q"]
    refused = run(*what, "--k", "auto", code=1)
    assert "no multiplier makes this come over" in refused
    assert "not importable: the variant's refiner moved by 27.7 %" in refused
    assert "--k=1, or any number, to add it all the same" in refused
    assert not out.exists()
    run(*what, "--k=1")
    # On its own base its refiner moves with it.
    run("merge", "base + k * (variant - base)", *models[2:], "--k", "auto", "-o", tmp_path / "own.safetensors", "-q")


def test_options_of_another_basis_are_told_in_words_of_the_command_line(tmp_path: Path) -> None:
    member = {name: str(ak.mini.load(name).path) for name in ("base-variant", "base")}
    told = run("multiplier", member["base-variant"], member["base"], "--cfg", 3, code=1)
    assert "cfg means nothing to the basis relative" in told
    assert "basis=" not in told


def test_a_multiplier_by_pictures(tmp_path: Path) -> None:
    member = {name: ak.mini.load(name).path for name in ("tb1", "base-variant", "base")}
    (tmp_path / "prompts.txt").write_text("a cyan ball on a beach\n\na cyan tree at night\n")
    seen = ["--prompts", tmp_path / "prompts.txt", "--count", 2, "--cfg", 3]
    asked = [member["base-variant"], member["base"], "--on", member["tb1"], "--protect", "refiner", *seen]
    text = run("multiplier", *asked, "--plot", tmp_path / "a.png", "--html", tmp_path / "a.html", "-q")
    assert "basis pictures: " in text
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "What k does to predictions" in (tmp_path / "a.html").read_text()
    found = json.loads(run("multiplier", *asked, "--json", "-q"))
    assert (found["basis"], found["target"]) == ("pictures", None)
    assert found["bases"]["pictures"] == found["value"]
    models = ["--bridge", member["tb1"], "--variant", member["base-variant"], "--base", member["base"]]
    what = ["merge", "bridge.protect('refiner') + k * (variant - base)", *models, "-o", tmp_path / "out.safetensors"]
    assert f"k: Multiplier {found['value']:.4g} = " in run(*what, "--k", "auto", *seen, "-q")
    assert "--prompts is for a multiplier by pictures" in run(*what, "--k=2", *seen[:2], code=1)
    (tmp_path / "out.safetensors").unlink()
    wrong = [*what[:-4], "--base", ak.mini.load("turbo").path, *what[-2:]]
    refused = run(*wrong, "--k", "auto", *seen, "-q", code=1)
    assert "by what pictures say this does not come over" in refused
    assert "--k=1, or any number, to add it all the same" in refused
    assert not (tmp_path / "out.safetensors").exists()
    lora = ["merge", "bridge + k * lora", "--bridge", member["tb1"], "--lora", ak.mini.lora("base-lora"), *what[-2:]]
    assert "--made-for" in run(*lora, "--k", "auto", *seen, code=1)
    told = CliRunner().invoke(app, [str(one) for one in (*lora, "--k", "auto", *seen, "--made-for", member["base"])])
    assert "basis pictures: " in told.output  # whether it comes over by two pictures or not
    two = ["bridge + k * (variant - base) + j * (variant - base)", *models, *what[-2:]]
    assert "--prompts is for one multiplier" in run("merge", *two, "--k", "auto", "--j", "auto", *seen, code=1)
    (tmp_path / "empty.txt").write_text("\n")
    assert "there are no prompts" in run(*what, "--k", "auto", "--prompts", tmp_path / "empty.txt", code=1)
    assert "the prompts cannot be read" in run(*what, "--k", "auto", "--prompts", tmp_path / "gone.txt", code=1)


def test_a_report_of_a_multiple_still_judges_the_variant(trio: dict[str, Path], tmp_path: Path) -> None:
    model = {name: ak.mini.load(name).path for name in ("base-variant", "base")}
    for k in (1, 171.1):
        html = tmp_path / f"{k}.html"
        run("diff", model["base-variant"], model["base"], f"--k={k}", "--html", html, "-q")
        assert "<b>importable</b>" in html.read_text()


def test_extract_lora_of_two_variants(trio: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    asked = ["--base", trio["base"], "--variant", trio["variant"], "--variant2", trio["bridge"], "--rank", 4, "-o", out]
    assert "common(variant - base, variant2 - base)" in run("extract-lora", *asked)
    either = run("extract-lora", *asked, "--union")
    assert "variant - base + (variant2 - base) - common(variant - base, variant2 - base)" in either
    assert "--union goes with --variant2" in run("extract-lora", *asked[:4], "--union", "-o", out, code=2)


def test_merge_then_recipe_then_merge_again(trio: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    report = run("merge", MAIN_JOB, *named(trio), "-o", out, "--dtype", "fp16", "--quiet")
    assert "56 unchanged tensors re-stored, bf16 to fp16" in report
    text = run("recipe", out)
    assert MAIN_JOB in text
    assert "written with dtype=fp16" in text
    (tmp_path / "r.json").write_text(run("recipe", out, "--json"))
    for number, source in enumerate((out, tmp_path / "r.json")):
        again = tmp_path / f"again{number}.safetensors"
        found = json.loads(run("merge", "--recipe", source, *named(trio), "-o", again, "--json"))
        assert found["recipe"] == MAIN_JOB
        assert again.read_bytes() == out.read_bytes()
    assert "every byte the same" in run("verify", out, "--recompute", *named(trio))
    assert json.loads(run("verify", out, "--json", *named(trio)))["ok"] is True


def test_numbers_for_names(trio: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    run("merge", "bridge + k * (variant - base)", *named(trio), "--k=2.5", "-o", out)
    assert "bridge + param('k', 2.5) * (variant - base)" in run("recipe", out)


def test_an_interrupt_that_an_import_swallowed_still_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alkahest.cli import shared

    def swallowing(*arguments: object, **options: object) -> object:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        return made_up(layers=1, width=32)

    made_up = ak.made_up
    monkeypatch.setattr(shared.alkahest, "made_up", swallowing)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.default_int_handler)
    assert "interrupted" in run("make-checkpoint", "-o", tmp_path / "x.safetensors", code=130)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lerp(bridge, variant, k)", "--k", "auto"], "'k' must multiply one delta that is added to a model"),
        (["bridge + k * (variant - base)"], "nothing is given for 'k'"),
        (["bridge + (variant - base)", "--varient", "x"], "did you mean 'variant'"),
        (["bridge + (variant - base)", "--dtyp", "bf16"], "did you mean 'dtype'"),
        (["bridge + (variant - base)", "--dtype", "bf17"], "did you mean 'bf16'"),
        (["variant - base", "--bridge", "x"], "neither an option nor a name"),
        (["__import__('os')"], "unknown function"),
        (["bridge + base"], "twice a model"),
        ([], "either an expression or --recipe"),
    ],
)
def test_merge_refuses(arguments: list[str], message: str, trio: dict[str, Path], tmp_path: Path) -> None:
    wanted = [
        item for name, path in trio.items() if name in " ".join(arguments[:1]) for item in (f"--{name}", str(path))
    ]
    output = run("merge", *arguments, *wanted, "-o", tmp_path / "out.safetensors", code=1)
    assert message in output
    assert "Traceback" not in output
    assert os.listdir(tmp_path) == []


def test_wrong_usage_is_code_2(trio: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    run("merge", MAIN_JOB, code=2)
    run("merge", MAIN_JOB, "stray", "-o", out, code=2)
    run("merge", MAIN_JOB, "-o", out, "--bridge", code=2)
    run("inspect", trio["base"], "--nonsense", code=2)
    run("nonsense", code=2)


def test_convert(trio: dict[str, Path], tmp_path: Path) -> None:
    run("convert", trio["base"], "-o", tmp_path / "out", "--layout", "diffusers", "--max-shard-size", "600KB")
    run("convert", tmp_path / "out", "-o", tmp_path / "back.safetensors")
    base, back = ak.open(trio["base"]), ak.open(tmp_path / "back.safetensors")
    assert all((base[key] == back[key]).all() for key in base)
    run("convert", trio["base"], "-o", trio["base"], code=1)


def test_make_checkpoint(tmp_path: Path) -> None:
    small = ["--layers", 2, "--width", 96, "-q"]
    run("make-checkpoint", "-o", tmp_path / "a.safetensors", *small)
    run("make-checkpoint", "-o", tmp_path / "b.safetensors", *small, "--threads", 3)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    run(
        "make-checkpoint",
        "-o",
        tmp_path / "v",
        *small,
        "--delta",
        0.02,
        "--only",
        "layers",
        "--layout",
        "diffusers",
        "--storage",
        "comfy_quant",
    )
    assert ak.open(tmp_path / "v").summary()["storage"] == {"bf16": 59, "comfy_quant": 42}
    assert "impossible size" in run("make-checkpoint", "-o", tmp_path / "c.safetensors", "--layers", 10**9, code=1)


def test_a_file_that_is_not_sound_is_code_1(tmp_path: Path) -> None:
    state = tiny.native(tiny.state(2))
    state["layers.0.ffn_norm1.weight"] = state["layers.0.ffn_norm1.weight"] / 0
    path = tiny.write(tmp_path / "x.safetensors", state)
    assert "NOT SOUND" in run("verify", path, code=1)
    assert "holds NaN or infinity" in run("convert", path, "-o", tmp_path / "y.safetensors", code=1)
    assert "non-finite values" in run("convert", path, "-o", tmp_path / "y.safetensors", "--allow-nonfinite")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint large enough that a merge of it can be interrupted."""
    path = tmp_path_factory.mktemp("slow") / "slow.safetensors"
    ak.made_up(layers=40, width=384).save(path)
    return path


def _interruptible() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=str
)
def test_signals_leave_no_output_and_harm_nothing(
    number: signal.Signals, code: int, slow: Path, tmp_path: Path
) -> None:
    out, before = tmp_path / "out.safetensors", slow.read_bytes()
    out.write_bytes(b"an older output")
    command = [
        sys.executable,
        "-m",
        "alkahest",
        "merge",
        "a + ties([b - a], density=0.5)",
        "--a",
        slow,
        "--b",
        slow.with_name("b.safetensors"),
        "-o",
        out,
        "--threads",
        "1",
    ]
    ak.made_up(layers=40, width=384, delta=0.1).save(slow.with_name("b.safetensors"))
    # A shell starts background jobs with SIGINT ignored, and children inherit that.
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=_interruptible)
    deadline = time.monotonic() + 60
    while len(os.listdir(tmp_path)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert out.read_bytes() == b"an older output"
    assert slow.read_bytes() == before
    left = [name for name in os.listdir(tmp_path) if name != "out.safetensors"]
    assert len(left) == (1 if number == signal.SIGKILL else 0)
    run("make-checkpoint", "-o", tmp_path / "next.safetensors", "--layers", 1, "--width", 32)
    assert sorted(os.listdir(tmp_path)) == ["next.safetensors", "out.safetensors"]

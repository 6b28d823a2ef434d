from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import alkahest as ak
from alkahest.cli import app
from alkahest.engine.events import Event, result_of
from alkahest.errors import AlkahestError, FileFormatError, UnknownNameError
from alkahest.experiment.config import Case, experiment_named, experiments, read_experiment
from alkahest.experiment.measure import prompts_of, shares_as_asked, stream_experiment
from alkahest.experiment.record import (
    Checked,
    checked_of,
    digest,
    evaluate_checks,
    index,
    measured_digest,
    readme,
    tables_of,
    verdict,
    verdicts,
)
from alkahest.experiment.reproduce import reproduction, run_experiment, write_index
from alkahest.mini.scenes import held_out_prompts

ROOT = Path(__file__).parents[2] / "experiments"
NUMBERED = sorted(path.parent for path in ROOT.glob("[0-9][0-9]-*/experiment.toml"))
SMALL = """
title = "Small"
claim = "A | claim."
method = "A method."
prompts = 4
sampling = { steps = 2, cfg = 1.0 }
[inputs]
base = "mini:base"
base8 = { of = "mini:base", dtype = "fp8_e4m3fn" }
variant = "mini:base-variant"
extra = { extract = "variant - base", rank = 4 }
[[delta]]
name = "learned"
delta = "variant - base"
on = "base"
multipliers = true
ks = [1, 20]
[[case]]
name = "cyan"
weights = "base + k * (variant - base)"
over = { k = [0, 1.5], shift = [3] }
ask = { colour = "cyan" }
[[case]]
name = "saved"
weights = "base8 + 0.5 * extra"
dtype = "bf16"
unsaid = ["light"]
only = { subject = ["man", "woman"] }
[[sheet]]
title = "Look, at it!"
prompts = ["a cyan ball", "a red house"]
models = { Base = "base", "2x" = "base + 2 * (variant - base)" }
[[check]]
says = "the layers differ"
table = "deltas"
column = "relative"
where = { case = "learned", part = "layers" }
at_least = 0.01
[[check]]
says = "all else"
column = "right"
where = { case = "cyan", k = 1.5 }
minus = { case = "cyan", k = 0 }
at_most = -1000
[[figure]]
title = "Over k"
columns = ["colour", "subject"]
y = "pictures (%)"
where = { case = "cyan" }
log = true
[[figure]]
title = "By part"
kind = "bars"
table = "deltas"
x = "part"
columns = ["relative"]
y = "relative, unitless"
"""


def written(folder: Path, text: str = SMALL) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.toml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small experiment, run by the command."""
    root = tmp_path_factory.mktemp("experiments")
    written(root / "01-small")
    result = CliRunner().invoke(app, ["experiment", "run", "1", "--root", str(root), "--quiet", "--threads", "1"])
    assert result.exit_code == 0, result.output
    assert "partly" in result.output
    return root


def test_its_numbers_are_those_of_the_parts(ran: Path) -> None:
    tables = tables_of(read_experiment(ran / "01-small"))
    base, variant = ak.mini.load("base"), ak.mini.load("base-variant")
    measured = ak.rolled_up(ak.delta_table(variant - base, on=base), "part").set_index("part")
    deltas = tables["deltas"].set_index("part")
    assert deltas.relative["layers"] == pytest.approx(measured.relative["layers"], abs=1e-4)
    assert deltas.relative["refiner"] == 0
    whole = sum(float((variant[key].double() - base[key].double()).norm() ** 2) for key in base)
    size = sum(float(base[key].double().norm() ** 2) for key in base)
    assert deltas.relative["all"] == pytest.approx(np.sqrt(whole / size), abs=1e-4)
    k = tables["multipliers"].set_index("basis").k
    assert k["relative"] == pytest.approx(ak.needed_multiplier(variant - base, on=base).bases["relative"], rel=1e-3)
    assert tables["rounding"].k.tolist() == [1, 20]

    cyan = tables["pictures"].query("case == 'cyan'")
    assert list(zip(cyan.k, cyan["shift"], strict=True)) == [(0, 3), (1.5, 3)]
    asked = prompts_of(Case("cyan", "base", ask={"colour": "cyan"}), 4)
    images = ak.sample(
        ak.pipeline(base + 1.5 * (variant - base)),
        [s.caption() for s in asked],
        steps=2,
        cfg=1.0,
        shift=3,
        seed=1000,
        batch=60,
    ).images
    from alkahest.mini.judge import attributes

    read = attributes(images)
    assert cyan.colour.iloc[1] == 100 * (read.colour == "cyan").mean()
    assert cyan.subject.iloc[1] == 100 * (read.subject == [s.subject for s in asked]).mean()
    saved = tables["pictures"].query("case == 'saved'").iloc[0]
    assert pd.isna(saved["light"])
    assert saved["unsaid day"] + saved["unsaid sunset"] + saved["unsaid night"] == 100


def test_what_is_recorded_says_what_it_stands_on(ran: Path) -> None:
    folder = ran / "01-small"
    about = json.loads((folder / "manifest.json").read_text())
    assert about["verdict"] == "partly"
    assert about["inputs"]["base"]["blake3"] == about["inputs"]["base8"]["blake3"]
    assert set(about["results"]) == {
        "1-over-k.svg",
        "2-by-part.svg",
        "checks.csv",
        "deltas.csv",
        "look-at-it.png",
        "multipliers.csv",
        "pictures.csv",
        "rounding.csv",
    }
    for name, value in about["results"].items():
        assert digest(folder / "results" / name) == value
    text = (folder / "README.md").read_text()
    assert text == readme(read_experiment(folder))
    assert "**Verdict on the miniatures: partly.**" in text
    assert "![1 over k](results/1-over-k.svg)" in text
    assert "![look at it](results/look-at-it.png)" in text
    assert "| all else |" in text
    assert "**no**" in text
    assert "A \\| claim" in (ran / "README.md").read_text()
    page = reproduction(experiments(ran))
    assert page.count("<figure>") == 3
    assert "over k: colour from" in page


def test_the_same_run_gives_the_same_files(ran: Path, tmp_path: Path) -> None:
    again = written(tmp_path / "01-small")
    result_of(run_experiment(read_experiment(again)))
    for path in sorted((ran / "01-small" / "results").iterdir()):
        assert (again / "results" / path.name).read_bytes() == path.read_bytes(), path.name


def test_another_family_is_drawn_with_its_own_parts(ran: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "01-small")
    family = tmp_path / "family"
    shutil.copytree(ak.mini.components().parent, family)
    result_of(run_experiment(read_experiment(folder), family))
    for name, table in tables_of(read_experiment(ran / "01-small")).items():
        pd.testing.assert_frame_equal(tables_of(read_experiment(folder))[name], table)
    (family / "base.safetensors").write_bytes((family / "turbo.safetensors").read_bytes())
    result_of(run_experiment(read_experiment(folder), family))
    assert not tables_of(read_experiment(folder))["deltas"].equals(
        tables_of(read_experiment(ran / "01-small"))["deltas"]
    )


def test_retraining_grows_the_family_first(ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "01-small")
    grown: list[Path] = []

    def build(folder: Path) -> Any:
        grown.append(folder)
        shutil.copytree(ak.mini.components().parent, folder)
        yield Event(1, 1, "base")

    monkeypatch.setattr("alkahest.experiment.growing.build.build", build)
    result = CliRunner().invoke(
        app, ["experiment", "run", "1", "--root", str(tmp_path), "--retrain", str(tmp_path / "all"), "--quiet"]
    )
    assert result.exit_code == 0, result.output
    assert grown == [tmp_path / "all" / "family"]
    for name, table in tables_of(read_experiment(ran / "01-small")).items():
        pd.testing.assert_frame_equal(tables_of(read_experiment(tmp_path / "01-small"))[name], table)


def test_words_and_bounds_change_without_measuring(ran: Path, tmp_path: Path) -> None:
    shutil.copytree(ran / "01-small", tmp_path / "01-small")
    folder = written(
        tmp_path / "01-small", SMALL.replace("at_most = -1000", "at_most = 1000").replace("A method.", "Another.")
    )
    before = json.loads((folder / "manifest.json").read_text())
    result = CliRunner().invoke(app, ["experiment", "run", "--rewrite", "--root", str(tmp_path)])
    assert "reproduced" in result.output
    after = json.loads((folder / "manifest.json").read_text())
    assert {**after, "verdict": "", "results": {}} == {**before, "verdict": "", "results": {}}
    assert "**Method.** Another." in (folder / "README.md").read_text()
    for name in ("pictures.csv", "look-at-it.png", "1-over-k.svg"):
        assert after["results"][name] == before["results"][name]
    written(folder, SMALL.replace("k = [0, 1.5]", "k = [0, 2]"))
    refused = CliRunner().invoke(app, ["experiment", "run", "--rewrite", "--root", str(tmp_path)])
    assert refused.exit_code == 1
    assert "measured by another experiment.toml" in refused.output


def test_a_figure_that_fails_leaves_what_was_recorded(ran: Path, tmp_path: Path) -> None:
    shutil.copytree(ran / "01-small", tmp_path / "01-small")
    folder = written(tmp_path / "01-small", SMALL.replace('columns = ["relative"]', 'columns = ["relatve"]'))
    before = {path.name: path.read_bytes() for path in (folder / "results").iterdir()}
    result = CliRunner().invoke(app, ["experiment", "run", "--rewrite", "--root", str(tmp_path)])
    assert result.exit_code == 1
    assert "figure 'By part'" in result.output
    assert {path.name: path.read_bytes() for path in (folder / "results").iterdir()} == before
    both = CliRunner().invoke(app, ["experiment", "run", "--rewrite", "--runs", "x", "--root", str(tmp_path)])
    assert both.exit_code == 1
    assert "give one of them" in both.output


def test_a_readme_without_its_marker_is_not_cut(ran: Path, tmp_path: Path) -> None:
    shutil.copytree(ran, tmp_path / "experiments")
    readme_file = tmp_path / "experiments" / "README.md"
    text = readme_file.read_text().replace("<!-- end -->", "mine")
    readme_file.write_text(text)
    with pytest.raises(FileFormatError, match="has no end"):
        write_index(tmp_path / "experiments")
    assert readme_file.read_text() == text


def test_a_run_that_fails_leaves_what_was_recorded(ran: Path, tmp_path: Path) -> None:
    folder = tmp_path / "01-small"
    shutil.copytree(ran / "01-small", folder)
    before = {path.name: path.read_bytes() for path in (folder / "results").iterdir()}
    (folder / "experiment.toml").write_text(SMALL.replace('column = "right"', 'column = "rihgt"'))
    with pytest.raises(FileFormatError, match="no such column"):
        result_of(run_experiment(read_experiment(folder)))
    assert {path.name: path.read_bytes() for path in (folder / "results").iterdir()} == before


def test_training_runs_are_recorded_or_grown(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(
        'start = "base"\nseed = 1\nsave_every = 2\nmeasure_every = 2\nheld_out = 2\nprompts = ["a ball"]\nsampling '
        '= { steps = 1, cfg = 1 }\n[inputs]\nbase = "mini:base"\n'
        '[data.scenes]\nscenes = { count = 20, seed = 5 }\n[[stage]]\nname = "one"\nmix = { scenes = 1.0 }\n'
        "steps = 2\nbatch = 2\nresolution = 64\nlr = 1e-3\n"
    )
    text = (
        'title = "t"\nclaim = "c"\nmethod = "m"\nprompts = 2\nsampling = { steps = 1, cfg = 1.0 }\n[[run]]\nname = '
        '"tiny"\nconfig = "../tiny.toml"\n[[case]]\nname = "drawn"\nweights = "stage"\nrun = '
        '"tiny"\n[[check]]\nsays = "s"\ncolumn = "right"\nwhere = { case = "drawn", stage = "1-one" }\nat_least = '
        "0\n"
    )
    folder = written(tmp_path / "02-run", text)
    with pytest.raises(FileFormatError, match=r"its training runs were not recorded[\s\S]*--runs"):
        result_of(run_experiment(read_experiment(folder)))
    result_of(run_experiment(read_experiment(folder), runs=tmp_path / "runs"))
    grown = tables_of(read_experiment(folder))
    assert grown["history"].step.tolist() == [0, 2]
    assert grown["pictures"].stage.tolist() == ["1-one"]
    assert (folder / "results" / "tiny-over-its-steps.png").exists()
    shutil.rmtree(tmp_path / "runs")
    result_of(run_experiment(read_experiment(folder)))  # the rows that were recorded
    for name, table in tables_of(read_experiment(folder)).items():
        pd.testing.assert_frame_equal(table, grown[name])
    (tmp_path / "tiny.toml").write_text((tmp_path / "tiny.toml").read_text().replace("steps = 2", "steps = 4"))
    with pytest.raises(FileFormatError, match="another configuration"):
        result_of(run_experiment(read_experiment(folder)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("method =", "methode ="), "did you mean 'method'"),
        (('column = "right"', 'colum = "right"'), "did you mean 'column'"),
        (("at_most = -1000", ""), "needs one bound"),
        (('kind = "bars"', 'kind = "pie"'), "lines or bars"),
        (("k = [0, 1.5]", "k = 1"), "needs a list of values"),
        (('name = "saved"', 'name = "cyan"'), "two cases have one name"),
        (('mini:base-variant"', 'mini:base-varaint"'), "base-variant"),
        (("base + k *", "bsae + k *"), "base"),
        (('where = { case = "cyan" }\nlog', 'where = { case = "cyna" }\nlog'), "no such column, or no rows"),
        (('{ extract = "variant - base", rank = 4 }', "{ rank = 4 }"), "has of, extract, signs"),
        (("title", "holds = 'sure'\ntitle"), "no such verdict"),
        (('ask = { colour = "cyan" }', 'ask = { color = "cyan" }'), "did you mean 'colour'"),
        (('ask = { colour = "cyan" }', 'ask = { colour = "cian" }'), "did you mean 'cyan'"),
        (("steps = 2, cfg", "step = 2, cfg"), "did you mean 'steps'"),
        (("steps = 2, cfg", "steps = 'two', cfg"), r"sampling: this value is of the wrong kind[\s\S]*key: steps"),
        (("steps = 2, cfg", "steps = 0, cfg"), "steps must be a whole number from 1"),
        (("at_most = -1000", "at_most = nan"), "at_most is no finite number"),
        (("at_most = -1000", "at_most = 'few'"), r"wrong kind[\s\S]*expected: a number"),
        (("title", "remark = [1]\ntitle"), r"wrong kind[\s\S]*expected: text"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    folder = written(tmp_path / "01-x", SMALL.replace(*change, 1))
    with pytest.raises(AlkahestError, match=message):
        result_of(run_experiment(read_experiment(folder)))


def test_checks_and_verdicts() -> None:
    from alkahest.experiment.config import Check, Experiment

    tables = {"pictures": pd.DataFrame({"case": ["a", "a", "b"], "k": [1.0, 171.1, 1.0], "right": [90.0, 60.0, 40.0]})}

    def found(**how: Any) -> Checked:
        (one,) = evaluate_checks(Experiment("t", "c", "m", checks=(Check("s", "right", **how),)), tables)
        return one

    assert found(where={"case": "a", "k": 171.1}, at_least=60.0).holds
    assert found(where={"case": "a"}, of="max", at_most=60.0) == Checked("s", 90.0, "at most 60", False)
    assert found(where={"case": ["a", "b"], "k": 1}, of="min", at_least=0.0).found == 40
    assert found(where={"case": "b"}, minus={"case": "a", "k": 1}, at_most=0.0).found == -50
    with pytest.raises(FileFormatError, match="needs one row"):
        found(where={"case": "a"}, at_least=0.0)
    with pytest.raises(FileFormatError, match="no row matches"):
        found(where={"case": "z"}, of="max", at_least=0.0)
    yes, no = Checked("s", 1, "", True), Checked("s", 1, "", False)
    one = Experiment("t", "c", "m")
    assert [verdict(one, checks) for checks in ([yes, yes], [yes, no], [no])] == [
        "reproduced",
        "partly",
        "not reproduced",
    ]
    assert verdict(Experiment("t", "c", "m", holds="needs the real weights"), [no]) == "needs the real weights"


def test_the_judge_is_counted_as_said() -> None:
    asked = held_out_prompts(3)
    read = pd.DataFrame(
        [
            {
                **{name: getattr(scene, name) for name in ("subject", "colour", "place", "light", "side", "quality")},
                "style": "anime",
            }
            for scene in asked
        ]
    )
    read.loc[0, "subject"] = "nothing"
    row = shares_as_asked(asked, read, ("light",))
    assert row["subject"] == pytest.approx(200 / 3)
    assert row["right"] == pytest.approx((200 / 3 + 400) / 5)
    assert (row["anime"], row["photo"]) == (100, 0)
    assert "light" not in row


def test_an_experiment_is_found_by_name_or_number(ran: Path) -> None:
    for name in ("01-small", "1", "01", str(ran / "01-small")):
        assert experiment_named(name, ran).title == "Small"
    with pytest.raises(UnknownNameError, match="01-small"):
        experiment_named("01-smal", ran)
    listed = CliRunner().invoke(app, ["experiment", "list", "--root", str(ran)])
    assert "01-small" in listed.output
    assert "partly" in listed.output
    report = CliRunner().invoke(app, ["experiment", "report", "--root", str(ran), "-o", str(ran / "all.html")])
    assert report.exit_code == 0
    assert "Small" in (ran / "all.html").read_text()


@pytest.mark.parametrize("folder", NUMBERED, ids=lambda folder: folder.name)
def test_the_committed_ones_are_whole(folder: Path) -> None:
    one = read_experiment(folder)
    about = json.loads((folder / "manifest.json").read_text())
    assert about["measured"] == measured_digest(one), f"alkahest experiment run {one.name}"
    assert about["results"] == {path.name: digest(path) for path in (folder / "results").iterdir()}
    assert (folder / "README.md").read_text() == readme(one)
    assert [check.holds for check in evaluate_checks(one, tables_of(one))] == [check.holds for check in checked_of(one)]
    assert about["verdict"] == verdict(one, checked_of(one))
    assert one.figures


def test_the_index_is_fresh(tmp_path: Path) -> None:
    front = (ROOT.parent / "README.md").read_text()
    assert index(experiments(ROOT)) in (ROOT / "README.md").read_text()
    assert verdicts(experiments(ROOT), "experiments") in front
    (tmp_path / "README.md").write_text(front)
    shutil.copytree(ROOT, tmp_path / "experiments")
    write_index(tmp_path / "experiments")
    assert (tmp_path / "README.md").read_text() == front
    assert (tmp_path / "experiments" / "README.md").read_text() == (ROOT / "README.md").read_text()


def test_a_stopped_run_writes_nothing(tmp_path: Path) -> None:
    folder = written(tmp_path / "01-small")
    events = stream_experiment(read_experiment(folder))
    next(events)
    events.close()
    assert [path.name for path in folder.iterdir()] == ["experiment.toml"]

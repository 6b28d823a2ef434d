"""mergekit's YAML against the numbers of mergekit 0.1.5, which `mergekit/record.py` recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import alkahest as ak
from alkahest.cli import app
from alkahest.errors import RecipeError
from alkahest.recipes.inputs import build
from alkahest.recipes.mergekit.read import MergekitRecipe, read_mergekit

HERE = Path(__file__).parent / "mergekit"
CASES = sorted(path.stem for path in HERE.glob("*.yml"))
DRAWN = ("dare_linear", "della")  # random numbers, which are others
# A fused tensor is three of ours, so what is trimmed, turned or weighed by tensor differs there.
OF_TENSORS = ("linear", "linear-not-normalised", "task_arithmetic", "task_arithmetic-normalised", "passthrough")
SMALL = {"dim": 32, "n_heads": 1, "n_kv_heads": 1, "n_layers": 3, "n_refiner_layers": 1}


@pytest.fixture(scope="module")
def numbers() -> dict[str, torch.Tensor]:
    return load_file(HERE / "numbers.safetensors")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, numbers: dict[str, torch.Tensor]) -> Path:
    """A folder with the three models that mergekit had, whole."""
    folder = tmp_path_factory.mktemp("mergekit")
    whole = tiny.native(tiny.model(seed=1, **SMALL).state_dict())
    for name in ("base", "a", "b"):
        own = {key.removeprefix(f"{name}/"): value for key, value in numbers.items() if key.startswith(f"{name}/")}
        assert own.keys() <= whole.keys()
        save_file(
            {key: own.get(key, value).contiguous() for key, value in whole.items()}, folder / f"{name}.safetensors"
        )
    return folder


def merged(case: str, models: Path, folder: Path) -> dict[str, torch.Tensor]:
    config = models / f"{case}.yml"
    config.write_text((HERE / f"{case}.yml").read_text())
    recipe = ak.read_recipe(config)[1]
    assert isinstance(recipe, MergekitRecipe)
    build(recipe, recipe.locate()).save(folder / "merged.safetensors", layout="native", **recipe.output)
    return load_file(folder / "merged.safetensors")


@pytest.mark.parametrize("case", [case for case in CASES if case not in DRAWN])
def test_the_numbers_are_mergekits(case: str, models: Path, numbers: dict[str, torch.Tensor], tmp_path: Path) -> None:
    ours = merged(case, models, tmp_path)
    theirs = {key.removeprefix(f"{case}/"): value for key, value in numbers.items() if key.startswith(f"{case}/")}
    assert len(theirs) == 12
    for key, expected in theirs.items():
        if "qkv" in key and case not in OF_TENSORS:
            continue
        base, a, b = (numbers[f"{name}/{key}"] for name in ("base", "a", "b"))
        if case == "model_stock" and ((a - base) * (b - base)).sum() < 0:  # as its note says
            assert torch.equal(ours[key], base)
            continue
        # nuslerp: what points nearly the same way is mixed linearly here, which is 1e-4 of it at most.
        tolerance = 2e-4 if case == "nuslerp" else 1e-5 if case == "karcher" else 2e-6
        torch.testing.assert_close(ours[key].float(), expected.float(), rtol=1e-4 + 10 * tolerance, atol=tolerance)
        if case not in ("slerp",) and key.endswith("out.weight"):
            assert not torch.allclose(expected.float(), base, atol=1e-3), "the case would pass if nothing were merged"


@pytest.mark.parametrize("case", DRAWN)
def test_what_is_drawn_is_the_same_on_average(
    case: str, models: Path, numbers: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    ours, key = merged(case, models, tmp_path), "context_refiner.0.feed_forward.w1.weight"
    base, theirs = numbers[f"base/{key}"], numbers[f"{case}/{key}"]
    kept = [float(((one - base).abs() > 1e-7).float().mean()) for one in (ours[key], theirs)]
    assert abs(kept[0] - kept[1]) < 0.04
    lengths = [float((one - base).abs().sum()) for one in (ours[key], theirs)]
    assert abs(lengths[0] / lengths[1] - 1) < 0.1


@pytest.mark.parametrize(
    ("case", "text"),
    [
        (
            "linear",
            "weighted_sum([base, a, b], [1, [0.2, 1.4], {'*': 0, '*layers.1.*': 2, '*attention*': 0.5}], normalise=1)",
        ),
        ("slerp", "slerp(base, a, t={'*': [0.1, 0.9], '*refiner*': 0.2, '*norm*': [0, 0.5, 0.3]})"),
        ("ties", "base + ties([a - base, b - base], density=[0.5, [0.25, 0.75]], weights=[0.7, 0.4], normalise=1)"),
        ("nuslerp-rows", "base + nuslerp(a - base, b - base, t=[0, 0.8], rows=1)"),
        ("sce", "base + sce([a - base, b - base], top=0.5, normalise=1)"),
    ],
)
def test_the_text_says_it(case: str, text: str, models: Path) -> None:
    assert read_mergekit((HERE / f"{case}.yml").read_text(), models / "x.yml").text == text


CONFIG = """
merge_method: ties
base_model: base.safetensors
models:
  - {model: a.safetensors, parameters: {weight: 0.5}}
"""


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("ties", "tiles"), "did you mean 'ties'"),
        (("ties", "multislerp"), "no merge method"),
        (("models:", "slices: []\nmodels:"), "layers of models together"),
        (("models:", "modles: 1\nmodels:"), "did you mean 'models'"),
        (("models:", "base_model: x\nmodels:"), "there twice"),
        (("weight: 0.5", "wieght: 0.5"), "did you mean 'weight'"),
        (("weight: 0.5", "lambda: 0.5, weight: 1"), "for a model"),
        (("{weight: 0.5}", "{}"), "weight is missing"),
        (("weight: 0.5", "weight: {filter: attention, value: 1}"), "no value where no filter"),
        (("weight: 0.5", "weight: []"), "empty list"),
        (("weight: 0.5", "weight: yes"), "must be a number"),
        (("weight: 0.5", "weight: .nan"), "must be a number"),
        (("weight: 0.5", "weight: [0, x]"), "must be a number"),
        (("weight: 0.5", "weight: [{filter: self_attn, value: 1}, {value: 0}]"), "selects no tensor"),
        (("weight: 0.5", "weight: [{filtre: mlp, value: 1}, {value: 0}]"), "filter and value only"),
        (("base_model: base.safetensors", ""), "needs a base_model"),
        (("ties", "dare_ties\nparameters: {density: 5}"), "at most 1"),
        (("base_model", "parameters: {rescale: true}\nbase_model"), "L1 norm"),
        (("base_model", "parameters: {normalize: 1}\nbase_model"), "true or false"),
        (("base_model", "dtype: int8\nbase_model"), "no file is written"),
        (("a.safetensors", "a.safetensors+lora.safetensors"), "alkahest merge"),
        (("a.safetensors, ", "[1, 2], "), "no path"),
        (("\nmerge", "\n- merge"), "cannot be read"),
        (("base_model", "---\nbase_model"), "2 documents"),
        (("ties", "!!python/object/apply:os.system [ls]"), "cannot be read"),
        (("weight: 0.5", "weight: " + "[" * 3000), "cannot be read"),
    ],
)
def test_what_alkahest_cannot_do_is_told(change: tuple[str, str], match: str, tmp_path: Path) -> None:
    assert change[0] in CONFIG
    with pytest.raises(RecipeError, match=match):
        read_mergekit(CONFIG.replace(*change, 1), tmp_path / "x.yml")


def test_a_bomb_of_aliases_is_refused(tmp_path: Path) -> None:
    lines = ["x0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(RecipeError, match="too large"):
        read_mergekit("merge_method: ties\n" + "\n".join(lines), tmp_path / "x.yml")


def test_what_differs_is_noted(tmp_path: Path) -> None:
    config = (
        CONFIG.replace("ties", "dare_ties") + "parameters: {density: 0.5, int8_mask: true}\ntokenizer_source: base\n"
    )
    notes = " | ".join(read_mergekit(config + "dtype: bfloat16\n", tmp_path / "x.yml").notes)
    for said in ("other random numbers", "int8_mask", "tokenizer_source", "calculates in bfloat16"):
        assert said in notes
    assert not read_mergekit(CONFIG, tmp_path / "x.yml").notes


@pytest.mark.parametrize(
    ("method", "parameters", "said"),
    [
        ("task_arithmetic", "{density: 0.5}", "density is not used"),
        ("breadcrumbs", "{density: 0.96875, gamma: 0.25}", "outliers go up to 0.03125"),
    ],
)
def test_what_mergekit_passes_over_is_noted(method: str, parameters: str, said: str, tmp_path: Path) -> None:
    config = CONFIG.replace("ties", method) + f"parameters: {parameters}\n"
    assert said in " | ".join(read_mergekit(config, tmp_path / "x.yml").notes)


def test_nuslerp_notes_what_it_does_not_use(tmp_path: Path) -> None:
    config = (HERE / "nuslerp-rows.yml").read_text().replace("nuslerp_flatten: false", "nuslerp_row_wise: true")
    config = config.replace("models:", "models:\n  - {model: base.safetensors, parameters: {weight: 1}}")
    notes = " | ".join(read_mergekit(config, tmp_path / "x.yml").notes)
    assert "nuslerp_row_wise is not used" in notes
    assert "weight of the base is not used" in notes


def test_one_model_with_a_gradient_of_density(models: Path) -> None:
    config = CONFIG.replace("weight: 0.5", "weight: 0.5, density: [0.25, 0.75]")
    recipe = read_mergekit(config, models / "x.yml")
    assert recipe.text == "base + ties([a - base], density=[[0.25, 0.75]], weights=[0.5], normalise=1)"
    assert "density=[[0.25, 0.75]]" in build(recipe, recipe.locate()).text()


def test_names_of_files_become_names_of_a_recipe(tmp_path: Path) -> None:
    config = CONFIG.replace("a.safetensors", "deep/ties.safetensors").replace("base.saf", "class/1.base v2.saf")
    recipe = read_mergekit(config, tmp_path / "x.yml")
    assert (
        recipe.text == "model_1_base_v2 + ties([model_ties - model_1_base_v2], density=1, weights=[0.5], normalise=1)"
    )
    assert recipe.files == {"model_ties": "deep/ties.safetensors", "model_1_base_v2": "class/1.base v2.safetensors"}


def test_the_command_line_tells_and_merges(models: Path, tmp_path: Path) -> None:
    config = models / "sce.yml"
    config.write_text((HERE / "sce.yml").read_text())
    told = CliRunner().invoke(app, ["recipe", str(config)])
    assert told.exit_code == 0
    for said in ("sce([a - base, b - base]", "#   a: a.safetensors", "#   note: weights are shares"):
        assert said in told.stdout
    output = tmp_path / "merged.safetensors"
    done = CliRunner().invoke(app, ["merge", "--recipe", str(config), "-o", str(output), "--quiet"])
    assert done.exit_code == 0, done.stderr
    assert "note: weights are shares" in done.stderr
    assert ak.read_recipe(output)[1].text.startswith("base + sce(")


def test_two_files_of_one_name_are_not_chosen_between(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = models / "passthrough.yml"
    config.write_text((HERE / "passthrough.yml").read_text())
    recipe = ak.read_recipe(config)[1]
    monkeypatch.chdir(tmp_path)
    assert isinstance(recipe, MergekitRecipe)
    assert recipe.locate() == {"b": str(models / "b.safetensors")}
    (tmp_path / "b.safetensors").write_bytes((models / "a.safetensors").read_bytes())
    with pytest.raises(RecipeError, match="--b PATH"):
        recipe.locate()
    output = tmp_path / "merged.safetensors"
    asked = ["merge", "--recipe", str(config), "--b", str(models / "b.safetensors"), "-o", str(output), "--quiet"]
    assert CliRunner().invoke(app, asked).exit_code == 0


def test_a_node_of_what_is_no_workflow_is_refused(models: Path) -> None:
    config = models / "sce.yml"
    config.write_text((HERE / "sce.yml").read_text())
    for asked in (["--node", "3"], ["--passing", "Kind"]):
        told = CliRunner().invoke(app, ["recipe", str(config), *asked])
        assert told.exit_code == 1
        assert "are for a ComfyUI workflow" in told.stderr

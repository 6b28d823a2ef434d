"""The example workflows; that the editor opens them as they are is tested in a browser."""

from __future__ import annotations

import json

import pytest

import alkahest as ak
from alkahest.nodes.examples import FOLDER, two_imports, workflows

IMPORTS = (
    ("turbo_derivative", "z_image_de_turbo_bf16"),
    ("base_derivative", "z_image_bf16"),
)


def test_the_files_are_those_of_the_module() -> None:
    made = dict(workflows())
    assert {path.stem for path in FOLDER.iterdir()} == made.keys()
    for name, workflow in made.items():
        assert json.loads((FOLDER / f"{name}.json").read_text()) == workflow, "run python -m alkahest.nodes.examples"


@pytest.mark.parametrize(("name", "kept"), [("core", ""), ("alkahest", ".without('refiner, pad_tokens')")])
def test_they_are_two_imports_merged_with_each_other(name: str, kept: str) -> None:
    (recipe,) = ak.read_workflow(FOLDER / f"merge_two_imports_{name}.json")
    one, other = (f"alkahest + 10 * ({variant} - {base}){kept}" for variant, base in IMPORTS)
    assert recipe.text == f"lerp({one}, {other}, 0.5)"
    assert recipe.notes == []


def test_drawing_and_saving_start_from_the_same_model() -> None:
    for ours in (False, True):
        graph = two_imports(ours)
        (merged,) = (one for one, node in graph.items() if node["class_type"] == "ModelMergeSimple")
        takers = {node["class_type"] for node in graph.values() if [merged, 0] in node["inputs"].values()}
        assert takers == {"AlkahestSave" if ours else "ModelSave", "ModelSamplingAuraFlow"}

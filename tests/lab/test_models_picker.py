from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from alkahest.lab.models import open_models, write_models
from alkahest.lab.models_picker import ModelsPicker
from alkahest.lab.panels import models_picker


@pytest.fixture
def picker(trio: dict[str, Path], tmp_path: Path) -> ModelsPicker:
    return models_picker(tmp_path / "models.toml", trio["base"].parent)


def test_it_offers_what_lies_in_the_folder_and_takes_any_path(picker: ModelsPicker, trio: dict[str, Path]) -> None:
    assert set(picker.boxes["base"].options) == {str(path) for path in trio.values()}
    picker.boxes["base"].value = str(trio["base"])
    assert "2 layers, width 96" in picker.headers["base"].value
    picker.boxes["turbo"].value = "mini:turbo"
    assert "4 layers, width 96" in picker.headers["turbo"].value
    picker.folder.value = "/no/such"
    assert "there is no folder /no/such" in picker.status.value
    assert picker.boxes["base"].options == ()
    picker.boxes["turbo"].value = ""  # what is chosen elsewhere takes the word back no more
    assert "there is no folder /no/such" in picker.status.value
    picker.folder.value = str(trio["base"].parent)
    assert picker.status.value == ""


def test_components_that_are_not_there_are_said(picker: ModelsPicker, tmp_path: Path) -> None:
    for value, wrong in ((str(tmp_path / "gone"), True), (str(tmp_path), False), ("Tongyi-MAI/Z-Image", False)):
        picker.boxes["components"].value = value
        assert ("there is no such folder" in picker.headers["components"].value) == wrong


def test_what_it_saves_is_what_notebooks_open(picker: ModelsPicker, trio: dict[str, Path]) -> None:
    assert repr(picker) == "models picker for models.toml, which names nothing yet"
    for name in ("base", "variant"):
        picker.boxes[name].value = str(trio[name])
    picker.boxes["turbo"].value = "mini:turbo"
    picker.save_button.click()
    assert "it takes miniatures" in picker.status.value
    models = open_models(picker.path, "base", "variant")
    assert models.own
    assert [one.path for one in models.values()] == [trio["base"], trio["variant"]]
    assert 'turbo = "mini:turbo"' in picker.path.read_text()
    assert "replaced" not in picker.status.value
    picker.save_button.click()
    assert "replaced the file of that name" in picker.status.value


def test_paths_are_meant_from_where_the_notebook_runs(
    trio: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trio["base"].parent)
    (tmp_path / "elsewhere").mkdir()
    picker = models_picker(tmp_path / "elsewhere" / "models.toml")
    picker.boxes["base"].value = "base.safetensors"
    picker.save()
    monkeypatch.chdir("/")
    assert open_models(picker.path, "base")["base"].path == trio["base"]


def test_a_file_that_cannot_be_opened_is_said_and_nothing_is_saved(picker: ModelsPicker, tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("I am no model")
    picker.boxes["base"].value = str(tmp_path / "text.safetensors")
    assert "role='alert'" in picker.headers["base"].value
    assert picker.save() is None
    assert "nothing is saved: base cannot be opened" in picker.status.value
    assert not picker.path.exists()
    picker.boxes["base"].value = ""
    assert picker.headers["base"].value == ""
    assert picker.save() == picker.path


def test_sizes_that_do_not_fit_are_said(picker: ModelsPicker, trio: dict[str, Path], tmp_path: Path) -> None:
    picker.boxes["base"].value = str(trio["base"])
    picker.boxes["bridge"].value = str(tiny.write(tmp_path / "deep.safetensors", tiny.state(layers=1)))
    assert "differ in size" in picker.status.value
    assert "bridge: 1 layers, width 96" in picker.status.value
    picker.boxes["bridge"].value = ""
    assert picker.status.value == ""


def test_it_begins_with_what_is_named(trio: dict[str, Path], tmp_path: Path) -> None:
    parts = {"text_encoder": "qwen.safetensors", "vae": "ae.safetensors"}
    path = write_models(tmp_path / "models.toml", {"base": str(trio["base"]), "components": parts})
    picker = models_picker(path)
    assert "2 layers" in picker.headers["base"].value
    parts["vae"] = str(tmp_path / "ae.safetensors")
    parts["text_encoder"] = str(tmp_path / "qwen.safetensors")
    assert picker.named == {"base": str(trio["base"]), "components": parts}
    assert f"vae = {tmp_path}/ae.safetensors" in picker.headers["components"].value
    picker.save()
    assert models_picker(path).named == picker.named


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text("base = ")
    picker = models_picker(tmp_path / "models.toml")
    assert "is replaced if you save" in picker.status.value
    assert picker.named == {}

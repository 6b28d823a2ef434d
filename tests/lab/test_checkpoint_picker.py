from __future__ import annotations

from pathlib import Path

import pytest
import tiny

import alkahest as ak
from alkahest.lab.checkpoint_picker import CheckpointPicker, checkpoint_picker, checkpoints_in


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder as people have it: models, shards, a diffusers folder, a text encoder, rubbish."""
    base = tiny.state(0)
    tiny.write(tmp_path / "base.safetensors", base)
    tiny.write(tmp_path / "other.safetensors", tiny.state(1))
    (tmp_path / "sub").mkdir()
    tiny.write(tmp_path / "sub" / "variant.safetensors", tiny.near(base, 0.01, 5))
    ak.open(tmp_path / "base.safetensors").save(tmp_path / "diffusers", layout="diffusers")
    ak.open(tmp_path / "base.safetensors").save(tmp_path / "sharded", max_shard_size="500KB")
    (tmp_path / "broken.safetensors").write_bytes(b"not a model")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden").mkdir()
    tiny.write(tmp_path / ".hidden" / "secret.safetensors", base)
    return tmp_path


def chosen(picker: CheckpointPicker, name: str) -> None:
    picker.files.value = next(path for label, path in picker.files.options if label.startswith(name))


def test_it_finds_each_kind_once(models: Path) -> None:
    found = {str(path.relative_to(models)): size for path, size in checkpoints_in(models)}
    sharded = next(name for name in found if name.startswith("sharded"))
    assert set(found) == {
        "base.safetensors",
        "broken.safetensors",
        "diffusers",
        "other.safetensors",
        sharded,
        "sub/variant.safetensors",
    }
    assert found["base.safetensors"] == (models / "base.safetensors").stat().st_size
    assert found[sharded] == sum(path.stat().st_size for path in (models / "sharded").glob("*.safetensors"))
    for name in set(found) - {"broken.safetensors"}:
        assert ak.open(models / name).parameters


def test_it_says_where_it_stopped(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alkahest.lab.checkpoint_picker._ENTRIES", 5)
    assert "looked at 5 files and stopped there" in checkpoint_picker(models).status.value
    monkeypatch.undo()
    assert checkpoint_picker(models).status.value.count("6 checkpoints<") == 1


def test_the_header_is_shown_and_the_lineage_guessed(models: Path) -> None:
    picker = checkpoint_picker(models, bases={"given": ak.open(models / "other.safetensors")})
    chosen(picker, "sub")
    assert picker.checkpoint == ak.open(models / "sub" / "variant.safetensors")
    assert "depth" in picker.header.value
    picker.candidates.value = [models / "base.safetensors"]
    picker.job.start_button.click()
    assert picker.job.wait(60).name == "base.safetensors"
    assert "<b>base.safetensors</b>" in picker.answer.value
    assert picker.lineage.table.candidate.tolist() == ["base.safetensors", "given"]
    chosen(picker, "base")
    assert picker.answer.value == ""
    assert picker.lineage is None
    (models / "sub" / "gone.safetensors").symlink_to(models / "nowhere.safetensors")
    (models / "sub" / "shard.safetensors.index.json").write_text("{}")
    (models / "sub" / "shard-1.safetensors").symlink_to(models / "nowhere.safetensors")
    picker.look()  # links that lead nowhere are no reason to stop
    assert "checkpoints" in picker.status.value


def test_bad_files_and_folders_are_said_in_place(models: Path) -> None:
    picker = checkpoint_picker(models)
    chosen(picker, "broken")
    assert picker.checkpoint is None
    assert "role='alert'" in picker.header.value
    assert "broken.safetensors" in picker.header.value
    picker.job.start()
    picker.job.wait(10)
    assert "no checkpoint is chosen" in picker.job.status.value
    chosen(picker, "base")
    picker.candidates.value = [models / "base.safetensors"]  # itself
    picker.job.start()
    picker.job.wait(10)
    assert "nothing to compare with" in picker.job.status.value
    picker.folder.value = str(models / "nowhere")
    assert "there is no folder" in picker.status.value
    assert picker.value is None
    assert picker.checkpoint is None
    picker.folder.value = str(models / "sub")
    assert picker.value == models / "sub" / "variant.safetensors"

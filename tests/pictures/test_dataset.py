from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import alkahest as ak
from alkahest.errors import AlkahestError, FileFormatError
from alkahest.mini.drawing import draw
from alkahest.mini.scenes import scenes
from alkahest.pictures.dataset import from_folder, from_scenes, make_dataset, stream_make_dataset


def picture(path: Path, size: tuple[int, int] = (80, 48), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(values).save(path)
    return path


def test_a_caption_lies_beside_its_picture(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", seed=1)
    (tmp_path / "a.txt").write_text("  a red fox \n")
    picture(tmp_path / "deep" / "b.JPG", seed=2)
    (tmp_path / "deep" / "b.txt").write_text("Füchse, zwei")
    picture(tmp_path / "c.webp", seed=3)
    (tmp_path / "notes.md").write_text("no picture")
    found = from_folder(tmp_path)
    assert [(e.name, e.caption) for e in found.examples] == [("a.png", "a red fox"), ("deep/b.JPG", "Füchse, zwei")]
    assert found.skipped == {"c.webp": "no caption"}
    assert "1 skipped: no caption (c.webp)" in repr(found)
    assert found.examples[0].open().size == (80, 48)
    assert len({example.identity for example in found.examples}) == 2
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "x.png").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "copy" / "x.txt").write_text("another caption")
    assert from_folder(tmp_path / "copy").examples[0].identity == found.examples[0].identity


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_captions_from_a_table(form: str, tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "text": "one, with a comma"}, {"file_name": "in/b.png", "text": "two"}]
    for n, row in enumerate(rows):
        picture(tmp_path / row["file_name"], seed=n)
    picture(tmp_path / "c.png")
    if form == "jsonl":
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    else:
        (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"one, with a comma"\nin/b.png,two\n')
    found = from_folder(tmp_path)
    assert {e.name: e.caption for e in found.examples} == {row["file_name"]: row["text"] for row in rows}
    assert found.skipped == {"c.png": "no caption"}


def test_scenes_are_drawn_as_they_are() -> None:
    found = from_scenes(3, seed=4, style="anime", subject=("man", "woman"))
    same = list(scenes(3, 4, style="anime", subject=("man", "woman")))
    assert [e.caption for e in found.examples] == [scene.training_caption() for scene in same]
    assert np.array_equal(np.asarray(found.examples[1].open()), np.rint(draw(same[1]) * 255).astype(np.uint8))
    assert found.examples[0].identity != from_scenes(3, seed=5, style="anime").examples[0].identity


def test_models_draw_a_dataset_and_go_on(tmp_path: Path) -> None:
    base, turbo = (ak.pipeline(ak.mini.load(name)) for name in ("base", "turbo"))
    models: dict[str, Any] = {"base": (base, {"steps": 3, "cfg": 2}), "turbo": (turbo, {"steps": 2, "cfg": 1})}
    prompts = ["a red ball", "a blue box", "a green tree"]
    first = stream_make_dataset(models, prompts, tmp_path / "drawn", batch=2)
    next(first)
    first.close()
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "drawn").iterdir()}
    *events, last = stream_make_dataset(models, prompts, tmp_path / "drawn", batch=2)
    assert events[-1].done == last.total == 6
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was drawn is not drawn again"
    found = make_dataset(models, prompts, tmp_path / "drawn", batch=2)
    assert found == last.result
    assert [e.name for e in found.examples] == [f"{name}-{n:05}.png" for name in ("base", "turbo") for n in range(3)]
    assert found.examples[4].caption == "a blue box"
    expected = ak.sample(turbo, "a green tree", steps=2, cfg=1, seed=2).images[0]
    assert np.abs(np.asarray(found.examples[5].open(), int) - np.asarray(expected)).max() <= 1


def test_a_drawn_picture_is_known_by_what_it_depends_on(tmp_path: Path) -> None:
    """Old pictures do not come back for other prompts, settings or models, whatever their number."""
    base, turbo = (ak.pipeline(ak.mini.load(name)) for name in ("base", "turbo"))

    def drawn(pipe: Any, prompts: list[str], **settings: Any) -> dict[str, bytes]:
        found = list(stream_make_dataset({"m": pipe}, prompts, tmp_path / "d", **{"steps": 1, "cfg": 1, **settings}))[
            -1
        ].result
        assert [e.caption for e in found.examples] == prompts
        return {e.name: (tmp_path / "d" / e.name).read_bytes() for e in found.examples}

    first = drawn(base, ["a red ball", "a blue box", "a green tree"])
    assert drawn(base, ["a red ball", "a blue box", "a green tree"]) == first
    second = drawn(base, ["a yellow house", "a blue box"])
    assert list(second) == ["m-00000.png", "m-00001.png"]  # the third is of no prompt any more
    assert second["m-00000.png"] != first["m-00000.png"]
    assert second["m-00001.png"] == first["m-00001.png"]
    assert drawn(base, ["a yellow house", "a blue box"], shift=1.0) != second
    assert drawn(turbo, ["a yellow house", "a blue box"], shift=1.0) != second
    picture(tmp_path / "d" / "mine.png")
    (tmp_path / "d" / "mine.txt").write_text("mine")
    *_, last = stream_make_dataset({"m": base}, ["a blue box"], tmp_path / "d", steps=1, cfg=1)
    assert len(last.result) == 1
    assert last.result.skipped["mine.png"] == "not of this dataset: it was in the folder"


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="no such folder"):
        from_folder(tmp_path / "nowhere")
    with pytest.raises(FileFormatError, match=r"(?s)no pictures with captions.*no pictures"):
        from_folder(tmp_path)
    picture(tmp_path / "a.png")
    with pytest.raises(FileFormatError, match=r"(?s)no pictures with captions.*1: no caption"):
        from_folder(tmp_path)
    for text in ("not json", '["a list"]', '{"file_name": 3}\n{"text": "no name"}'):
        (tmp_path / "metadata.jsonl").write_text(text)
        with pytest.raises(FileFormatError):
            from_folder(tmp_path)
    with pytest.raises(AlkahestError, match="there are no prompts"):
        next(stream_make_dataset({}, [], tmp_path))

from __future__ import annotations

from pathlib import Path

import pytest

import alkahest as ak
from alkahest.errors import AlkahestError, UnknownNameError
from alkahest.lab.models import KEYS, open_derivative, open_models, read_models, write_models


@pytest.fixture
def named(trio: dict[str, Path], tmp_path: Path) -> Path:
    """A models file beside its files, of which the paths are relative."""
    for name, path in trio.items():
        (tmp_path / f"{name}.safetensors").symlink_to(path)
    return write_models(tmp_path / "models.toml", {name: f"{name}.safetensors" for name in trio})


def test_yours_are_taken_where_all_are_named(
    named: Path, trio: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")  # paths are relative to the file, wherever one stands
    models = open_models(named, "bridge", "variant", "base")
    assert models.own
    assert models.mark == ""
    assert list(models) == ["bridge", "variant", "base"]
    assert all(models[name] == ak.open(path) for name, path in trio.items())
    assert [one.name for one in models.values()] == ["bridge", "variant", "base"]
    assert "your files, named in models.toml: bridge = bridge.safetensors, variant = " in repr(models)


def test_one_that_is_missing_makes_all_miniatures_and_is_said(named: Path) -> None:
    models = open_models(named, "turbo", "base", "bridge")
    assert not models.own
    assert models.mark == " (miniatures)"
    assert [one.path.stem for one in models.values()] == ["turbo", "base", "tb1"]
    assert "miniatures, because models.toml names no turbo (your base, bridge are not used here): " in repr(models)
    assert "(your base is not used here)" in repr(open_models(named, "base", "weak"))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (None, "there is no file of yours named"),
        ({}, "there is no MODELS"),
        ("no/models.toml", "there is no models.toml"),
        ({"base": "x"}, "MODELS names no turbo"),
        ({"base": "x", "turbo": ""}, "MODELS names no turbo (your base is not used here)"),
    ],
)
def test_without_any_of_yours_the_reason_is_said(given: object, why: str) -> None:
    assert f"miniatures, because {why}" in repr(open_models(given, "turbo", *(["base"] if given else [])))


def test_each_key_has_a_miniature() -> None:
    for name, (what, stand_in) in KEYS.items():
        assert what
        assert open_models(None, name)[name] == ak.mini.load(stand_in)
    assert open_models(None, "variant", stand_ins={"variant": "base-weak"})["variant"] == ak.mini.load("base-weak")


def test_of_two_lineages_the_one_that_you_have(named: Path, trio: dict[str, Path]) -> None:
    models = open_derivative(named, "bridge", prefer="of_turbo")
    assert list(models) == ["bridge", "base", "variant"]
    assert models.own
    both = {name: str(path) for name, path in trio.items()} | {"deturbo": trio["base"], "of_turbo": trio["variant"]}
    assert list(open_derivative(both, "bridge", prefer="of_turbo")) == ["bridge", "deturbo", "of_turbo"]
    assert list(open_derivative(both, "bridge")) == ["bridge", "base", "variant"]
    minis = open_derivative(None, "bridge", prefer="of_turbo")
    assert [one.path.stem for one in minis.values()] == ["tb1", "deturbo", "turbo-variant"]
    with pytest.raises(UnknownNameError, match="of_turbo"):
        open_derivative(None, prefer="turbo")


def test_bases_are_of_the_same_family_as_what_is_asked_for(named: Path, trio: dict[str, Path]) -> None:
    assert list(open_derivative(named).bases()) == ["base"]
    three = open_models({"base": trio["base"], "turbo": trio["bridge"], "variant": trio["variant"]}, "variant", "base")
    assert list(three.bases()) == ["base", "turbo"]
    assert three.bases()["turbo"] == ak.open(trio["bridge"])
    assert [one.path.stem for one in open_models(None, "base").bases().values()] == ["base", "turbo", "deturbo"]


def test_what_is_drawn_needs_components(named: Path, trio: dict[str, Path]) -> None:
    models = open_models(named, "base", "bridge", stand_ins={"bridge": "tb0"})
    drawn = models.to_draw()
    assert not drawn.own
    assert [one.path.stem for one in drawn.values()] == ["base", "tb0"]
    assert "no components are named to draw yours with" in repr(drawn)
    with_parts = open_models({"base": trio["base"], "components": "Tongyi-MAI/Z-Image"}, "base")
    assert with_parts.to_draw() is with_parts
    assert with_parts.components == "Tongyi-MAI/Z-Image"
    minis = open_models(None, "base")
    assert minis.to_draw() is minis
    assert minis.components is None


def test_what_is_wrong_names_the_key_and_the_file(named: Path, tmp_path: Path) -> None:
    with pytest.raises(AlkahestError, match=r"open base, as models.toml names it: .*(\n.*)*did you mean"):
        open_models(write_models(named, {"base": "bas.safetensors"}), "base")
    (tmp_path / "text.safetensors").write_text("I am no model")
    with pytest.raises(AlkahestError, match=r"as models\.toml names it"):
        open_models(write_models(named, {"base": "text.safetensors"}), "base")
    named.write_text("bridg = 'x'")
    with pytest.raises(UnknownNameError, match="did you mean 'bridge'"):
        open_models(named, "base")
    named.write_text("base = 3")
    with pytest.raises(AlkahestError, match="base must be a path"):
        open_models(named, "base")
    named.write_text("base = ")
    with pytest.raises(AlkahestError, match=r"models\.toml"):
        open_models(named, "base")
    with pytest.raises(UnknownNameError, match="no such model"):
        open_models(None, "bas")


def test_the_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / 'a "b" ü').mkdir()
    given = {
        "base": 'a "b" ü',
        "turbo": "mini:turbo",
        "bridge": "",
        "components": {"text_encoder": "Qwen/Qwen3-4B", "vae": "C:\\ae.safetensors"},
    }
    read = read_models(write_models(tmp_path / "models.toml", given)).paths
    assert read == {
        "base": str(tmp_path / 'a "b" ü'),
        "turbo": read["turbo"],
        "components": {"text_encoder": "Qwen/Qwen3-4B", "vae": str(tmp_path / "C:\\ae.safetensors")},
    }
    assert ak.open(read["turbo"]) == ak.mini.load("turbo")

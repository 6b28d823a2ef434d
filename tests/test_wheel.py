"""The package as a stranger installs it: built, put into a fresh environment, and used from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the wheel in it; the packages that it needs are those of this one."""
    place = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    found = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = Path(
        subprocess.run(
            [found, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    )
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(found),
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            str(wheel),
        ],
        check=True,
        capture_output=True,
    )
    (site / "needed.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )  # after our own, and its .pth files are not read
    return found


def run(python: Path, folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(python), *arguments], cwd=folder, env=environment, check=check, capture_output=True, text=True
    )


def test_it_holds_the_package_and_nothing_beside_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"alkahest", "alkahest_merge"}
    for name in (
        "py.typed",
        "mini/weights/tb1.safetensors",
        "experiment/growing/tb0.toml",
        "experiment/growing/tb1.toml",
    ):
        assert f"alkahest/{name}" in names
    assert not [name for name in names if name.endswith((".pyc", ".nbc", ".nbi"))]


def test_wheel_and_sdist_are_fit_to_be_published(wheel: Path, tmp_path: Path) -> None:
    """As the package index looks at them: metadata, and a description that it can show."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)], cwd=ROOT, check=True
    )
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert (wheel.name.split("-")[0], sdist.name.split("-")[0]) == ("alkahest_merge", "alkahest_merge")
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(sdist) as files:
        inside = {name.split("/", 1)[1] for name in files.getnames() if "/" in name}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "alkahest/__init__.py"} <= inside
    assert not [name for name in inside if name.startswith(("work/", ".venv/", "notebooks/files/"))]


TOUR = """
import alkahest as ak
from alkahest.experiment.growing import BRIDGES
from alkahest.experiment.growing.build import STAGES
assert "site-packages" in ak.__file__, ak.__file__
bridge, variant, base = (ak.mini.load(name) for name in ("tb1", "base-variant", "base"))
delta = variant - base
print(ak.needed_multiplier(delta, on=bridge.protect("refiner")))
saved = (bridge.protect("refiner") + 2 * delta).save("merged.safetensors")
lora = ak.extract_lora(delta, rank=4).save("lora.safetensors")
picture = ak.sample(ak.pipeline(ak.open(saved.path)), "a red ball", steps=2).images[0]
print(picture.size, len(STAGES), [ak.read_config(BRIDGES / f"{name}.toml").steps for name in ("tb0", "tb1")])
"""


# Commands in one process, which is what most of their time goes into: exit code and what was printed, of each.
COMMANDS = """
import json, sys
from typer.testing import CliRunner
from alkahest.cli import app
for command in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, command)
    print(json.dumps([done.exit_code, done.output]))
"""


def commands(python: Path, folder: Path, *each: list[str]) -> list[tuple[int, str]]:
    said = run(python, folder, "-c", COMMANDS, json.dumps(each)).stdout
    return [tuple(json.loads(line)) for line in said.splitlines()]


def test_the_tour_runs_from_another_folder(python: Path, tmp_path: Path) -> None:
    said = run(python, tmp_path, "-c", TOUR).stdout
    assert said.startswith("Multiplier ")
    assert said.endswith("(64, 64) 19 [1000, 1250]\n")
    found = commands(
        python,
        tmp_path,
        ["verify", "merged.safetensors"],
        ["lora", "inspect", "lora.safetensors"],
        ["inspect", "merged.safetensors", "--json"],
        ["experiment", "list", "--root", str(ROOT / "experiments")],
    )
    assert [code for code, _ in found] == [0] * 4
    assert json.loads(found[2][1])["layers"] == 4
    assert len(found[3][1].splitlines()) == len(list((ROOT / "experiments").glob("[0-9][0-9]-*/experiment.toml")))


def test_experiments_that_are_not_there_are_an_error(python: Path, tmp_path: Path) -> None:
    for code, said in commands(
        python, tmp_path, *(["experiment", *one] for one in (["list"], ["report"], ["run", "1"]))
    ):
        assert code == 1
        assert "there are no experiments here" in said
        assert "--root FOLDER" in said
    assert not list(tmp_path.iterdir())


def test_a_user_s_script_finds_types(python: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        'import alkahest as ak\ndelta = ak.open("v.safetensors") - ak.open("b.safetensors")\n'
        'reveal_type(ak.needed_multiplier(delta, on=ak.open("a.safetensors")))\nak.extract_lora(delta, rank="many")\n'
    )
    settings = tmp_path / "mypy.ini"  # what is not ours is not looked into, which takes a minute
    settings.write_text(
        "[mypy]\n[mypy-torch.*,numpy.*,pandas.*,diffusers.*,transformers.*,huggingface_hub.*]\nfollow_imports = skip\n"
    )
    done = run(
        Path(sys.executable),
        tmp_path,
        "-m",
        "mypy",
        "--python-executable",
        str(python),
        "--config-file",
        str(settings),
        "--cache-dir",
        str(tmp_path / "cache"),
        str(script),
        check=False,
    )
    assert 'Revealed type is "alkahest.measure.multiplier.Multiplier"' in done.stdout
    assert 'Argument "rank" to "extract_lora" has incompatible type "str"' in done.stdout
    assert "found 1 error in 1 file" in done.stdout.lower()

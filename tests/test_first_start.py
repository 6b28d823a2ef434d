"""What is said while `make lab` installs, where notebooks are run, and how their first cell installs elsewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import types
from collections import deque
from pathlib import Path

import nbformat
import pytest
from notebook_runs import FOLDER, NOTEBOOKS

INSTALLING = nbformat.read(NOTEBOOKS[0], as_version=4).cells[1].source
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def install() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("install", ROOT / ".make" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["install"] = module
    spec.loader.exec_module(module)
    return module


def test_sizes_are_those_of_the_files(install: types.ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a b.whl").write_bytes(bytes(1234))
    urls = [(tmp_path / "a b.whl").as_uri(), tmp_path.as_uri(), "https://127.0.0.1:9/x.whl", ""]
    report = {"install": [{"metadata": {"name": f"p{n}"}, "download_info": {"url": url}} for n, url in enumerate(urls)]}
    assert [one.nbytes for one in install.packages_of(report)] == [1234, 0, None, None]


def test_cuda_is_announced_before_it_comes(install: types.ModuleType) -> None:
    packages = [
        install.Package("torch", 900_000_000),
        install.Package("nvidia-cudnn-cu13", 700_000_000),
        install.Package("triton", 200_000_000),
        install.Package("pandas", None),
    ]
    text = install.summary(packages, on_linux=True)
    assert text.startswith(
        "4 packages to install, 1.8 GB to download at most, and 1 of unknown size\n900.0 MB of it in 2 "
    )
    assert "make lab TORCH=cpu" in text
    assert "CUDA" not in install.summary(packages, on_linux=False)
    assert "CUDA" not in install.summary(packages[:1], on_linux=True)
    assert install.summary([], on_linux=True) == ""


def test_what_is_still_to_come_is_counted(install: types.ModuleType) -> None:
    packages = [install.Package("Big_One", 2_000_000), install.Package("small", 500_000)]
    output = """Obtaining file:///project
  Preparing editable metadata (pyproject.toml): started
Collecting big-one==1.0 (from alkahest==0.1)
  Downloading big_one-1.0-py3-none-any.whl (2.0 MB)
Progress 1000000 of 2000000
Progress 2000000 of 2000000
Requirement already satisfied: other in place
Collecting small (from alkahest==0.1)
ERROR: something went wrong
Installing collected packages: small, big-one
"""
    assert list(install.progress(output.splitlines(True), packages)) == [
        "1 of 2 packages, 0 kB of 2.5 MB: big-one",
        "1 of 2 packages, 1.0 MB of 2.5 MB: big-one",
        "1 of 2 packages, 2.0 MB of 2.5 MB: big-one",
        "2 of 2 packages, 2.0 MB of 2.5 MB: small",
        "ERROR: something went wrong",
        "2 packages are there; unpacking them takes a minute or two",
    ]


def test_no_news_is_asked_for() -> None:
    settings = json.loads((ROOT / ".make" / "overrides.json").read_text())
    assert settings["@jupyterlab/apputils-extension:notification"] == {"fetchNews": "false"}


def test_notebooks_are_run_as_copies(tmp_path: Path) -> None:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in ("a", "b"):
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text(name)

    def made() -> str:
        return subprocess.run(["make", "-s", "work"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert made() == ""
    mine = tmp_path / "work" / "a.ipynb"
    mine.write_text("run")
    assert made() == ""
    assert mine.read_text() == "run"  # yours stays
    os.utime(mine, (1, 1))
    assert made() == "notebooks/a.ipynb is newer than your work/a.ipynb: delete yours to get it\n"
    assert mine.read_text() == "run"


def test_the_first_cell_installs_where_nothing_is_installed(tmp_path: Path) -> None:
    """As far as that goes without Colab: a bare environment, a git address, and pip; packages are those of this one."""
    folder = tmp_path / "content"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    python = tmp_path / "bare" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = next((tmp_path / "bare").rglob("site-packages"))
    # pip and the build's tools from here, by way of a path that comes after the environment's own.
    (site / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(["git", "init", "-q", str(tmp_path / "source")], check=True)
    copied = subprocess.run(["git", "ls-files", "-z"], cwd=FOLDER.parent, check=True, capture_output=True, text=True)
    for name in filter(None, copied.stdout.split("\0")):
        if not name.startswith(("tests/", "experiments/", "notebooks/")) and (FOLDER.parent / name).is_file():
            target = tmp_path / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((FOLDER.parent / name).read_bytes())
    (tmp_path / "source" / "notebooks").mkdir()
    (tmp_path / "source" / "notebooks" / "a.ipynb").write_text("{}")
    for command in (["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=tmp_path / "source", check=True)
    folder.mkdir()
    check = "\nimport alkahest\nprint(alkahest.__file__, os.getcwd(), alkahest.mini.load('base').name)"
    settings = {
        "ALKAHEST_SOURCE": (tmp_path / "source").as_uri(),
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's own way to say: none
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    given = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    for _ in range(2):  # the second time nothing is left to do
        done = subprocess.run(
            [python, "-c", INSTALLING + check], cwd=folder, env={**given, **settings}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout
    assert done.stdout.strip().endswith("base")
    bare = {**given, **settings, "ALKAHEST_SOURCE": ""}
    code = "import sys; sys.modules['alkahest'] = None\n" + INSTALLING
    code = code.replace('importlib.util.find_spec("alkahest") is None', "True")
    asked = subprocess.run([python, "-c", code], cwd=folder, env=bare, capture_output=True, text=True)
    assert "set ALKAHEST_SOURCE to the address" in asked.stderr


def test_badges_are_written_for_an_address(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("badges", FOLDER.parent / ".make" / "badges.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for path in NOTEBOOKS[:2]:
        shutil.copy(path, tmp_path)
    for owner in ("somebody", "second"):
        module.main(f"https://github.com/{owner}/alkahest", tmp_path)
    for path in NOTEBOOKS[:2]:
        cells = nbformat.read(tmp_path / path.name, as_version=4).cells
        colab = f"https://colab.research.google.com/github/second/alkahest/blob/main/notebooks/{path.name}"
        assert cells[0].source.count(colab) == 1
        assert "somebody" not in cells[0].source
        assert 'os.environ.get("ALKAHEST_SOURCE", "https://github.com/second/alkahest")' in cells[1].source
        assert cells[2:] == nbformat.read(path, as_version=4).cells[2:]
    with pytest.raises(SystemExit, match="an address such as"):
        module.main("alkahest", tmp_path)


def test_what_goes_wrong_is_not_written_over(install: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    install.show(["1 of 2 packages", "2 of 2 packages", "ERROR: no space left", "3 of 2 packages"])
    assert "ERROR: no space left\n" in capsys.readouterr().out  # also within ten seconds of another line
    said: deque[str] = deque(maxlen=2)
    lines = ["Collecting a\n", "Progress 1 of 2\n", "  cause\n", "  note\n"]
    assert list(install.remember(lines, said)) == lines
    assert list(said) == ["  cause\n", "  note\n"]

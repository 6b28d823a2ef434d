"""Put the nodes into a ComfyUI, and take them out again."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import alkahest
from alkahest.errors import OutputError
from alkahest.files.paths import expanded
from alkahest.files.whole import write_text
from alkahest.nodes.examples import FOLDER as EXAMPLES
from alkahest.nodes.running import NEEDED

_MARK = '"""Alkahest\'s nodes; written by `alkahest nodes install`, and removed by `alkahest nodes uninstall`."""'
_LOADER = """{mark}

import importlib.util
import os
import sys

PACKAGE = {package!r}
found = importlib.util.find_spec("alkahest")
origin = None if found is None else found.origin
# Another package is called alkahest too; ours has these nodes.
ours = origin is not None and os.path.isfile(os.path.join(os.path.dirname(origin), "nodes", "merging.py"))
if not ours:  # not installed in ComfyUI's Python: from where it was installed
    place = [PACKAGE]
    start = PACKAGE + "/__init__.py"
    spec = importlib.util.spec_from_file_location("alkahest", start, submodule_search_locations=place)
    sys.modules["alkahest"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["alkahest"])

from alkahest.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, WEB_DIRECTORY

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
"""


def install(comfyui: str | os.PathLike[str]) -> Path:
    """Register the nodes in a ComfyUI folder; returns the folder that holds them. Installing again updates it.

    The folder holds one file, which takes the package from ComfyUI's Python or, if it is not installed there, from
    where it is now, and beside it the example workflows that ComfyUI lists among its templates. Raises
    OutputError if the folder is no ComfyUI, or holds other nodes of that name.
    """
    folder = _folder(comfyui)
    _require_ours(folder)
    folder.mkdir(exist_ok=True)
    package = Path(alkahest.__file__).resolve().parent
    write_text(folder / "__init__.py", _LOADER.format(mark=_MARK, package=package.as_posix()))
    (folder / EXAMPLES.name).mkdir(exist_ok=True)
    for workflow in EXAMPLES.glob("*.json"):
        write_text(folder / EXAMPLES.name / workflow.name, workflow.read_text(encoding="utf-8"))
    return folder


def uninstall(comfyui: str | os.PathLike[str]) -> Path:
    """Remove what `install` made; OutputError if it is not there, or not ours."""
    folder = _folder(comfyui)
    if not folder.exists():
        raise OutputError("nodes uninstall", "the nodes are not installed here", file=folder)
    _require_ours(folder)
    shutil.rmtree(folder)
    return folder


def find_lacking(comfyui: str | os.PathLike[str]) -> tuple[str | None, list[str]]:
    """ComfyUI's Python, if it can be found, and the packages that the nodes need and it lacks."""
    root = expanded(comfyui, "install")
    names = [root / one / place for one in ("venv", ".venv") for place in ("bin/python", "Scripts/python.exe")]
    names += [root / "python_embeded/python.exe", root.parent / "python_embeded/python.exe"]
    python = next((str(name) for name in names if name.is_file()), None)
    if python is None:
        return None, list(NEEDED)
    code = f"import importlib.util as u; print(*[n for n in {NEEDED!r} if u.find_spec(n) is None])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):  # another system's Python, or one that does not start
        return python, list(NEEDED)
    return python, done.stdout.split() if done.returncode == 0 else list(NEEDED)


def _folder(comfyui: str | os.PathLike[str]) -> Path:
    root = expanded(comfyui, "install")
    for place in (root, root / "ComfyUI"):  # the portable edition has it one further down
        if (place / "custom_nodes").is_dir():
            return place / "custom_nodes" / "alkahest"
    raise OutputError(
        "nodes",
        "this is not a ComfyUI folder",
        file=root,
        expected="a folder with custom_nodes in it",
        fix="name the folder that ComfyUI's main.py lies in",
    )


def _require_ours(folder: Path) -> None:
    file = folder / "__init__.py"
    ours = file.is_file() and file.read_text(errors="replace").startswith(_MARK)
    free = ours or not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if folder.is_symlink() or not free:
        raise OutputError(
            "nodes",
            "there is another alkahest among the custom nodes",
            file=folder,
            expected="a folder that alkahest nodes install wrote",
            fix="move it away first",
        )

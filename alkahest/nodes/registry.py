"""The nodes as ComfyUI's registry takes them: a folder of its own, which leaves the package where pip put it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from alkahest.errors import UnsupportedError
from alkahest.files.namesake import DISTRIBUTION
from alkahest.files.paths import expanded
from alkahest.files.whole import whole_folder, write_text
from alkahest.nodes.examples import FOLDER as EXAMPLES
from alkahest.version import __version__

_PROJECT = """[project]
name = "{node}"
description = "Merge Z-Image models without caps: bridge + multiplier * (variant - base), with the refiner kept"
version = "{version}"
license = {{ text = "Apache-2.0" }}
requires-python = ">=3.11"
dependencies = ["{distribution}=={version}"]
classifiers = ["Operating System :: OS Independent"]

[project.urls]
Repository = "{repository}"

[tool.comfy]
PublisherId = "{publisher}"
DisplayName = "Alkahest"
Icon = ""
includes = []
requires-comfyui = ">=0.14.0"
"""
_NODES = '''"""Alkahest's nodes, from the package that pip installs beside them."""

try:
    from alkahest.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, WEB_DIRECTORY
except ImportError as missing:
    raise ImportError(
        "Alkahest's nodes need {distribution} in ComfyUI's Python: pip install {distribution}=={version}; "
        "another package called alkahest, which lacks them, has to go first: pip uninstall alkahest"
    ) from missing

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
'''
_README = """# Alkahest for ComfyUI

Nodes that merge, measure and save Z-Image models: {repository}

The nodes come with the Python package {distribution}, which ComfyUI-Manager installs from `requirements.txt`. The
article's workflow is among ComfyUI's templates afterwards.
"""
_PUBLISHER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_ADDRESS = re.compile(r"https://[^\s\"\\]+")


def write_package(folder: str | os.PathLike[str], *, publisher: str, repository: str) -> Path:
    """Write the folder that `comfy node publish` uploads; returns it.

    The archive holds no code of ours but an import, so the repository needs no `__init__.py` at its top: pip brings
    the package, of exactly this version. Write it outside a git checkout, since comfy-cli packs only files that git
    tracks.

    >>> write_package("nodes-to-publish", publisher="somebody", repository="https://github.com/somebody/alkahest")

    Parameters
    ----------
    folder : str or os.PathLike
        A folder that is not there yet, or empty.
    publisher : str
        Id of the publisher on registry.comfy.org, without the @.
    repository : str
        Public address of the source, beginning with https://.

    Raises
    ------
    OutputError
        If the folder holds something already.
    UnsupportedError
        If the publisher is no id, or the address no https address.
    """
    if not _PUBLISHER.fullmatch(publisher):
        raise UnsupportedError(
            "nodes package",
            "this is no id of a publisher",
            expected="letters, digits, - and _, as registry.comfy.org shows it after the @",
            found=repr(publisher),
        )
    if not _ADDRESS.fullmatch(repository):
        raise UnsupportedError(
            "nodes package",
            "this is no address of a repository",
            expected="https://...",
            found=repr(repository),
        )
    words = {
        "node": "alkahest",
        "version": __version__,
        "distribution": DISTRIBUTION,
        "publisher": publisher,
        "repository": repository,
    }
    target = expanded(folder, "nodes package")
    with whole_folder(target, 0) as root:
        write_text(root / "pyproject.toml", _PROJECT.format(**words))
        write_text(root / "requirements.txt", f"{DISTRIBUTION}=={__version__}\n")
        write_text(root / "__init__.py", _NODES.format(**words))
        write_text(root / "README.md", _README.format(**words))
        shutil.copytree(EXAMPLES, root / EXAMPLES.name)
    return target

"""Put badges of Colab and Kaggle into every notebook, and the address that their first cell installs from.

    python .make/badges.py https://github.com/OWNER/NAME

For whoever publishes: until an address is known, the first cell asks for it. Run again, it replaces the address.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

_NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
_ADDRESS = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+")
_SOURCE = re.compile(r'os\.environ\.get\("ALKAHEST_SOURCE", "[^"]*"\)')
_BADGES = re.compile(r"\n\n\[!\[Open in Colab\].*", re.DOTALL)


def badges(address: str, name: str) -> str:
    """The two badges of a notebook, as Markdown."""
    path = f"{address.removeprefix('https://github.com/')}/blob/main/notebooks/{name}"
    colab = f"https://colab.research.google.com/github/{path}"
    kaggle = f"https://kaggle.com/kernels/welcome?src=https://github.com/{path}"
    return (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}) "
        f"[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]({kaggle})"
    )


def with_badges(notebook: dict, address: str, name: str) -> dict:
    """The notebook with the address in its first two cells."""
    title, install = notebook["cells"][:2]
    text = _BADGES.sub("", "".join(title["source"]))
    title["source"] = f"{text}\n\n{badges(address, name)}".splitlines(True)
    source, count = _SOURCE.subn(f'os.environ.get("ALKAHEST_SOURCE", "{address}")', "".join(install["source"]))
    if count != 1:
        raise SystemExit(f"{name}: its second cell installs nothing")
    install["source"] = source.splitlines(True)
    return notebook


def main(address: str, folder: Path = _NOTEBOOKS) -> None:
    if not _ADDRESS.fullmatch(address):
        raise SystemExit("an address such as https://github.com/OWNER/NAME is needed")
    for path in sorted(folder.glob("*.ipynb")):
        notebook = with_badges(json.loads(path.read_text()), address, path.name)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:2] or [""])

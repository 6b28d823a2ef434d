"""Draw what the README shows of itself: its commands with what they print, and the picture for links to the project.

    python .make/front.py

Writes docs/walk.svg and docs/social-preview.png (1280 x 640, for "Social preview" in the repository's settings).
"""

from __future__ import annotations

import io
import os
import re
import shlex
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text
from typer.testing import CliRunner

from alkahest.cli import app

ROOT = Path(__file__).parent.parent
FRONT = "experiments/08-merging-imports/results/the-article-in-one-picture.png"
_FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # fetched from elsewhere: the reader's own monospace will do
_FOLDER = re.compile(r"/\S*/alkahest/mini/weights/")


def walk() -> str:
    """The README's lines for the terminal, run one after the other, as a picture of that terminal."""
    (block,) = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    console = Console(record=True, width=112, file=io.StringIO(), force_terminal=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            done = CliRunner().invoke(app, words[1:])
            if done.exit_code:
                raise SystemExit(done.output)
            console.print(Text(f"$ {line.split('  #')[0].rstrip()}", style="bold bright_green"))
            console.print(Text(_FOLDER.sub("", done.stdout)), style="white")
        os.chdir(ROOT)
    return _FONT.sub("", console.export_svg(title="a derivative of Base comes over to the bridge", theme=MONOKAI))


def social_preview() -> Figure:
    """The name, the formula and the front picture, at the size and ratio that sites crop to."""
    figure = Figure(figsize=(12.8, 6.4), dpi=100, facecolor="#1e1f29")
    words = {"color": "white", "ha": "left", "family": "DejaVu Sans"}
    figure.text(0.05, 0.84, "Alkahest", fontsize=52, weight="bold", **words)
    figure.text(0.05, 0.745, "bridge + k * (variant - base)", fontsize=24, color="#8be9fd", family="DejaVu Sans Mono")
    figure.text(0.05, 0.665, "Merge and study Z-Image checkpoints", fontsize=20, **words)
    with Image.open(ROOT / FRONT) as picture:
        shown = picture.convert("RGB").crop((361, 57, 1285, 319))  # the first two prompts, without their words
    axes = figure.add_axes((0.05, 0.07, 0.9, 0.5))
    axes.imshow(shown, interpolation="lanczos", aspect="auto")
    axes.set_axis_off()
    names = ["Base", "De-Turbo", "1:1 merge", "the bridge", "+ Base's cyan", "+ Turbo's hearts", "+ both"]
    for place, name in enumerate(names):
        figure.text(0.05 + 0.9 * place / 7, 0.585, name, fontsize=12, **words)
    return figure


if __name__ == "__main__":
    (ROOT / "docs/walk.svg").write_text(walk())
    social_preview().savefig(ROOT / "docs/social-preview.png", facecolor="#1e1f29")

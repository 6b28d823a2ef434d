"""What `make lab` and `make test` install, with how much is still to come: pip's own work, said aloud.

    python .make/install.py -c constraints.txt -e '.[lab,sample,search,fast]'

Asks pip what it would install, says how many packages and bytes that is and how much of it is CUDA, and then has it
installed, counting. Needs nothing but Python and pip: it runs before anything is installed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

_CUDA = re.compile(r"nvidia-|cuda-|triton$")
_RAW = (24, 1)  # the version of pip from which a progress bar can be read by a program
_LOUD = re.compile(r"\s*(ERROR|WARNING|error)")  # what pip says and nothing may write over
_KEPT = 60  # lines of pip's, to show if it fails
_TIMEOUT = 10  # seconds, to ask for a file's size


class Package(NamedTuple):
    """Something that is to be installed, and how large its file is; None where nobody says."""

    name: str
    nbytes: int | None


def packages_of(report: dict[str, Any]) -> list[Package]:
    """The packages of a report of ``pip install --dry-run --report``, sizes asked for side by side."""
    wanted = [(one["metadata"]["name"], one["download_info"].get("url", "")) for one in report["install"]]
    with ThreadPoolExecutor(16) as pool:
        sizes = list(pool.map(_size_of, [url for _, url in wanted]))
    return [Package(name, size) for (name, _), size in zip(wanted, sizes, strict=True)]


def _size_of(url: str) -> int | None:
    try:
        if url.startswith("file:"):
            path = Path(urllib.request.url2pathname(url.removeprefix("file://")))
            return path.stat().st_size if path.is_file() else 0  # a folder: this project itself
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_TIMEOUT) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, ValueError, TypeError):
        return None


def summary(packages: Sequence[Package], on_linux: bool) -> str:
    """What is to come, in words; "" if nothing is."""
    if not packages:
        return ""
    known = [one.nbytes for one in packages if one.nbytes is not None]
    unknown = f", and {len(packages) - len(known)} of unknown size" if len(known) < len(packages) else ""
    lines = [f"{len(packages)} packages to install, {size_text(sum(known))} to download at most{unknown}"]
    cuda = [one for one in packages if _CUDA.match(one.name)]
    if cuda and on_linux:
        share = size_text(sum(one.nbytes or 0 for one in cuda))
        lines.append(
            f"{share} of it in {len(cuda)} packages, and most of torch, is CUDA, for graphics cards of NVIDIA. For a "
            "machine without one stop now (Ctrl-C) and add TORCH=cpu: make lab TORCH=cpu"
        )
    return "\n".join(lines)


def progress(lines: Iterable[str], packages: Sequence[Package]) -> Iterator[str]:
    """pip's output as it comes -> what to show of it: how many packages and bytes are there, and what is at hand."""
    sizes = {_plain(one.name): one.nbytes or 0 for one in packages}
    total, done, at_hand, current = sum(sizes.values()), 0, "", 0
    seen: set[str] = set()
    for line in lines:
        if found := re.match(r"\s*Collecting ([\w.-]+)", line):
            done += sizes.get(at_hand, 0)
            at_hand, current = _plain(found[1]), 0
            seen |= {at_hand} & sizes.keys()
        elif found := re.match(r"\s*Progress (\d+) of (\d+)", line):
            current = min(int(found[1]), sizes.get(at_hand, 0))
        elif line.startswith("Installing collected packages"):
            yield f"{len(packages)} packages are there; unpacking them takes a minute or two"
            continue
        elif _LOUD.match(line):
            yield line.rstrip()
            continue
        else:
            continue
        bytes_text = f", {size_text(done + current)} of {size_text(total)}" if total else ""
        yield f"{len(seen)} of {len(packages)} packages{bytes_text}: {at_hand}"


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def size_text(nbytes: int) -> str:
    """As the package's own, which is not installed yet."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes / 1e3:.0f} kB"


def show(texts: Iterable[str]) -> None:
    """One line that changes, on a terminal; a line every ten seconds elsewhere. What is loud has a line that stays."""
    terminal, last, width = sys.stdout.isatty(), 0.0, 0
    for text in texts:
        if _LOUD.match(text):
            print(f"\n{text}" if width else text, flush=True)
            width = 0
        elif terminal:
            print(f"\r{text[:120]:<{width}}", end="", flush=True)
            width = min(len(text), 120)
        elif time.monotonic() - last > 10:
            last = time.monotonic()
            print(text, flush=True)
    if width:
        print()


def remember(lines: Iterable[str], said: deque[str]) -> Iterator[str]:
    """The same lines; the last of them are kept in ``said``, without the numbers of a progress bar."""
    for line in lines:
        if not line.lstrip().startswith("Progress "):
            said.append(line)
        yield line


def pip(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]


def main(arguments: list[str]) -> int:
    print("asking what is to be installed ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        asked = subprocess.run(pip("install", "--dry-run", "--quiet", "--report", str(file), *arguments))
        if asked.returncode:
            return asked.returncode
        packages = packages_of(json.loads(file.read_text()))
    if text := summary(packages, sys.platform == "linux"):
        print(text, flush=True)
    version = subprocess.run(pip("--version"), capture_output=True, text=True, check=True).stdout.split()[1]
    bar = "raw" if tuple(map(int, version.split(".")[:2])) >= _RAW else "off"
    command = pip("install", "--progress-bar", bar, *arguments)
    said: deque[str] = deque(maxlen=_KEPT)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        assert running.stdout is not None
        show(progress(remember(running.stdout, said), packages))
    if running.returncode:
        print(f"pip failed; the last that it said:\n{''.join(said)}", file=sys.stderr)
    return running.returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")

"""Another package of our name: a computer algebra system on PyPI is called alkahest too, and has our import name."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

DISTRIBUTION = "alkahest-merge"  # ours; the import name and the command stay alkahest
_OURS = "Merge, measure and study"  # how our own summary begins, under whichever name it was installed


def refuse_namesake(package: Path) -> None:
    """Raise ImportError if another distribution's files lie in our folder; warn if it is installed elsewhere.

    >>> refuse_namesake(Path(alkahest.__file__).parent)
    """
    if not any(_holds_the_name(place) for place in sys.path):
        return
    from importlib import metadata  # half as slow as the rest of `import alkahest`, which most need not wait for

    try:
        other = metadata.distribution("alkahest")
    except metadata.PackageNotFoundError:
        return
    summary = other.metadata["Summary"] or ""
    if summary.startswith(_OURS):
        return
    named = f"alkahest {other.version} ({summary or 'another project'})"
    theirs = Path(str(other.locate_file("alkahest")))
    if theirs.is_dir() and os.path.samefile(theirs, package):
        raise ImportError(
            f"{named} is installed over {DISTRIBUTION}, in the same folder {package}: modules of both are mixed "
            f"there.\n  fix: pip uninstall alkahest {DISTRIBUTION}, then install {DISTRIBUTION} again"
        )
    warnings.warn(
        f"{named} is installed too and has our import name: from another folder, `import alkahest` may find it "
        "instead. pip uninstall alkahest takes it away",
        RuntimeWarning,
        stacklevel=3,
    )


def _holds_the_name(place: str) -> bool:
    """Whether a folder of packages has one that pip knows as alkahest, by the names in it alone."""
    try:
        names = os.listdir(place or ".")
    except OSError:  # a zip file, or a folder that is not there
        return False
    return any(name.startswith("alkahest-") and name.endswith((".dist-info", ".egg-info")) for name in names)

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from alkahest.files.namesake import refuse_namesake


def installed(site: Path, summary: str) -> Path:
    """A distribution called alkahest, as pip leaves one; its package's folder."""
    about = site / "alkahest-3.12.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.4\nName: alkahest\nVersion: 3.12.0\nSummary: {summary}\n")
    (site / "alkahest").mkdir()
    return site / "alkahest"


def test_a_stranger_in_our_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = installed(tmp_path / "site", "A computer algebra system")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(
        ImportError, match=r"alkahest 3.12.0 \(A computer algebra system\) is installed over alkahest-merge"
    ):
        refuse_namesake(package)


def test_a_stranger_elsewhere_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path / "site", "A computer algebra system")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (tmp_path / "ours" / "alkahest").mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="may find it instead. pip uninstall alkahest takes it away"):
        refuse_namesake(tmp_path / "ours" / "alkahest")


def test_we_ourselves_under_the_old_name_are_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = installed(
        tmp_path / "site", "Merge, measure and study Z-Image checkpoints: bridge + k * (variant - base)"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuse_namesake(package)

"""Factors by block, against a quadratic programme solved by search and against one number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alkahest as ak
from alkahest.errors import AlgebraError
from alkahest.pictures.fitted_factors import best_factors

PROMPTS = ["a red ball at night", "a blue box"]
FEW: dict[str, Any] = {"prompts": PROMPTS, "count": 4, "steps": 2}


def test_the_best_factors_by_search() -> None:
    rng = np.random.default_rng(4)
    root = rng.standard_normal((3, 6))
    gram, wanted = root @ root.T, np.array([3.0, -1.0, 2.0])
    found = best_factors(gram, wanted)
    assert (found >= 0).all()
    bound = gram.sum()
    assert found @ gram @ found == pytest.approx(bound)
    tried = rng.random((200_000, 3))
    tried *= np.sqrt(bound / np.einsum("ni,ij,nj->n", tried, gram, tried))[:, None]
    assert wanted @ found >= 0.999 * (tried @ wanted).max()
    # Independent blocks: as much of each as it is worth for what it leaks.
    assert best_factors(np.diag([1.0, 4.0]), np.array([1.0, 1.0])) == pytest.approx([2.0, 0.5], rel=0.01)
    assert best_factors(np.diag([1.0, 1.0]), np.array([-1.0, -2.0])) is None  # nothing is worth anything


def test_factors_for_a_delta(trio: dict[str, Path], parts: dict[str, Any], tmp_path: Path) -> None:
    v, b, w = (ak.open(trio[name]) for name in ("variant", "base", "bridge"))
    found = ak.fit_factors(v - b, w.protect("refiner"), 2.0, components=parts, **FEW)
    assert list(found) == ["embedders", "layers.0", "layers.1", "final"]
    assert all(factor >= 0 for factor in found.values())
    assert found.table.what.tolist() == ["factors", "one"]
    assert found.table.leak[0] == pytest.approx(found.table.leak[1], rel=0.1)
    assert found.one == 2
    assert ("better than one number" in repr(found)) or ("not better than one number" in repr(found))
    assert found.is_better == (found.table.along[0] > found.table.along[1] * 1.05)
    (w.protect("refiner") + (v - b).scaled(found)).save(tmp_path / "out.safetensors")
    two = ak.fit_factors(v - b, w.protect("refiner"), 2.0, parts=["layers", "final"], components=parts, **FEW)
    assert list(two) == ["layers", "final"]


def test_what_speaks_against_factors_is_said(
    trio: dict[str, Path], parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    v, b, w = (ak.open(trio[name]) for name in ("variant", "base", "bridge"))
    monkeypatch.setattr("alkahest.pictures.fitted_factors.best_factors", lambda *_: None)
    found = ak.fit_factors(v - b, w.protect("refiner"), 2.0, components=parts, **FEW)
    assert set(found.values()) == {2.0}
    assert "nothing could be fitted, all factors are one" in repr(found)
    assert "for the same leak" in repr(found)
    monkeypatch.setattr("alkahest.pictures.fitted_factors.best_factors", lambda *_: np.array([9.0, 0, 0, 0]))
    monkeypatch.setattr("alkahest.pictures.fitted_factors._TRIED", 1)
    found = ak.fit_factors(v - b, w.protect("refiner"), 2.0, components=parts, **FEW)
    assert "the two do not leak alike: the factors" in repr(found)
    assert "for the same leak" not in repr(found)


def test_bad_input(trio: dict[str, Path], parts: dict[str, Any]) -> None:
    v, b, w = (ak.open(trio[name]) for name in ("variant", "base", "bridge"))
    with pytest.raises(AlgebraError, match="pictures are needed to fit on"):
        ak.fit_factors(v - b, w, components=parts, prompts=PROMPTS, count=1, steps=1)
    with pytest.raises(AlgebraError, match="all that the delta changes is protected"):
        ak.fit_factors(v - b, w.protect("all"), components=parts, **FEW)
    with pytest.raises(AlgebraError, match="a delta is needed"):
        ak.fit_factors(v, w, components=parts, **FEW)  # type: ignore[arg-type]
    with pytest.raises(AlgebraError, match="0 times a delta"):
        ak.fit_factors(v - b, w, 0, components=parts, **FEW)
    with pytest.raises(AlgebraError, match="parts is a list"):
        ak.fit_factors(v - b, w, parts="layers", components=parts, **FEW)

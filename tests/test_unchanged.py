"""The bytes and numbers that ``unchanged.json`` fixes; ``python tests/unchanged.py`` compares pictures and training
too.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import unchanged

FIXED = json.loads(unchanged.FIXED.read_text())


def test_what_is_written_has_not_changed(tmp_path: Path) -> None:
    assert unchanged.differences(FIXED["bytes"], unchanged.now("bytes")) == []


def test_what_is_measured_has_not_changed(tmp_path: Path) -> None:
    assert unchanged.differences(FIXED["numbers"], unchanged.now("numbers"), close=unchanged.CLOSE) == []


@pytest.mark.parametrize("found", [{"a": [1.5, "x"]}, {"a": [1.0, "y"]}, {"a": [1.0]}, {"b": [1.0, "x"]}, {}])
def test_a_difference_is_noticed(found: object) -> None:
    assert unchanged.differences({"a": [1.0, "x"]}, {"a": [1.0 + 1e-9, "x"]}, close=1e-6) == []
    assert unchanged.differences({"a": [1.0, "x"]}, found, close=1e-6)

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import alkahest as ak
from alkahest.errors import AlgebraError


@pytest.mark.parametrize(
    "given", [{"energy": 0.9}, {"rank": 5}, {"sum": 0.7}, {"ratio": 0.5}, {"energy": 0.9, "rank_max": 20}], ids=str
)
def test_it_foretells_an_extraction(given: dict[str, Any], trio: dict[str, Path]) -> None:
    delta = ak.open(trio["variant"]) - ak.open(trio["base"])
    told = ak.lora_ranks(ak.delta_spectra(delta, values=400), **given).set_index("tensor")
    report = ak.extract_lora(delta, method="exact", dtype="fp32", **given).report.set_index("tensor")
    assert list(told.index) == list(report.index[report.kept == "LoRA"])
    for key in told.index:
        assert told["rank"][key] == pytest.approx(report["rank"][key], abs=1 if "energy" in given else 0)
        assert told.energy[key] == pytest.approx(report.energy[key], abs=0.02)
        assert told.capped[key] == report.capped[key]
    assert set(report.columns) == set(told.columns)


def test_what_was_not_measured_is_capped(trio: dict[str, Path]) -> None:
    spectra = ak.delta_spectra(ak.open(trio["variant"]) - ak.open(trio["base"]), values=5)
    told = ak.lora_ranks(spectra, energy=0.9, rank_max=None)
    assert told.capped.all()
    assert set(told["rank"]) <= {4, 5}
    with pytest.raises(AlgebraError, match="a share"):
        ak.lora_ranks(spectra, energy=9)

"""What a delta does to predictions, against the models called by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

import alkahest as ak
from alkahest.errors import AlgebraError, UnknownNameError
from alkahest.pictures.evaluation import predictions
from alkahest.pictures.evidence import batch_of

PROMPTS = ["a red ball at night", "a blue box"]
FEW: dict[str, Any] = {"prompts": PROMPTS, "ordinary": PROMPTS[:1], "count": 2, "steps": 2}


@pytest.fixture(scope="module")
def models(trio: dict[str, Path]) -> tuple[ak.Checkpoint, ...]:
    return tuple(ak.open(trio[name]) for name in ("variant", "base", "bridge"))


def test_on_its_own_base_it_does_what_it_does(models: tuple[ak.Checkpoint, ...], parts: dict[str, Any]) -> None:
    v, b, _ = models
    found = ak.effect(v - b, b, components=parts, **FEW)
    whole = found.table.iloc[0]
    assert (whole.part, whole.block) == ("all", -1)
    assert [whole["size"], whole.cosine, whole.along] == pytest.approx([1, 1, 1], rel=1e-4)
    assert (
        list(zip(found.table.part[1:], found.table.block[1:], strict=True))
        == list(dict.fromkeys(zip(found.tensors.part, found.tensors.block, strict=True)))
        or len(found.table) > 3
    )
    assert "1 x variant - base does 100 % of what it does on its own base (cosine 1.00)" in repr(found)
    assert "by 2 pictures of the new thing: 8 or more make this surer" in repr(found)
    half = ak.effect(v - b, b, components=parts, k=0.5, by_block=False, **FEW)
    assert len(half.table) == 1
    assert half.table.along[0] == pytest.approx(0.5, abs=0.05)
    assert half.tensors.empty


def test_the_numbers_by_hand(models: tuple[ak.Checkpoint, ...], parts: dict[str, Any]) -> None:
    v, b, w = models
    delta, on = v - b, w.protect("refiner")
    found = ak.effect(delta, on, components=parts, k=3.0, **FEW)

    def said(weights: ak.Weights, which: str) -> torch.Tensor:
        pipe = ak.pipeline(weights, parts)
        return predictions(pipe, getattr(found.evidence, which), 2).double()

    own = said(v, "new") - said(b, "new")
    for row, part in ((found.table.iloc[0], None), (found.table[found.table.block == 1].iloc[-1], "layers.1")):
        one = 3 * (delta if part is None else delta.only(part))
        new, rest = (said(on + one, which) - said(on, which) for which in ("new", "rest"))
        assert row["size"] == pytest.approx(float(new.norm() / own.norm()), rel=1e-3)
        assert row.along == pytest.approx(float((new * own).sum() / own.square().sum()), rel=1e-3)
        assert row.cosine == pytest.approx(float((new * own).sum() / new.norm() / own.norm()), rel=1e-3)
        assert row.leak == pytest.approx(float(rest.square().mean().sqrt() / new.square().mean().sqrt()), rel=1e-3)
        keys = [key for key in b if "refiner" not in key and (part is None or key.startswith(f"{part}."))]
        size, weight = (
            torch.cat([one.double().flatten() for one in values]).norm()
            for values in ([3 * (v[key].float() - b[key].float()) for key in keys], [w[key].float() for key in keys])
        )
        assert row.weights == pytest.approx(float(size / weight), rel=1e-3)
    assert "noise_refiner" not in set(found.table.part)


def test_what_flows_through_a_matrix(models: tuple[ak.Checkpoint, ...], parts: dict[str, Any]) -> None:
    v, b, w = models
    found = ak.effect(v - b, w, components=parts, **FEW)
    key = "layers.0.attention.to_k.weight"
    pipe = ak.pipeline(w, parts)
    seen: list[torch.Tensor] = []
    pipe.transformer.layers[0].attention.to_k.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    predictions(pipe, found.evidence.new, batch_of(pipe, evidence_options()))
    x = seen[0].double()
    moved = linear(x, v[key].double() - b[key].double()).norm()
    row = found.tensors.set_index("tensor").loc[key]
    assert row.flow == pytest.approx(float(moved / linear(x, w[key].double()).norm()), rel=1e-3)
    assert row.weights == pytest.approx(
        float((v[key].double() - b[key].double()).norm() / w[key].double().norm()), 1e-3
    )
    assert found.tensors.flow.notna().all()


def evidence_options() -> Any:
    from alkahest.pictures.evidence import PictureOptions

    return PictureOptions(batch=32)


def test_bad_input(models: tuple[ak.Checkpoint, ...], parts: dict[str, Any]) -> None:
    v, b, w = models
    with pytest.raises(AlgebraError, match="all that the delta changes is protected"):
        ak.effect(v - b, w.protect("all"), components=parts, **FEW)
    with pytest.raises(AlgebraError, match="pictures of what the variant learned are needed"):
        ak.effect(v - b, w, components=parts)
    with pytest.raises(AlgebraError, match="does not say what it is a difference from"):
        ak.effect((v - b) + (v - w), w, components=parts, **FEW)
    with pytest.raises(AlgebraError, match="on is a complete model"):
        ak.effect(v - b, "x", components=parts, **FEW)  # type: ignore[arg-type]
    with pytest.raises(AlgebraError, match="0 times a delta"):
        ak.effect(v - b, w, k=0, components=parts, **FEW)
    with pytest.raises(UnknownNameError, match="unknown option"):
        ak.effect(v - b, w, promts=PROMPTS)  # type: ignore[call-arg]
    with pytest.raises(AlgebraError, match="a delta is needed"):
        ak.effect(v, w, components=parts, **FEW)  # type: ignore[arg-type]

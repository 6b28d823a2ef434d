"""Finiteness is of what is read, whatever a method selects; and a merge that makes no difference says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import alkahest as ak
from alkahest.algebra import delta_methods, model_methods, sparse_methods
from alkahest.algebra.deltas import Delta
from alkahest.algebra.methods import REGISTRY
from alkahest.errors import NonFiniteError

KEY = "layers.0.feed_forward.w1.weight"
MODULES = (delta_methods, model_methods, sparse_methods)
SHIPPED = sorted(name for name in REGISTRY if any(hasattr(one, name) for one in MODULES))


def spoiled(tmp_path: Path, value: float, whole: bool) -> ak.Checkpoint:
    state = tiny.near(tiny.state(2), 0.02, 7)
    state[KEY] = state[KEY].clone()
    state[KEY].view(-1)[slice(None) if whole else slice(5, 6)] = value
    return ak.open(tiny.write(tmp_path / "variant.safetensors", tiny.native(state)))


@pytest.fixture
def base(tmp_path: Path) -> ak.Checkpoint:
    return ak.open(tiny.write(tmp_path / "base.safetensors", tiny.native(tiny.state(2))))


@pytest.fixture
def other(tmp_path: Path) -> ak.Checkpoint:
    return ak.open(tiny.write(tmp_path / "other.safetensors", tiny.native(tiny.near(tiny.state(2), 0.02, 8))))


def merged(name: str, v: ak.Checkpoint, b: ak.Checkpoint, o: ak.Checkpoint, **settings: Any) -> ak.Weights:
    """Some use of a method, with a spoiled operand among its operands."""
    made = REGISTRY[name]
    if made.makes is Delta:
        operands: list[Any] = [v - b, o - b]
        if not made.many:
            operands = operands[: made.operands]
        return b + made(operands, **settings) if made.many else b + made(*operands, **settings)
    if made.many:
        return made([b, v, o], **settings)  # type: ignore[no-any-return]
    return made(*[b, o, v][-made.operands :], **settings)  # type: ignore[no-any-return]


@pytest.mark.parametrize("whole", [False, True], ids=["one element", "a whole tensor"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", SHIPPED)
def test_no_method_hides_what_is_not_finite(
    name: str, value: float, whole: bool, tmp_path: Path, base: ak.Checkpoint, other: ak.Checkpoint
) -> None:
    v = spoiled(tmp_path, value, whole)
    for seed in range(4 if REGISTRY[name].random else 1):
        settings = {"seed": seed} if REGISTRY[name].random else {}
        with pytest.raises(NonFiniteError, match="an input holds NaN or infinity") as told:
            merged(name, v, base, other, **settings).save(tmp_path / "out.safetensors")
        assert told.value.key == KEY
        assert told.value.file == str(v.path)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_mask_by_signs_hides_nothing(tmp_path: Path, base: ak.Checkpoint) -> None:
    from alkahest.sources.signs import Signs

    packed = {
        key: torch.zeros(-(-torch.Size(shape).numel() // 8), dtype=torch.uint8) for key, shape in base.shapes.items()
    }
    signs = Signs(dict(base.shapes), packed).save(tmp_path / "signs.safetensors")
    v = spoiled(tmp_path, float("nan"), False)
    with pytest.raises(NonFiniteError, match="an input holds NaN"):
        (base + (v - base).agreeing(signs)).save(tmp_path / "out.safetensors")


def test_what_is_allowed_is_counted_as_read(tmp_path: Path, base: ak.Checkpoint, other: ak.Checkpoint) -> None:
    v = spoiled(tmp_path, float("nan"), False)
    saved = merged("ties", v, base, other).save(tmp_path / "out.safetensors", allow_nonfinite=True)
    assert saved.nonfinite[f"{KEY}, as read"] == 1


def test_what_is_not_read_need_not_be_finite(tmp_path: Path, base: ak.Checkpoint, other: ak.Checkpoint) -> None:
    v = spoiled(tmp_path, float("nan"), True)
    (base + ak.ties([(v - base).without("layers.0"), other - base])).save(tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "fp8_e4m3fn"}, {"dtype": "comfy_quant"}, {"max_shard_size": "100KB"}]
)
def test_a_merge_that_changes_nothing_says_so(
    options: dict[str, Any], tmp_path: Path, base: ak.Checkpoint, other: ak.Checkpoint
) -> None:
    def notes(expression: ak.Weights) -> str:
        target = tmp_path / ("out" if "max_shard_size" in options else "out.safetensors")
        if target.is_dir():
            import shutil

            shutil.rmtree(target)
        return " ".join(expression.save(target, **options).notes)

    twin = ak.open(tiny.write(tmp_path / "twin.safetensors", tiny.native(tiny.state(2))))
    same = "nothing changed: every tensor is base's"
    assert same in notes(base + 3 * (twin - base))
    assert "are two of the files the same" in notes(base + 3 * (twin - base))
    assert same in notes(base + 3 * (base - base))
    assert same in notes(base + 1e-12 * (other - base))
    assert same in notes(ak.lerp(base, twin, 0.5))
    assert same in notes(base.protect("all") + (other - base))
    for changed in (
        base + (other - base),
        base + 3 * (other - twin),
        ak.lerp(base, other, 1.0),
        base.protect("all"),
        base,
    ):
        assert "nothing changed" not in notes(changed)
    # One tensor, one bit is enough.
    state = dict(tiny.state(2))
    state["layers.1.ffn_norm2.weight"] = state["layers.1.ffn_norm2.weight"].clone()
    state["layers.1.ffn_norm2.weight"][3] += 1
    nearly = ak.open(tiny.write(tmp_path / "nearly.safetensors", tiny.native(state)))
    assert "nothing changed" not in notes(base + (nearly - base))

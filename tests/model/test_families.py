"""A made-up second family: other names of blocks, grouped queries, nothing fused. Only this table says so."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import alkahest as ak
from alkahest.errors import FileFormatError, MismatchError, UnknownNameError, UnsupportedError
from alkahest.measure.lineage import refiner_check
from alkahest.model import families
from alkahest.model.families.family import Family, Part, Shapes, count_blocks
from alkahest.model.layouts import Fused, Layout

HEADS = {"q": 64, "k": 16, "v": 16}  # rows: four queries share a key


@dataclass(frozen=True)
class Sizes:
    layers: int
    width: int = 64
    text_width: int = 24
    latent_channels: int = 4

    def _block(self) -> dict[str, tuple[int, ...]]:
        block: dict[str, tuple[int, ...]] = {f"mix.to_{x}.weight": (rows, self.width) for x, rows in HEADS.items()}
        return {**block, "mix.scale.weight": (16,), "up.weight": (80, self.width), "down.weight": (self.width, 80)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        ends = {"enter.weight": (self.width, 16), "leave.weight": (16, self.width), "text.weight": (self.width, 24)}
        stacks = {f"reader.blocks.{n}.{name}": shape for n in range(2) for name, shape in self._block().items()}
        stacks |= {f"tower.{n}.{name}": shape for n in range(self.layers) for name, shape in self._block().items()}
        return {key: {**ends, **stacks}[key] for key in TOY.in_model_order({**ends, **stacks})}

    def diffusers_config(self) -> dict[str, Any]:
        return {"_class_name": "Toy", "num_layers": self.layers}

    def guesses(self) -> list[str]:
        return []

    def lacks(self, config: Mapping[str, Any] | None) -> list[str]:
        return []

    def oddities(self) -> list[str]:
        return []


def infer(shapes: Shapes, file: object) -> Sizes:
    found = Sizes(layers=count_blocks(shapes, "tower"))
    for key, shape in found.shapes().items():
        if shapes.get(key) != shape:
            raise FileFormatError("open", "not a toy", file=file, key=key, expected=shape, found=shapes.get(key))
    return found


TOY = Family(
    name="toy",
    title="Toy",
    landmarks=("text.weight", "tower.0.*"),
    parts=(
        Part("ends", ("enter", "text"), "ends"),
        Part("reader", ("reader.blocks",), "reader", is_stack=True),
        Part("tower", ("tower",), "tower", is_stack=True, is_main=True),
        Part("final", ("leave",), "out"),
    ),
    bridge="refiner",
    aliases={"all": ("*",), "refiner": ("reader",)},
    layouts=(
        Layout("diffusers"),
        Layout("native", renamed=(("in.", "enter."), (".mix.w", ".mix.to_"), (".mix.scale.", ".mix.scale."))),
    ),
    default_layout="native",
    quantised=(".mix.to_q.weight", ".up.weight", ".down.weight"),
    quantised_parts=("tower",),
    infer=infer,
    smallest=Sizes(layers=1),
    shift=1.15,
    text_tokens=64,
    kinds=("mix", "up", "down"),
    lora_targets="mix",
)


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, TOY))


def made(seed: int, layers: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {key: 0.1 * torch.randn(shape) for key, shape in Sizes(layers).shapes().items()}


def renamed(values: Mapping[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """Native names, by hand."""
    return {prefix + key.replace("enter.", "in.").replace(".mix.to_", ".mix.w"): value for key, value in values.items()}


@pytest.fixture
def toys(tmp_path: Path) -> dict[str, Any]:
    """Values, and opened files in three forms of the same family."""
    values = {"base": made(1), "bridge": made(2)}
    values["variant"] = {key: value + 0.01 * made(3)[key] for key, value in values["base"].items()}
    save_file(renamed(values["base"]), tmp_path / "base.safetensors")
    save_file(values["variant"], tmp_path / "variant.safetensors")
    save_file(renamed(values["bridge"], "model.diffusion_model."), tmp_path / "bridge.safetensors")
    return {"values": values, **{name: ak.open(tmp_path / f"{name}.safetensors") for name in values}}


def test_files_are_recognised_in_every_layout(toys: dict[str, Any]) -> None:
    assert [toys[name].family for name in ("base", "variant", "bridge")] == [TOY] * 3
    assert [toys[name].layout for name in ("base", "variant", "bridge")] == ["native", "diffusers", "native"]
    assert toys["bridge"].prefix == "model.diffusion_model."
    for name, values in toys["values"].items():
        assert all(torch.equal(toys[name][key], value) for key, value in values.items())
    about = toys["base"].summary()
    assert list(about["parts"]) == ["ends", "reader", "tower", "final"]
    assert (about["layers"], about["width"]) == (3, 64)


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_a_merge_with_the_text_bridge_protected(toys: dict[str, Any], layout: str, tmp_path: Path) -> None:
    merged = toys["bridge"].protect("refiner") + 3 * (toys["variant"] - toys["base"])
    saved = merged.save(tmp_path / "merged", layout=layout, max_shard_size="40KB")
    stored = {name: value for path in saved.files for name, value in load_file(path).items()}
    a, b, c = (toys["values"][name] for name in ("bridge", "base", "variant"))
    expected = {key: a[key] if key.startswith("reader.") else a[key] + 3 * (c[key] - b[key]) for key in a}
    expected = expected if layout == "diffusers" else renamed(expected)
    assert stored.keys() == expected.keys()
    assert all(torch.allclose(stored[name], value, atol=1e-6) for name, value in expected.items())
    assert saved.copied == 12, "the bridge's own text bridge is copied"
    assert ak.open(saved.path).family is TOY


def test_what_is_quantised_is_the_family_s_to_say(toys: dict[str, Any], tmp_path: Path) -> None:
    saved = toys["base"].save(tmp_path / "fp8.safetensors", dtype="comfy_quant")
    again = ak.open(saved.path)
    small = {key for key, form in again.storage.items() if form == "comfy_quant"}
    assert small == {f"tower.{n}.{name}.weight" for n in range(3) for name in ("mix.to_q", "up", "down")}


def test_tables_know_its_parts(toys: dict[str, Any]) -> None:
    delta = toys["variant"] - toys["base"]
    table = ak.delta_table(delta.without("refiner")).set_index("tensor")
    row = table.loc["tower.2.mix.to_k.weight"]
    assert (row.part, row.block, row.module, row["shape"]) == ("tower", 2, "mix.to_k", (16, 64))
    assert table.loc["reader.blocks.1.up.weight", ["part", "block", "module"]].tolist() == ["reader", 1, "up"]
    norms = {
        key: float((toys["values"]["variant"][key] - value).norm()) for key, value in toys["values"]["base"].items()
    }
    assert table.delta_norm["tower.0.up.weight"] == pytest.approx(norms["tower.0.up.weight"], rel=1e-5)
    assert (table.delta_norm[table.part == "reader"] == 0).all()
    check = refiner_check(toys["variant"], toys["base"])
    assert check.refiner == pytest.approx(0.01, rel=0.1)
    assert any(line.startswith("reader by") for line in check.reasons)


@pytest.mark.parametrize("flavour", ["comfyui", "kohya", "peft"])
def test_loras_are_made_and_read(toys: dict[str, Any], flavour: str, tmp_path: Path) -> None:
    delta = toys["variant"] - toys["base"]
    lora = ak.extract_lora(delta, rank=16, min_dim=8, exclude="refiner").save(tmp_path / "lora.safetensors", flavour)
    assert lora.family is TOY
    assert {key.split(".")[0] for key in lora.shapes} == {"enter", "text", "tower", "leave"}
    assert lora.shapes["tower.1.mix.to_v.weight"] == (16, 64)
    table = ak.delta_table(toys["bridge"] + 2 * lora - toys["bridge"]).set_index("tensor")
    expected = 2 * (
        toys["values"]["variant"]["tower.1.mix.to_v.weight"] - toys["values"]["base"]["tower.1.mix.to_v.weight"]
    )
    assert table.delta_norm["tower.1.mix.to_v.weight"] == pytest.approx(float(expected.norm()), rel=1e-2)


def test_families_do_not_mix(toys: dict[str, Any], trio: dict[str, Path]) -> None:
    other = ak.open(trio["base"])
    with pytest.raises(MismatchError, match="different families") as caught:
        toys["base"] - other
    assert "Toy" in str(caught.value.found)
    assert "Z-Image" in str(caught.value.found)
    with pytest.raises(UnknownNameError, match="selects no tensor"):
        toys["base"].protect("noise_refiner")
    assert other.protect("refiner").is_protected("noise_refiner.0.ffn_norm1.weight")


def test_what_is_of_neither_family_is_refused_by_both_names(tmp_path: Path) -> None:
    save_file({"input_blocks.0.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(UnsupportedError, match="not a Z-Image or Toy model"):
        ak.open(tmp_path / "other.safetensors")


def test_rows_of_a_fused_tensor_need_not_be_equal() -> None:
    layout = Layout("fused", fused={".mix.qkv.weight": Fused(tuple(f".mix.to_{x}.weight" for x in "qkv"), (4, 1, 1))})
    assert layout.rows("tower.0.mix.qkv.weight", 96) == (64, 16, 16)
    assert layout.rows("tower.0.mix.qkv.weight", 97) is None
    assert layout.rows("tower.0.up.weight", 80) == (80,)
    keys = layout.canonical("tower.0.mix.qkv.weight")
    assert keys == tuple(f"tower.0.mix.to_{x}.weight" for x in "qkv")
    assert {layout.stored(key) for key in keys} == {"tower.0.mix.qkv.weight"}


def test_the_first_family_still_opens(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "a.safetensors", tiny.native(tiny.state()))
    assert ak.open(path).family.title == "Z-Image"


# Parts of the names of Z-Image's tensors.
TENSORS = re.compile(
    r"noise_refiner|context_refiner|siglip|cap_embedder|x_embedder|t_embedder|pad_token|feed_forward|to_q$|qkv|adaLN"
    r"|norm_final|final_layer|^layers\.\d"
)
# A pattern of ComfyUI's nodes, and the text encoder's own names, of which `layers.0` is no block of Z-Image.
ELSEWHERE = re.compile(r"pad_tokens|layers\.0\.(self_attn|mlp)\..*")


def test_no_other_module_names_a_tensor() -> None:
    package = Path(ak.__file__).parent
    named = []
    for path in package.rglob("*.py"):
        where = path.relative_to(package).as_posix()
        if where.startswith(("model/families/", "mini/", "experiment/growing/")):  # the family that ships is Z-Image's
            continue
        if where in (
            "workflow/community.py",
            "workflow/widgets.py",
            "lora/dropped.py",
        ):  # what other programs call theirs
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and re.fullmatch(r"[\w.*]+", text) and TENSORS.search(text):
                named += [] if ELSEWHERE.fullmatch(text) else [f"{where}:{node.lineno} {text}"]  # type: ignore[attr-defined]
    assert not named

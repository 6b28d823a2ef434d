"""Every kind of adapter that is read, against the library that makes it: PEFT's own merge, LyCORIS' own weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import alkahest as ak
from alkahest.errors import AlgebraError, FileFormatError, MismatchError, UnsupportedError
from alkahest.sources.lora import open_input

TARGETS = r".*(to_q|to_out\.0|feed_forward\.w2|layers\.\d\.adaLN_modulation\.0)"


@pytest.fixture
def base(tmp_path: Path) -> ak.Checkpoint:
    return ak.open(tiny.write(tmp_path / "base.safetensors", tiny.state(seed=1), torch.float32))


def trained(config: Any, seed: int = 3) -> Any:
    """An adapter on the tiny model, with random numbers in place of a training run."""
    model = tiny.model(1)
    made = peft.get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if value.requires_grad:
                size = 0.02 if "oft" in name or "boft_R" in name else 0.1
                value.copy_(torch.randn_like(value) * size + (1.0 if "boft_s" in name or "ia3" in name else 0.0))
                if "magnitude" in name:
                    value.copy_(1 + 0.1 * torch.rand_like(value))
    return made


def check(made: Any, folder: Path, base: ak.Checkpoint, adjust: dict[str, Any] | None = None) -> ak.Weights:
    """PEFT's merge and ours of the saved adapter are the same."""
    made.save_pretrained(folder)
    if adjust:
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(settings | adjust))
    lora = ak.open_lora(folder)
    after = ak.apply_lora(base, lora)
    after.save(folder.parent / "out.safetensors", layout="native", dtype="fp32")
    ours = ak.open(folder.parent / "out.safetensors")
    merged = dict(made.merge_and_unload().state_dict())
    changed = 0
    for key, value in base.items():
        scale = float(merged[key].abs().max())
        assert torch.allclose(ours[key], merged[key], rtol=1e-5, atol=2e-6 * scale), key
        changed += not torch.equal(value, merged[key])
    assert changed >= 6
    return after


NO_START = {"init_weights": False}
CONFIGS = {
    "LoRA": lambda: peft.LoraConfig(r=4, lora_alpha=10, target_modules=TARGETS),
    "LoRA, rank-stabilised": lambda: peft.LoraConfig(r=4, lora_alpha=10, use_rslora=True, target_modules=TARGETS),
    "LoRA, patterns": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=TARGETS,
        rank_pattern={r"layers\.[01]\.attention\.to_q": 6, "w2": 3},
        alpha_pattern={r"layers\.[01]\.attention\.to_q": 5, "attention.to_out.0": 30},
    ),
    "DoRA": lambda: peft.LoraConfig(
        r=4, lora_alpha=10, use_dora=True, target_modules=["to_q", "to_out.0", "feed_forward.w2"]
    ),
    "LoHa": lambda: peft.LoHaConfig(r=4, alpha=16, target_modules=TARGETS, **NO_START),
    "LoKr": lambda: peft.LoKrConfig(r=4, alpha=6, target_modules=TARGETS, decompose_both=True, **NO_START),
    "LoKr, whole": lambda: peft.LoKrConfig(r=64, alpha=16, target_modules=TARGETS, **NO_START),
    "OFT": lambda: peft.OFTConfig(oft_block_size=16, target_modules=TARGETS, **NO_START),
    "OFT, exact": lambda: peft.OFTConfig(
        oft_block_size=32, target_modules=TARGETS, use_cayley_neumann=False, **NO_START
    ),
    "OFT, 3 terms": lambda: peft.OFTConfig(
        oft_block_size=8, target_modules=TARGETS, num_cayley_neumann_terms=3, **NO_START
    ),
    "OFT, one rotation": lambda: peft.OFTConfig(
        oft_block_size=32, block_share=True, target_modules=TARGETS, **NO_START
    ),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=8, target_modules=TARGETS, **NO_START),
    "IA3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=r".*feed_forward\.w2"),
    "modules to save": lambda: peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=TARGETS, modules_to_save=["cap_embedder.1"]
    ),
    "biases": lambda: peft.LoraConfig(r=4, lora_alpha=10, target_modules=TARGETS, bias="lora_only"),
}


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly")
@pytest.mark.parametrize("case", CONFIGS)
def test_peft_merges_to_the_same(case: str, base: ak.Checkpoint, tmp_path: Path) -> None:
    check(trained(CONFIGS[case]()), tmp_path / "adapter", base)


def test_an_adapter_with_saved_modules_is_no_checkpoint(base: ak.Checkpoint, tmp_path: Path) -> None:
    trained(CONFIGS["modules to save"]()).save_pretrained(tmp_path / "adapter")
    found = open_input(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "cap_embedder.1.weight" in found.updates  # type: ignore[union-attr]
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    trained(CONFIGS["LoRA"]()).save_pretrained(tmp_path / "other")
    wrong = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    wrong["modules_to_save"] = settings["modules_to_save"]
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(wrong))
    assert "modules_to_save names cap_embedder.1, and no tensor of the file is stored whole" in repr(
        ak.open_lora(tmp_path / "other")
    )


def test_strength_goes_part_of_the_way(base: ak.Checkpoint, tmp_path: Path) -> None:
    made = trained(CONFIGS["OFT"]())
    whole = check(made, tmp_path / "adapter", base)
    lora = whole.lora  # type: ignore[attr-defined]
    key = "layers.0.attention.to_q.weight"
    found = {}
    for strength in (0.25, 1.0):
        ak.apply_lora(base, lora, strength).save(tmp_path / "s.safetensors", dtype="fp32")
        found[strength] = ak.open(tmp_path / "s.safetensors")[key] - base[key]
    assert torch.allclose(found[0.25], 0.25 * found[1.0], atol=1e-6)
    kept = ak.apply_lora(base.protect("layers.0"), lora)
    assert any("protection leaves out" in note for note in kept.protection_notes())
    with pytest.raises(AlgebraError, match="OFT depends on the weights that it meets"):
        base + lora


def test_another_adapter_s_name_and_a_renamed_file(base: ak.Checkpoint, tmp_path: Path) -> None:
    made = trained(CONFIGS["LoRA"]())
    made.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    right = ak.open_lora(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "style.safetensors")
    renamed = ak.open_lora(tmp_path / "adapter" / "style.safetensors")
    assert renamed.summary()["scales"] == right.summary()["scales"] == [2.5]
    assert "settings are taken from adapter_config.json beside it" in repr(renamed)
    # Among others it may be another's, unless the names are PEFT's.
    bare = {name.removeprefix("base_model.model."): value for name, value in stored.items()}
    save_file(bare, tmp_path / "adapter" / "bare.safetensors")
    other = ak.open_lora(tmp_path / "adapter" / "bare.safetensors")
    assert other.summary()["scales"] == [1.0]
    assert "adapter_config.json beside it is not taken" in repr(other)
    for name in ("default", "my_style"):
        named = {n.replace(".weight", f".{name}.weight"): v for n, v in stored.items()}
        save_file(named, tmp_path / "adapter" / f"{name}.safetensors")
        assert ak.open_lora(tmp_path / "adapter" / f"{name}.safetensors").summary()["scales"] == [2.5]
    both = {n.replace(".weight", f".{name}.weight"): v.clone() for name in ("a", "b") for n, v in stored.items()}
    save_file(both, tmp_path / "both.safetensors")
    with pytest.raises(FileFormatError, match=r"(?s)several adapters.*a, b|mean the same"):
        ak.open_lora(tmp_path / "both.safetensors")


def lycoris(kind: str, name: str, shape: tuple[int, int], **options: Any) -> tuple[dict[str, Any], Any]:
    """One LyCORIS module's tensors under its own names, and the module."""
    from lycoris.modules import boft, diag_oft, locon, loha, lokr

    kinds = {
        "loha": loha.LohaModule,
        "lokr": lokr.LokrModule,
        "locon": locon.LoConModule,
        "diag-oft": diag_oft.DiagOFTModule,
        "boft": boft.ButterflyOFTModule,
    }
    torch.manual_seed(5)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    linear.weight.data.copy_(tiny.state(1)[f"{name}.weight"])
    module = kinds[kind](f"lycoris_{name.replace('.', '_')}", linear, **options)
    with torch.no_grad():
        for label, value in module.named_parameters():
            if "org" not in label:
                value.copy_(
                    torch.randn_like(value) * (0.05 if "oft" in label else 0.3) + (1.0 if "rescale" in label else 0.0)
                )
    state = {f"{module.lora_name}.{n}": v.contiguous() for n, v in module.state_dict().items() if "org" not in n}
    return state, module


LYCORIS = {
    "LoHa": ("loha", {"lora_dim": 4, "alpha": 6}),
    "LoKr": ("lokr", {"lora_dim": 4, "alpha": 6, "factor": 8}),
    "LoKr, whole": ("lokr", {"lora_dim": 10_000, "alpha": 6, "full_matrix": True}),
    "LoRA": ("locon", {"lora_dim": 4, "alpha": 6}),
    "LoRA, a learned scalar": ("locon", {"lora_dim": 4, "alpha": 6, "use_scalar": True}),
    "rank-stabilised": ("locon", {"lora_dim": 4, "alpha": 6, "rs_lora": True}),
    "DoRA by column": ("locon", {"lora_dim": 4, "alpha": 6, "weight_decompose": True}),
    "DoRA by row": ("locon", {"lora_dim": 4, "alpha": 6, "weight_decompose": True, "wd_on_out": True}),
    "OFT": ("diag-oft", {"lora_dim": 8}),
    "OFT, bounded": ("diag-oft", {"lora_dim": 8, "constraint": 0.002}),
    "OFT, rescaled": ("diag-oft", {"lora_dim": 8, "rescaled": True}),
    "BOFT": ("boft", {"lora_dim": 8}),
    "BOFT, rescaled": ("boft", {"lora_dim": 8, "rescaled": True}),
}


@pytest.mark.parametrize("case", LYCORIS)
def test_lycoris_weighs_the_same(case: str, base: ak.Checkpoint, tmp_path: Path) -> None:
    kind, options = LYCORIS[case]
    state, module = lycoris(kind, "layers.1.attention.to_k", (96, 96), **options)
    save_file(state, tmp_path / "l.safetensors")
    ak.apply_lora(base, ak.open_lora(tmp_path / "l.safetensors")).save(tmp_path / "out.safetensors", dtype="fp32")
    found = ak.open(tmp_path / "out.safetensors")["layers.1.attention.to_k.weight"]
    with torch.no_grad():
        right = module.eval()(torch.eye(96)).T  # its forward: get_merged_weight scales LoHa and LoKr twice
    assert not torch.allclose(found, base["layers.1.attention.to_k.weight"], atol=1e-3)
    assert torch.allclose(found, right, atol=3e-6 * float(right.abs().max()))


def test_a_rotation_of_fused_outputs_turns_q_k_and_v_together(base: ak.Checkpoint, tmp_path: Path) -> None:
    torch.manual_seed(2)
    blocks = torch.randn(6, 48, 48) * 0.02  # of 48 rows: they straddle nothing here, and 288 in all
    save_file({"diffusion_model.layers.0.attention.qkv.oft_blocks": blocks}, tmp_path / "l.safetensors")
    ak.apply_lora(base, ak.open_lora(tmp_path / "l.safetensors")).save(tmp_path / "out.safetensors", dtype="fp32")
    found = ak.open(tmp_path / "out.safetensors")
    names = [f"layers.0.attention.to_{x}.weight" for x in "qkv"]
    whole = torch.cat([base[name] for name in names]).double()
    skew = (blocks - blocks.transpose(1, 2)).double()
    one = torch.eye(48).double()
    turn = (one + skew) @ torch.linalg.inv(one - skew)
    right = torch.einsum("knm,knc->kmc", turn, whole.view(6, 48, -1)).flatten(0, 1)
    assert torch.allclose(torch.cat([found[name] for name in names]).double(), right, atol=1e-6)


def test_magnitudes_of_a_fused_weight_s_columns(base: ak.Checkpoint, tmp_path: Path) -> None:
    torch.manual_seed(2)
    up, down, magnitude = torch.randn(288, 4) * 0.1, torch.randn(4, 96) * 0.1, 1 + torch.rand(1, 96)
    module = "diffusion_model.layers.0.attention.qkv"
    state = {f"{module}.lora_B.weight": up, f"{module}.lora_A.weight": down, f"{module}.dora_scale": magnitude}
    save_file(state, tmp_path / "l.safetensors")
    ak.apply_lora(base, ak.open_lora(tmp_path / "l.safetensors"), 0.5).save(tmp_path / "out.safetensors", dtype="fp32")
    found = ak.open(tmp_path / "out.safetensors")
    names = [f"layers.0.attention.to_{x}.weight" for x in "qkv"]
    whole = torch.cat([base[name] for name in names]).double()
    moved = whole + up.double() @ down.double()
    right = whole + 0.5 * (magnitude.double() * moved / moved.norm(dim=0, keepdim=True) - whole)
    assert torch.allclose(torch.cat([found[name] for name in names]).double(), right, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("oft_blocks", torch.randn(5, 16, 16), "do not make up 96 rows"),
        ("oft_R.weight", torch.randn(5, 120), "do not make up 96 columns"),
        ("oft_R.weight", torch.randn(6, 121), "do not make up 96 columns"),
        ("boft_R", torch.randn(1, 5, 16, 16), "do not make up 96 columns"),
        ("ia3_l", torch.randn(95, 1), "factors fit no side"),
    ],
)
def test_adapters_of_another_model(
    name: str, value: torch.Tensor, words: str, base: ak.Checkpoint, tmp_path: Path
) -> None:
    save_file({f"diffusion_model.layers.0.attention.to_q.{name}": value}, tmp_path / "l.safetensors")
    with pytest.raises(MismatchError, match=words):
        ak.apply_lora(base, ak.open_lora(tmp_path / "l.safetensors"))


@pytest.mark.parametrize(
    ("suffix", "words"),
    [
        ("vera_lambda_b", "VeRA"),
        ("a1.weight", "GLoRA"),
        ("up_list.0", "DyLoRA"),
        ("lora_E", "AdaLoRA"),
        ("lora_mid.weight", "a convolution's LoRA"),
        ("on_input", "LyCORIS' IA3"),
    ],
)
def test_other_adapters_are_refused_by_name(suffix: str, words: str, tmp_path: Path) -> None:
    save_file({f"diffusion_model.layers.0.attention.to_q.{suffix}": torch.ones(4, 4)}, tmp_path / "l.safetensors")
    for only in (None, "transformer"):
        with pytest.raises(UnsupportedError, match=f"{words} is not handled"):
            ak.open_lora(tmp_path / "l.safetensors", only=only)

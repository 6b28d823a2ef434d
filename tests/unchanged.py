"""What a change of structure must leave as it is: bytes that are written, numbers that are measured, pictures,
training.

    python tests/unchanged.py            say what differs from tests/unchanged.json
    python tests/unchanged.py --write    fix what is computed now, after a change that was meant

Inputs are made by numpy alone, so that nothing under test decides what it is tested on. ``bytes`` hold on every
machine. ``numbers`` are sums in an order that a processor may choose. ``machine`` is exact, and the same only on the
machine that it was written on: BLAS decides the last bits of a factorisation, a picture, a step of training.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from blake3 import blake3
from safetensors.torch import save_file

import alkahest as ak
from alkahest.measure import pairs, spectrum, table

FIXED = Path(__file__).with_suffix(".json")
CLOSE = 1e-6  # relative
Values = dict[str, Any]


def made(seed: int, share: float = 1.0) -> dict[str, np.ndarray]:
    """Weights of the tiny model by numpy's own generator, around 1 for norms."""
    values = {}
    for number, (name, value) in enumerate(sorted(tiny.state().items())):
        noise = np.random.default_rng([seed, number]).standard_normal(tuple(value.shape), dtype=np.float32)
        values[name] = share * np.float32(0.05) * noise + np.float32("norm" in name and share == 1.0)
    return values


def inputs(folder: Path) -> dict[str, Path]:
    """Files of several forms; the variant is near the base, the bridge is not."""
    base, bridge = made(1), made(2)
    variant = {name: value + made(3, 0.02)[name] for name, value in base.items()}
    other = {name: value + made(4, 0.03)[name] for name, value in base.items()}
    states = {"base": base, "bridge": bridge, "variant": variant, "other": other}
    paths = {}
    for name, values in states.items():
        state = tiny.native({key: torch.from_numpy(value) for key, value in values.items()})
        paths[name] = tiny.write(folder / f"{name}.safetensors", state)
    quantised = tiny.native({key: torch.from_numpy(value) for key, value in variant.items()})
    paths["quantised"] = tiny.write_scaled(folder / "quantised.safetensors", quantised, "comfy_quant")
    whole = {f"model.diffusion_model.{key}": value.bfloat16() for key, value in quantised.items()}
    whole["vae.decoder.weight"] = torch.arange(30, dtype=torch.float32).view(5, 6)
    save_file(whole, folder / "whole.safetensors")
    down, up = np.random.default_rng(5).standard_normal((2, 96, 4), dtype=np.float32)
    module = "lora_unet_layers_1_attention_out"
    factors = {
        f"{module}.lora_down.weight": torch.from_numpy(down.T.copy()),
        f"{module}.lora_up.weight": torch.from_numpy(up),
    }
    save_file({**factors, f"{module}.alpha": torch.tensor(2.0)}, folder / "lora.safetensors")
    return {**paths, "whole": folder / "whole.safetensors", "lora": folder / "lora.safetensors"}


def hashed(path: Path) -> str:
    """Of a file, or of a folder's files and their names."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digest = blake3()
    for file in filter(Path.is_file, files):
        digest.update(file.name.encode() * path.is_dir() + file.read_bytes())
    return digest.hexdigest()


def written(folder: Path) -> Values:
    """Outputs in every form, and the texts that go with them."""
    paths = inputs(folder)
    base, bridge, variant, other = (ak.open(paths[name]) for name in ("base", "bridge", "variant", "other"))
    delta, second = variant - base, other - base
    kept = bridge.protect("refiner")
    lora = ak.open_lora(paths["lora"])
    quantised, whole = ak.open(paths["quantised"]), ak.open(paths["whole"])
    saves: dict[str, tuple[Any, dict[str, Any]]] = {
        "bf16, protected": (kept + 171.1 * delta, {}),
        "lerp and dare, comfy_quant": (
            ak.lerp(kept, base + ak.dare(delta, drop=0.3, seed=3), 0.3),
            {"dtype": "comfy_quant"},
        ),
        "fp8, shards": (
            kept + delta.scaled({"layers": 3, "layers.1": 5.5}),
            {"dtype": "fp8_e4m3fn", "max_shard_size": "300KB"},
        ),
        "diffusers, shards": (
            bridge + 4 * delta.only("feed_forward"),
            {"layout": "diffusers", "max_shard_size": "600KB"},
        ),
        "diffusers, fp16": (bridge - 0.25 * delta, {"layout": "diffusers", "dtype": "fp16"}),
        "stochastic": (kept + 0.37 * delta, {"rounding": "stochastic", "seed": 11}),
        "comfy_compatible": (ak.lerp(bridge + 17.11 * delta, base, 0.3), {"comfy_compatible": True}),
        "fp32, methods": (base + ak.ties([delta, second], density=0.4) + ak.della(second, seed=2), {"dtype": "fp32"}),
        "models": (
            ak.train_difference(ak.slerp(base, other, t=0.3), variant, base, alpha=0.7) - ak.sce([delta, second]),
            {},
        ),
        "weighted sum, scaled_fp8": (
            ak.weighted_sum([bridge, variant, other], [0.5, 0.2, 0.3]),
            {"dtype": "scaled_fp8"},
        ),
        "from fp8, e5m2": (quantised + 2 * second.without("embedders"), {"dtype": "fp8_e5m2"}),
        "as stored, comfy_quant": (quantised.protect("layers.0") + delta, {}),
        "all-in-one": (whole.protect("refiner") + 3 * delta.everywhere(), {"metadata": {"title": "a whole one"}}),
        "with a LoRA": (kept + 0.5 * lora + delta / 3, {}),
        "made up": (
            ak.made_up(layers=1, width=96)
            + 2 * (ak.made_up(layers=1, width=96, delta=0.1) - ak.made_up(layers=1, width=96)),
            {},
        ),
    }
    found: Values = {}
    for name, (expression, options) in saves.items():
        single = not ("max_shard_size" in options or options.get("layout") == "diffusers")
        target = folder / ("saved.safetensors" if single else "saved")
        result = expression.save(target, **options)
        found[name] = hashed(target)
        found[f"{name}: counts"] = [result.computed, result.copied, result.restored, result.notes, len(result.files)]
        found[f"{name}: recipe"] = result.recipe
        if name == "bf16, protected":
            found["recipe in the file"] = ak.read_recipe(target)[1].to_json()
            found["repr of the file"] = repr(ak.open(target, name="it")).replace(str(folder), "")
        if single:
            target.unlink()
        else:
            for file in target.iterdir():
                file.unlink()
            target.rmdir()
    found["workflow: notes"] = ak.write_workflow(kept + 171.1 * delta, folder / "graph.json", form="api")
    found["workflow"] = hashed(folder / "graph.json")
    ak.convert_lora(lora, folder / "converted.safetensors")
    found["converted LoRA"] = hashed(folder / "converted.safetensors")
    return found


def measured(folder: Path) -> Values:
    """Tables as the sums of their columns, multipliers, verdicts."""
    paths = inputs(folder)
    base, bridge, variant, other = (ak.open(paths[name]) for name in ("base", "bridge", "variant", "other"))
    delta, second = variant - base, other - base
    tables = {
        "delta_table": ak.delta_table(delta),
        "delta_table, scaled": ak.delta_table(3 * delta.without("refiner") + second),
        "rolled up": ak.rolled_up(ak.delta_table(delta)).reset_index(),
        "spectra": ak.delta_spectra(delta, values=4),
        "compare": ak.compare({"one": delta, "two": second}, rank=4),
        "absorbed": ak.absorbed(ak.delta_table(delta, on=bridge, k=0.1)),
        "rounding_curve": ak.rounding_curve(ak.delta_table(delta, on=bridge), ks=[0.1, 1.0, 10.0]),
    }
    found: Values = {}
    for name, one in tables.items():
        numbers = one.select_dtypes("number")
        found[name] = {"rows": len(one), "columns": list(map(str, one.columns))}
        found[name]["sums"] = {str(column): float(values.astype(float).sum()) for column, values in numbers.items()}
    for basis in ("relative", "survival", "reference", "bridge"):
        more = {"reference": second} if basis == "reference" else {}
        k = ak.needed_multiplier(delta, on=bridge.protect("refiner"), basis=basis, **more)
        found[f"multiplier, {basis}"] = [k.value, list(k.factors), k.per_part.select_dtypes("number").sum().to_dict()]
    check = ak.refiner_check(variant, base)
    found["refiner_check"] = [check.verdict, check.refiner, check.layers]
    found["formats"] = {kind.operation: kind.number for kind in (table.KIND, spectrum.KIND, pairs.KIND)}
    found["nearest_base"] = ak.nearest_base(variant, {"base": base, "bridge": bridge}).name
    return found


def computed(folder: Path) -> Values:
    """What goes through BLAS: factorised, drawn, trained."""
    paths = inputs(folder)
    delta = ak.open(paths["variant"]) - ak.open(paths["base"])
    found: Values = {}
    for name, options in {"energy": {"energy": 0.9}, "rank": {"rank": 3, "exclude": "refiner"}}.items():
        ak.extract_lora(delta, **options).save(folder / "extracted.safetensors")
        found[f"extract_lora, {name}"] = hashed(folder / "extracted.safetensors")
    pictures = ak.sample(ak.pipeline(ak.mini.load("tb1")), ["a red ball", "a man at night"], steps=4, cfg=2.5, seed=3)
    found["pictures"] = [blake3(np.asarray(picture).tobytes()).hexdigest() for picture in pictures.images]
    run = folder / "run.toml"
    run.write_text(_RUN)
    result = ak.finetune(ak.read_config(run), folder / "run")
    found["training"] = hashed(Path(result.weights.save(folder / "trained.safetensors").path))
    found["training: loss"] = result.history["loss"].dropna().tolist()
    return found


_RUN = """
start = "lerp(deturbo, base, 0.3)"
save_every = 3
measure_every = 2
held_out = 4
ema = 0.7
[inputs]
deturbo = "mini:deturbo"
base = "mini:base"
[data.people]
scenes = { count = 30, seed = 1, subject = ["man", "woman"] }
[[stage]]
name = "one"
mix = { people = 1.0 }
steps = 4
lr = 1e-3
batch = 4
resolution = 64
"""
KINDS: dict[str, Callable[[Path], Values]] = {"bytes": written, "numbers": measured, "machine": computed}


def now(kind: str) -> Values:
    """The values of one kind, as they are computed now, through JSON."""
    with tempfile.TemporaryDirectory() as folder:
        found: Values = json.loads(json.dumps(KINDS[kind](Path(folder))))
        return found


def differences(fixed: Any, found: Any, where: str = "", close: float = 0.0) -> list[str]:
    """What differs, by name; floats may by ``close`` of their size."""
    if isinstance(fixed, dict) and isinstance(found, dict):
        names = [*fixed, *(name for name in found if name not in fixed)]
        return [line for n in names for line in differences(fixed.get(n), found.get(n), f"{where}/{n}", close)]
    if isinstance(fixed, list) and isinstance(found, list) and len(fixed) == len(found):
        pairs = enumerate(zip(fixed, found, strict=True))
        return [line for n, (a, b) in pairs for line in differences(a, b, f"{where}[{n}]", close)]
    both = isinstance(fixed, float) and isinstance(found, (int, float))
    if fixed == found or (both and math.isclose(fixed, found, rel_tol=close, abs_tol=close * 1e-3)):
        return []
    return [f"{where}: {str(fixed)[:90]} is now {str(found)[:90]}"]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--write", action="store_true")
    asked.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    given = asked.parse_args()
    torch.set_num_threads(1)
    fixed = json.loads(FIXED.read_text()) if FIXED.exists() else {}
    found = {kind: now(kind) for kind in given.kinds}
    if given.write:
        moved = differences(fixed.get("numbers"), found.get("numbers", fixed.get("numbers")), close=CLOSE)
        if moved and not any("/formats" in line for line in moved):
            sys.exit("\n".join([*moved, "tables remember what other code gave: raise the number of their Kind first"]))
        FIXED.write_text(json.dumps({**fixed, **found}, indent=1) + "\n")
        return
    lines = [line for kind in given.kinds for line in differences(fixed[kind], found[kind], kind)]
    print("\n".join(lines) or "nothing has changed")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()

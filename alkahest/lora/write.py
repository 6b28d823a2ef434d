"""Write a LoRA: by default under the names that ComfyUI and diffusers both load in full, or as another program has
them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from alkahest.errors import NonFiniteError, OutputError, UnsupportedError, refuse_unknown_options, unknown
from alkahest.files.header import Entry, build_header
from alkahest.files.paths import expanded
from alkahest.files.reader import same_file
from alkahest.files.whole import as_output_error, whole_file
from alkahest.model.dtypes import BY_TAG, FORMATS
from alkahest.model.families import Family
from alkahest.sources.factors import NAMES, Update
from alkahest.sources.lora import Lora, open_lora
from alkahest.sources.lora_settings import ADAPTER

# Name -> (prefix, fused qkv and ComfyUI's names, underscores, names of the halves), in the order down, up.
_PEFT, _KOHYA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
FLAVOURS = {
    "comfyui": ("diffusion_model.", False, False, _PEFT),
    "diffusers": ("transformer.", False, False, _PEFT),
    "peft": ("base_model.model.", False, False, _PEFT),
    "kohya": ("lora_unet_", True, True, _KOHYA),
    "kohya-split": ("lora_unet_", False, True, _KOHYA),
    "fused": ("diffusion_model.", True, False, _PEFT),
}
_TAGS = {form.torch: form.tag for form in FORMATS.values()}


@dataclass(frozen=True)
class Pair:
    """``scale * up @ down``: (rows, rank) and (rank, columns)."""

    up: Tensor
    down: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def fold(self) -> Pair:
        """The same with a scale of 1: exact where the scale is a power of two, else rounded once.

        Powers of two go to one factor, or to both where one would leave its format's range; factors whose format
        cannot hold the result become wider.
        """
        if self.scale == 1.0:
            return self
        if self.scale == 0.0:
            return Pair(torch.zeros_like(self.up), self.down)
        mantissa, exponent = math.frexp(self.scale)
        mantissa, exponent = 2 * mantissa, exponent - 1  # 1 <= |mantissa| < 2
        balance = round((_exponent(self.down) + exponent - _exponent(self.up)) / 2)
        for dtype in dict.fromkeys((self.up.dtype, torch.bfloat16, torch.float32)):
            if dtype.itemsize < self.up.dtype.itemsize:
                continue
            for share in (exponent, balance):
                up, lost = _rounded(self.up, math.ldexp(mantissa, share), dtype)
                down, also = _rounded(self.down, math.ldexp(1.0, exponent - share), dtype)
                if max(lost, also) <= (0.0 if abs(mantissa) == 1.0 else _ROUNDED.get(dtype, 0.0)):
                    return Pair(up, down)
        return Pair(up, down)  # in fp32: checked when it is written


# The relative error (L2) that one rounding to a format costs at most; a narrower format's is too much.
_ROUNDED = {torch.float16: 3e-4, torch.bfloat16: 2e-3, torch.float32: 1e-6}


def _exponent(values: Tensor) -> int:
    """Of the largest magnitude, in powers of two."""
    return math.frexp(float(values.float().abs().max()))[1] if values.numel() else 0


def _rounded(values: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Values times a factor in a format, and the relative error that this costs; infinite for an overflow."""
    exact = values.double() * factor
    found = exact.to(dtype)
    length = float(exact.norm())
    error = float((found.double() - exact).norm()) / length if length else 0.0
    return found, error if math.isfinite(error) else math.inf


def save_lora(
    path: str | os.PathLike[str],
    pairs: Mapping[str, Pair],
    full: Mapping[str, Tensor],
    flavour: str = "comfyui",
    metadata: Mapping[str, str] | None = None,
    *,
    family: Family,
) -> Path:
    """Write pairs, and differences that are stored whole, by canonical name; `FLAVOURS` are the names to choose from.

    Scales become an alpha, or are folded in where a program would refuse it. Raises UnsupportedError for full
    differences in flavours that no program loads them in, OutputError as `save` does.
    """
    target = check_target(path, flavour, bool(full))
    tensors = dict(named_tensors(pairs, full, flavour, family))
    for name, tensor in tensors.items():
        if bad := int((~torch.isfinite(tensor.float())).sum()):
            raise NonFiniteError(
                "save",
                "the LoRA holds NaN or infinity",
                file=target,
                key=name,
                found=f"{bad:,} of them",
                fix="dtype='fp32'",
            )
    header = build_header(
        ((name, _TAGS[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()),
        {"format": "pt", **(metadata or {})},
    )
    with (
        whole_file(target, len(header) + sum(tensor.nbytes for tensor in tensors.values())) as writer,
        as_output_error(target),
    ):
        writer.write(header, 0)
        place = len(header)
        for tensor in tensors.values():
            writer.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, place)
            place += tensor.nbytes
    return target


def check_target(path: str | os.PathLike[str], flavour: str, full: bool = False, inputs: Iterable[Path] = ()) -> Path:
    """Where a LoRA goes; refused before anything is computed if it cannot be written there, or so."""
    if flavour not in FLAVOURS:
        raise unknown("save", "unknown flavour of LoRA", flavour, FLAVOURS)
    if full and flavour in ("diffusers", "peft"):
        raise UnsupportedError(
            "save",
            "full differences load in ComfyUI only",
            found=f"flavour {flavour!r}",
            fix="flavour='comfyui', or leave them out",
        )
    target = expanded(path, "save")
    if target.suffix.lower() != ".safetensors":
        raise OutputError(
            "save", "a LoRA is one .safetensors file", file=target, fix="name it like supplement.safetensors"
        )
    if not Path(os.path.realpath(target)).parent.is_dir():
        raise OutputError("save", "the output folder does not exist", file=target.parent, fix="create it first")
    if same := next((one for one in inputs if same_file(one, target)), None):
        raise OutputError(
            "save",
            "the output is one of the inputs",
            file=target,
            found=f"the same file as {same}",
            fix="save under another name",
        )
    return target


def named_tensors(
    pairs: Mapping[str, Pair], full: Mapping[str, Tensor], flavour: str, family: Family
) -> Iterator[tuple[str, Tensor]]:
    """Stored names and tensors of a LoRA in some program's flavour."""
    prefix, fused, flat, (down, up) = FLAVOURS[flavour]
    thin, whole = _groups(pairs, fused, family), _groups(full, fused, family)
    if both := sorted(thin.keys() & whole.keys()) if fused else []:
        raise UnsupportedError(
            "save", "of q, k and v some are stored whole, so they cannot be fused", key=both[0], fix="flavour='comfyui'"
        )
    for name, keys in thin.items():
        stored = prefix + _module(name, flat)
        pair = _fuse(name, [pairs.get(key) for key in keys]) if len(keys) > 1 else pairs[keys[0]]
        if flavour in ("diffusers", "peft"):
            # On seeing an alpha the one doubles its prefix; the other keeps alphas elsewhere.
            pair = pair.fold()
        yield f"{stored}.{down}", pair.down
        yield f"{stored}.{up}", pair.up
        if flat or pair.scale != 1.0:
            yield f"{stored}.alpha", torch.tensor(pair.scale * pair.rank, dtype=torch.float32)
    for name, keys in whole.items():
        there = next(full[key] for key in keys if key in full)
        tensor = torch.cat([full.get(key, torch.zeros_like(there)) for key in keys])
        yield f"{prefix}{_module(name, flat)}.{'diff_b' if name.endswith('.bias') else 'diff'}", tensor


def _groups(keys: Iterable[str], fused: bool, family: Family) -> dict[str, tuple[str, ...]]:
    """Name in the file's layout -> the canonical names that it stands for, in row order."""
    ordered = family.in_model_order(keys)
    if not fused:
        return {key: (key,) for key in ordered}
    layout = family.layout(family.default_layout)
    return {name: layout.canonical(name) for name in map(layout.stored, ordered)}


def _module(name: str, flat: bool) -> str:
    module = name.removesuffix(".bias").removesuffix(".weight")
    return module.replace(".", "_") if flat else module


def _require_one_width(name: str, members: list[Pair | None]) -> None:
    """Raise UnsupportedError for parts of a fused weight that do not read the same inputs."""
    widths = dict.fromkeys(pair.down.shape[1] for pair in members if pair is not None)
    heights = dict.fromkeys(pair.up.shape[0] for pair in members if pair is not None)
    if len(widths) > 1 or (len(heights) > 1 and None in members):
        raise UnsupportedError(
            "save",
            "parts that differ in shape cannot be fused",
            key=name,
            found=", ".join(f"{pair.up.shape[0]} x {pair.down.shape[1]}" for pair in members if pair is not None),
            fix="flavour='comfyui', whose q, k and v stand apart",
        )


def _fuse(name: str, members: list[Pair | None]) -> Pair:
    """q, k and v as one: the same down if they share it, as halves of a fused LoRA do, else block-diagonal."""
    _require_one_width(name, members)
    there = [pair for pair in members if pair is not None]
    first = there[0]
    # An alpha is a float32: scales that are meant to agree do so to 1e-7.
    alike = all(math.isclose(pair.scale, first.scale, rel_tol=1e-6) for pair in there)
    if alike and len(there) == len(members) and all(torch.equal(pair.down, first.down) for pair in there):
        return Pair(torch.cat([pair.up for pair in there]), first.down, first.scale)
    # A scale that they share stays: rank three times as large makes the alpha so, as musubi's converter has it.
    parts = members if alike else [pair and pair.fold() for pair in members]
    nothing = first.up.new_zeros(first.up.shape[0], 0)
    up: Tensor = torch.block_diag(  # type: ignore[no-untyped-call]
        *(nothing if pair is None else pair.up for pair in parts)
    )
    return Pair(up, torch.cat([pair.down for pair in parts if pair is not None]), first.scale if alike else 1.0)


@refuse_unknown_options
def convert_lora(lora: Lora, path: str | os.PathLike[str], flavour: str = "comfyui") -> Lora:
    """Write the same LoRA for another program, and open it.

    Numbers stay as they are, so there and back again gives the same tensors; only ``diffusers`` and ``peft``, which
    take no alpha, have it folded in with one rounding. LoHa and LoKr become LoRAs in float32, exactly if their factors
    are 16 bits wide.

    Parameters
    ----------
    lora : Lora
        Of `open_lora`.
    path : str or path
        The file.
    flavour : str, default "comfyui"
        One of `alkahest.lora.write.FLAVOURS`.

    Returns
    -------
    Lora
        The new file.

    Raises
    ------
    UnsupportedError
        For a DoRA, and for a LoKr that is no smaller as a LoRA.
    UnknownNameError
        For another flavour.

    Examples
    --------
    >>> made = ak.extract_lora(variant - base, rank=4).save("comfyui.safetensors")
    >>> lora = ak.convert_lora(ak.open_lora("comfyui.safetensors"), "peft.safetensors", "peft")
    """
    if lora.needs_weights:
        raise UnsupportedError(
            "convert_lora",
            f"a {lora.dependent_kinds} cannot be converted",
            file=lora.path,
            fix="apply it, and extract what it changed: ak.extract_lora(ak.apply_lora(w, lora) - w)",
        )
    has_full = any(one.kind == "diff" for u in lora.updates.values() for one in (u, u.also) if one is not None)
    target = check_target(path, flavour, has_full, [reader.path for reader in lora.files])
    pairs, full = {}, {}
    for key, update in lora.updates.items():
        for one in (update, update.also):
            if one is not None and one.kind == "diff":
                full[key] = _whole(lora, one)
            elif one is not None:
                pairs[key] = _pair(lora, key, one)
    metadata = {name: text for name, text in lora.metadata.items() if name != ADAPTER}
    return open_lora(save_lora(target, pairs, full, flavour, metadata, family=lora.family))


def _pair(lora: Lora, key: str, update: Update) -> Pair:
    rows, columns = update.shape[0], update.shape[-1]
    if update.kind != "lora" and (update.rank or 0) * (rows + columns) > rows * columns:
        raise UnsupportedError(
            "convert_lora",
            f"this {NAMES[update.kind]} would be larger than the weight itself as a LoRA",
            file=lora.path,
            key=key,
            found=f"rank {update.rank}",
            fix="choose a rank: ak.extract_lora(lora, energy=0.995)",
        )
    up, down = update.halves(lambda role: lora.factor(update, role))
    # Split from a fused file, q takes only some of the directions; k and v take the others.
    used = up.any(0)
    if update.kind == "lora" and rows < update.entries["up"].shape[0] and used.any():
        up, down = up[:, used], down[used]
    dtype = _dtype_of(update.entries["up"]) if update.kind == "lora" else torch.float32
    return Pair(up.to(dtype).contiguous(), down.to(dtype).contiguous(), update.scale)


def _whole(lora: Lora, update: Update) -> Tensor:
    role = "diff" if "diff" in update.entries else "bias"
    values = lora.factor(update, role)[update.first_row : update.first_row + update.shape[0]]
    return values.to(_dtype_of(update.entries[role])).view(update.shape)


def _dtype_of(entry: Entry) -> torch.dtype:
    """The dtype that a factor keeps; fp64 is read and rounded once, never written."""
    found = BY_TAG[entry.dtype].torch
    return torch.float32 if found == torch.float64 else found

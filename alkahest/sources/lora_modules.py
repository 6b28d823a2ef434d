"""From a LoRA file's names to updates: which tensors belong together, what they change, at which scale."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from alkahest.errors import AlkahestError, FileFormatError, UnknownNameError, UnsupportedError
from alkahest.files.header import Entry
from alkahest.files.shards import Located
from alkahest.model.dtypes import BY_TAG, decode
from alkahest.model.families import Family
from alkahest.sources.factors import NAMES, Update, ranks_of, shape_of
from alkahest.sources.lora_names import ONLY, Name, parse_name
from alkahest.sources.lora_settings import Settings

_NUMBERS = {"I64": torch.int64, "I32": torch.int32}  # that an alpha may be besides
_BESIDE = ("alpha", "scalar", "reshape")  # roles that change no weight by themselves
_FACTORED = ("lora", "hada", "lokr")


@dataclass
class Found:
    """What a file holds: updates by canonical name, each name's copies in the file's order, and the rest."""

    updates: dict[str, list[Update]] = field(default_factory=dict)
    flavours: Counter[str] = field(default_factory=Counter)
    modules: list[str] = field(default_factory=list)
    left: dict[str, list[str]] = field(default_factory=dict)  # why -> names that are of other models
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Module:
    """The tensors of one module, by the part that each plays."""

    keys: tuple[str, ...]
    module: str
    names: Mapping[str, str]
    entries: Mapping[str, Entry]
    kinds: tuple[str, ...]


def find_updates(located: Located, family: Family, settings: Settings, only: str | None) -> Found:
    """What the tensors of a LoRA change. With ``only``, what is of other models is left out and told in ``left``."""
    found = Found()
    groups: dict[tuple[str, bool], dict[str, tuple[str, Name]]] = {}
    adapters: set[str] = set()
    own = 0
    for stored in located.tensors:
        try:
            name = _parse_name(stored, family, located)
        except (UnknownNameError, UnsupportedError) as error:
            if only is None or "is not handled" in error.problem:
                raise
            found.left.setdefault(_why(error), []).append(stored)
            continue
        if name.role == "own":
            if not stored.endswith(".bias") or settings.given.get("bias") in (None, "none"):
                own += 1
                continue
            biases = tuple(key.removesuffix(".weight") + ".bias" for key in name.keys)  # these were trained
            name = replace(name, role="whole_bias", kind="whole", keys=biases)
        adapters |= {name.adapter} if name.adapter else set()
        group = groups.setdefault((name.copy, name.role in ("bias", "whole_bias")), {})
        if name.role in group:
            raise twice(name.keys[0], group[name.role][0], stored, located)
        group[name.role] = (stored, name)
    if len(adapters) > 1:
        raise FileFormatError(
            "open_lora",
            "the file holds several adapters",
            file=located.path,
            found=", ".join(sorted(adapters)),
            fix="save each into a file of its own",
        )
    if own:
        found.notes.append(f"{own} tensors are the model's own weights, as PEFT keeps them: left out")
    for group in groups.values():
        _take(group, located, family, settings, found, only)
    found.notes += settings.unmatched(found.modules)
    saved = settings.given.get("modules_to_save")
    if saved and not any(update.kind == "whole" for some in found.updates.values() for update in some):
        named = ", ".join(map(str, saved)) if isinstance(saved, list) else str(saved)
        found.notes.append(f"modules_to_save names {named[:80]}, and no tensor of the file is stored whole")
    return found


def twice(key: str, first: str, second: str, located: Located) -> FileFormatError:
    """The error for two tensors that say different things about one weight."""
    return FileFormatError(
        "open_lora",
        "two tensors of the file mean the same thing",
        file=located.path,
        key=key,
        found=f"{first} and {second}",
        fix="two LoRAs were put into one file; add them up instead: a + b",
    )


def _take(
    group: Mapping[str, tuple[str, Name]],
    located: Located,
    family: Family,
    settings: Settings,
    found: Found,
    only: str | None,
) -> None:
    """Add the updates of one module to what was found."""
    names = {role: stored for role, (stored, _) in group.items()}
    first = next(name for _, name in group.values())
    if set(names) <= set(_BESIDE):
        if only is None:
            raise FileFormatError(
                "open_lora",
                f"{_article(names)} without its LoRA",
                file=located.path,
                key=", ".join(names.values()),
                fix=f"the file is damaged or was put together wrongly; get it again, or {ONLY}",
            )
        found.left.setdefault("without their LoRA", []).extend(names.values())
        return
    entries = {role: located.tensors[stored][1] for role, stored in names.items()}
    kinds = tuple(sorted({name.kind for _, name in group.values()} - {""}))
    module = _Module(first.keys, first.module, names, entries, kinds)
    _require_numbers(module, located)
    found.flavours.update({first.flavour})
    found.modules.append(first.module)
    for key, update in _updates_of(module, located, family, settings):
        found.updates.setdefault(key, []).append(update)


def _updates_of(module: _Module, located: Located, family: Family, settings: Settings) -> Iterator[tuple[str, Update]]:
    plain = [kind for kind in module.kinds if kind != "diff"]
    if not module.kinds or len(plain) > 1 or (plain and "diff" in module.kinds and plain[0] not in _FACTORED):
        raise FileFormatError(
            "open_lora",
            "a module has two kinds of update" if module.kinds else f"{_article(module.names)} without its LoRA",
            file=located.path,
            key=", ".join(module.names.values()),
            found=" and ".join(NAMES[kind] for kind in module.kinds) or None,
            fix="the file is damaged or was put together wrongly; get it again",
        )
    _require_settings(module, plain, located, settings)
    ordered = [*plain, *(kind for kind in module.kinds if kind == "diff")]
    made = [_whole_update(kind, module, located, settings) for kind in ordered]
    first = made[0] if len(made) == 1 else replace(made[0], also=made[1])
    if len(made) > 1 and made[0].shape != made[1].shape:
        raise FileFormatError(
            "open_lora",
            "a LoRA and a difference on one weight differ in shape",
            file=located.path,
            key=module.names["diff"],
            expected=made[0].shape,
            found=made[1].shape,
            fix="get the file again",
        )
    yield from _cut(first, module, located, family)


def _whole_update(kind: str, module: _Module, located: Located, settings: Settings) -> Update:
    """One kind of update of a module, of all the weights that it is for together."""
    shape = shape_of(kind, module.entries, module.names, located.path)
    scale = _scale(kind, module, located, settings)
    dora = "magnitude" in module.entries and kind in _FACTORED
    _require_shape(module, shape, located)
    given = tuple(sorted((str(k), v) for k, v in settings.given.items() if isinstance(v, (bool, int, float))))
    return Update(kind, module.entries, module.names, shape, scale, 0, dora, given=given)


def _cut(update: Update, module: _Module, located: Located, family: Family) -> Iterator[tuple[str, Update]]:
    """An update of a fused weight, as one for each of its parts."""
    if update.shape == ():  # a stretch of rows or columns: the weight says how many
        yield from ((key, replace(update, fused=module.keys)) for key in module.keys)
        if update.kind == "ia3" and update.entries["ia3"].shape[0] > 1:  # outputs are stretched, biases with them
            biases = [key.removesuffix(".weight") + ".bias" for key in module.keys]
            yield from ((key, replace(update, fused=(key,))) for key in biases if family.has(key))
        return
    rows, *rest = update.shape
    heights = family.rows(module.keys, rows)
    if heights is None and len(module.keys) > 1 and rows % len(module.keys) == 0:
        heights = (rows // len(module.keys),) * len(module.keys)
    if heights is None:
        raise FileFormatError(
            "open_lora",
            "a fused qkv whose rows cannot be split into its parts",
            file=located.path,
            key=next(iter(module.names.values())),
            found=f"{rows} rows",
            fix="the file is damaged; get it again",
        )
    first = 0
    for key, height in zip(module.keys, heights, strict=True):
        shape = (height, *rest)
        also = None if update.also is None else replace(update.also, shape=shape, first_row=first)
        yield key, replace(update, shape=shape, first_row=first, also=also, fused=module.keys)
        first += height


def _scale(kind: str, module: _Module, located: Located, settings: Settings) -> float:
    """What the factors' product is multiplied with: alpha / rank, of the file's tensors or of its settings."""
    if kind == "oft" and "alpha" in module.entries:  # LyCORIS' bound of the rotation
        return _number("alpha", module, located)
    if kind not in _FACTORED:
        return 0.0 if kind == "oft" else 1.0
    ranks = ranks_of(kind, module.entries)
    scalar = _number("scalar", module, located) if "scalar" in module.entries else 1.0
    if "alpha" in module.entries:
        # A LoKr of two whole factors has no rank, and its alpha means nothing: ai-toolkit writes infinity in fp16.
        return scalar * (_number("alpha", module, located) / ranks[-1] if ranks else 1.0)
    alpha, rank = settings.alpha_for(module.module), settings.rank_for(module.module)
    if ranks and rank is not None and kind != "lokr" and rank != ranks[-1]:
        raise FileFormatError(
            "open_lora",
            "the settings give another rank than the factors have",
            file=located.path,
            key=next(iter(module.names.values())),
            expected=f"{rank:g}",
            found=ranks[-1],
            fix="the settings are another file's; open the LoRA from its own folder",
        )
    rank = rank or (ranks[-1] if ranks else None)
    if alpha is None and settings.rslora:
        raise FileFormatError(
            "open_lora", "the settings scale by alpha / sqrt(r), and have no lora_alpha", file=located.path
        )
    if alpha is None or rank is None:
        return scalar
    return scalar * alpha / (math.sqrt(rank) if settings.rslora and kind == "lora" else rank)


def _number(role: str, module: _Module, located: Located) -> float:
    """An alpha or a scalar; FileFormatError if it is not one finite number."""
    entry, stored = module.entries[role], module.names[role]
    if math.prod(entry.shape) != 1:
        raise FileFormatError(
            "open_lora", f"{role} must be one number", file=located.path, key=stored, found=f"shape {entry.shape}"
        )
    value = float(read_values(located, stored)[0])
    if not math.isfinite(value):
        raise FileFormatError("open_lora", f"{role} is not a finite number", file=located.path, key=stored, found=value)
    return value


def read_values(located: Located, stored: str) -> torch.Tensor:
    """A small tensor's numbers, flat, float64."""
    reader, entry = located.tensors[stored]
    raw = torch.empty(entry.nbytes, dtype=torch.uint8)
    reader.read_into(raw.numpy().data, entry.offset)
    if entry.dtype in _NUMBERS:
        return raw.view(_NUMBERS[entry.dtype]).double()
    if entry.dtype == "F64":
        return raw.view(torch.float64)
    values = torch.empty(math.prod(entry.shape))
    decode(raw, BY_TAG[entry.dtype], values)
    return values.double()


def _require_settings(module: _Module, plain: list[str], located: Located, settings: Settings) -> None:
    """Refuse factors that the settings contradict."""
    kind = plain[0].removeprefix("peft_") if plain else None
    name = next(iter(module.names.values()))
    if settings.kind is not None and kind in NAMES and kind not in (settings.kind, "whole", "diff"):
        raise FileFormatError(
            "open_lora",
            "the settings are of another kind of adapter",
            file=located.path,
            key=name,
            expected=NAMES[settings.kind],
            found=NAMES[kind],
            fix="the settings are another file's; open the adapter from its own folder",
        )
    if kind == "lora" and settings.dora is not None and settings.dora != ("magnitude" in module.entries):
        raise FileFormatError(
            "open_lora",
            "the settings and the tensors disagree on whether this is a DoRA",
            file=located.path,
            key=name,
            expected=f"use_dora: {settings.dora}",
            found="magnitudes" if "magnitude" in module.entries else "no magnitudes",
            fix="the file is incomplete, or its settings are another's; get both again",
        )


def _require_numbers(module: _Module, located: Located) -> None:
    for role, entry in module.entries.items():
        if entry.dtype not in BY_TAG and not (role in _BESIDE and entry.dtype in _NUMBERS):
            raise UnsupportedError(
                "open_lora",
                "this number format is not handled",
                file=located.path,
                key=module.names[role],
                expected=", ".join(BY_TAG),
                found=entry.dtype,
            )


def _require_shape(module: _Module, shape: tuple[int, ...], located: Located) -> None:
    """Refuse a change of shape that is more than the weight's own."""
    if "reshape" not in module.entries:
        return
    wanted = tuple(int(n) for n in read_values(located, module.names["reshape"]).tolist())
    if wanted != shape:
        raise UnsupportedError(
            "open_lora",
            "a change of shape is not handled",
            file=located.path,
            key=module.names["reshape"],
            expected=shape,
            found=wanted,
        )


def _article(names: Mapping[str, str]) -> str:
    role = next(iter(names))
    return f"{'an' if role[0] in 'aeiou' else 'a'} {role}"


def _why(error: AlkahestError) -> str:
    return "for a text encoder" if "text encoder" in error.problem else "of no module of the transformer"


def _parse_name(stored: str, family: Family, located: Located) -> Name:
    try:
        return parse_name(stored, family)
    except (UnknownNameError, UnsupportedError) as error:
        raise type(error)(
            error.operation, error.problem, file=located.path, key=error.key, found=error.found, fix=error.fix
        ) from None


Same = Callable[[Update, Update], bool]


def one_copy(found: Found, located: Located, is_same: Same) -> dict[str, Update]:
    """One update for each weight: copies are told if their numbers are equal, and refused if they are not."""
    chosen: dict[str, Update] = {}
    repeated = 0
    for key, updates in found.updates.items():
        chosen[key] = updates[0]
        for other in updates[1:]:
            if not is_same(updates[0], other):
                raise twice(key, next(iter(updates[0].names.values())), next(iter(other.names.values())), located)
            repeated += 1
    if repeated:
        found.notes.append(f"{repeated} weights are there twice, with equal numbers: one copy is taken")
    return chosen

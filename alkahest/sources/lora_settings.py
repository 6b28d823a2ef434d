"""The settings that stand beside a LoRA: PEFT's adapter_config.json, and the same in diffusers' metadata.

Every key has a meaning here, or is neutral (at any value, or at those named), or refuses the file: a setting that is
not understood may change what the numbers mean.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alkahest.errors import FileFormatError, UnsupportedError
from alkahest.files.reader import Reader
from alkahest.files.shards import Located

ADAPTER = "lora_adapter_metadata"  # where diffusers writes them
CONFIG = "adapter_config.json"  # where PEFT does
_LONGEST = 1 << 20  # bytes
KINDS = {"LORA": "lora", "LOHA": "hada", "LOKR": "lokr", "OFT": "oft", "BOFT": "boft", "IA3": "ia3"}
# What only training, loading or other kinds of layers look at.
_NEUTRAL = frozenset(
    [
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "lora_dropout",
        "rank_dropout",
        "module_dropout",
        "boft_dropout",
        "rank_dropout_scale",
        "task_type",
        "inference_mode",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "base_model_class",
        "parent_library",
        "revision",
        "megatron_config",
        "megatron_core",
        "decompose_both",
        "decompose_factor",
        "use_effective_conv2d",
        "runtime_config",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "init_weights",
        "init_ia3_weights",
        "fan_in_fan_out",
        "modules_to_save",
        "bias",
        "feedforward_modules",
        "ensure_weight_tying",
        "eps",
        "_custom_modules",
        # The tensors say these themselves.
        "oft_block_size",
        "boft_block_size",
        "boft_block_num",
        "boft_n_butterfly_factor",
    ]
)
_MEANT = frozenset(
    [
        "r",
        "alpha",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "init_lora_weights",
        "peft_type",
        "block_share",
        "use_cayley_neumann",
        "num_cayley_neumann_terms",
        "coft",
    ]
)
# How factors began without anything being taken from the model's own weights.
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
_OFF: tuple[Any, ...] = (None, False, 0, "", [], {})  # of a key that is not known


@dataclass(frozen=True)
class Settings:
    """What a file's settings say of its numbers; ``source`` is where they stand, None without any."""

    source: str | None = None
    kind: str | None = None  # of `KINDS`
    rank: float | None = None
    alpha: float | None = None
    rank_pattern: tuple[tuple[str, float], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    rslora: bool = False
    dora: bool | None = None
    given: Mapping[str, Any] = field(default_factory=dict)  # the rest, for kinds that have more of them
    notes: tuple[str, ...] = ()

    def rank_for(self, module: str) -> float | None:
        """The rank that the settings give to a module."""
        return _first(self.rank_pattern, module, self.rank)

    def alpha_for(self, module: str) -> float | None:
        """The alpha that the settings give to a module."""
        return _first(self.alpha_pattern, module, self.alpha)

    def unmatched(self, modules: Iterable[str]) -> list[str]:
        """Patterns that fit none of the file's modules, in words."""
        modules = list(modules)
        return [
            f"{name} {pattern!r} matches no module of the file"
            for name, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern))
            for pattern, _ in patterns
            if not any(_matches(pattern, module) for module in modules)
        ]


def settings_of(located: Located) -> Settings:
    """The settings of an opened file; FileFormatError if they make no sense, UnsupportedError for what is not handled.

    A file of its own name takes an ``adapter_config.json`` beside it if it is the only one there, or if its tensors
    have PEFT's names; that is said.
    """
    source, text, notes = _text_of(located)
    if source is None or text is None:
        return Settings(notes=tuple(notes))
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise _bad(located, "the adapter's settings cannot be read", "JSON", text[:80]) from None
    if not isinstance(found, dict):
        raise _bad(located, "the adapter's settings make no sense", "a JSON object", text[:80])
    other = ("text_encoder.", "text_encoder_2.")  # diffusers writes one's settings beside the other's
    given = {str(k).removeprefix("transformer."): v for k, v in found.items() if not str(k).startswith(other)}
    _require_known(given, located)
    numbers = {name: _number(name, given.get(name), located) for name in ("r", "alpha", "lora_alpha")}
    patterns = {name: _pattern(name, given.get(name), located) for name in ("rank_pattern", "alpha_pattern")}
    peft = given.get("peft_type")
    return Settings(
        source,
        KINDS[str(peft).upper()] if peft is not None else None,
        numbers["r"] or None,
        numbers["alpha"] if numbers["lora_alpha"] is None else numbers["lora_alpha"],
        patterns["rank_pattern"],
        patterns["alpha_pattern"],
        bool(given.get("use_rslora")),
        given.get("use_dora"),
        given,
        tuple(notes),
    )


def _text_of(located: Located) -> tuple[str | None, str | None, list[str]]:
    """Where the settings stand, their text, and what to say about that."""
    if ADAPTER in located.metadata:
        return ADAPTER, located.metadata[ADAPTER], []
    path = located.files[0].path
    beside = path.parent / CONFIG
    if not beside.is_file():
        return None, None, []
    notes = []
    if not path.name.startswith("adapter_model"):
        alone = len(list(path.parent.glob("*.safetensors"))) == 1
        named = any(name.startswith("base_model.model.") for name in located.tensors)
        if not (alone or named):
            return None, None, [f"{CONFIG} beside it is not taken: the folder holds other files that it may be of"]
        notes = [f"settings are taken from {CONFIG} beside it"]
    reader = Reader(beside)
    if reader.size > _LONGEST:
        raise _bad(located, "the adapter's settings are too long", f"{_LONGEST:,} bytes", f"{reader.size:,}")
    return CONFIG, reader.read(0, reader.size).decode(errors="replace"), notes


def _require_known(given: Mapping[str, Any], located: Located) -> None:
    """Refuse every setting that has no meaning here, unless it is off."""
    for name, value in given.items():
        if name not in _NEUTRAL | _MEANT and value not in _OFF:
            raise _unsupported(located, f"the setting {name!r} is not handled", name, value)
    peft = given.get("peft_type")
    if peft is not None and str(peft).upper() not in KINDS:
        raise _unsupported(located, f"{peft} adapters are not handled", "peft_type", peft)
    for name in ("use_rslora", "use_dora", "coft", "block_share", "use_cayley_neumann"):
        if given.get(name) not in (None, True, False):
            raise _bad(located, "the adapter's settings make no sense", f"{name} true or false", str(given[name])[:80])
    start = given.get("init_lora_weights")
    if isinstance(start, (list, dict)) or start not in _STARTS:
        raise UnsupportedError(
            "open_lora",
            f"a LoRA that began as {start!r} is no difference from the model: what its factors began as was taken "
            "from the weights",
            file=located.path,
            key="init_lora_weights",
            found=repr(start)[:80],
            fix="convert it where it was trained: path_initial_model_for_weight_conversion= of peft's save_pretrained",
        )
    if given.get("coft"):
        raise _unsupported(located, "constrained OFT is not handled", "coft", True)


def _number(name: str, value: Any, located: Located) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _bad(located, "the adapter's settings make no sense", f"{name}: a finite number", repr(value)[:80])
    if name == "r" and value < 0:
        raise _bad(located, "the adapter's settings make no sense", "r: 1 or more", repr(value))
    return float(value)


def _pattern(name: str, value: Any, located: Located) -> tuple[tuple[str, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise _bad(located, "the adapter's settings make no sense", f"{name}: an object", repr(value)[:80])
    pairs = [(str(key), _number(name, one, located)) for key, one in value.items()]
    for key, _ in pairs:
        _compiled(key, located)
    return tuple((key, one) for key, one in pairs if one is not None)


def _compiled(pattern: str, located: Located) -> None:
    """Refuse a pattern that is no regular expression, or one whose matching could take for ever."""
    loops = re.findall(r"(?<!\\)[*+{]", re.sub(r"\[[^\]]*\]", "x", pattern))
    nested = re.search(r"\)\s*[*+{]", pattern)
    if len(pattern) > 300 or len(loops) > 3 or nested:
        raise _unsupported(located, "this pattern of modules is too involved", "rank_pattern, alpha_pattern", pattern)
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise _bad(
            located, "the adapter's settings make no sense", "a regular expression", f"{pattern!r}: {error}"
        ) from None


def _matches(pattern: str, module: str) -> bool:
    """Whether PEFT takes a pattern for a module's: as ``get_pattern_key`` does (peft/utils/other.py)."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _first(patterns: Iterable[tuple[str, float]], module: str, otherwise: float | None) -> float | None:
    return next((value for pattern, value in patterns if _matches(pattern, module)), otherwise)


def _bad(located: Located, problem: str, expected: str, found: str) -> FileFormatError:
    return FileFormatError(
        "open_lora", problem, file=located.path, expected=expected, found=found, fix="get the file again"
    )


def _unsupported(located: Located, problem: str, key: str, value: Any) -> UnsupportedError:
    return UnsupportedError(
        "open_lora",
        problem,
        file=Path(located.path),
        key=key,
        found=repr(value)[:80],
        fix="merge it where it was trained, and extract what it changed: ak.extract_lora(merged - base)",
    )

"""mergekit's YAML as it stands: one document with its models, its method and their settings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from alkahest.errors import RecipeError, nearest, printable

_MAX_NODES = 10_000  # with what aliases repeat
_KEYS = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype")
_OF_LANGUAGE_MODELS = ("tokenizer_source", "tokenizer", "chat_template")
_OF_LAYERS = ("slices", "modules")


@dataclass(frozen=True)
class Model:
    """One model of a config: where it is and its own settings."""

    path: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Config:
    """A config; ``models`` are all inputs, the base among them, as mergekit counts them."""

    method: str
    models: tuple[Model, ...]
    base: Model | None
    parameters: Mapping[str, Any]
    dtype: str | None
    source: Path
    notes: list[str] = field(default_factory=list)

    @property
    def others(self) -> list[Model]:
        """All inputs but the base."""
        return [model for model in self.models if self.base is None or model.path != self.base.path]

    def refusal(self, problem: str, found: object = None, fix: str | None = None) -> RecipeError:
        """An error about this file."""
        shown = None if found is None else printable(str(found))[:300]
        return RecipeError("mergekit", problem, file=self.source, found=shown, fix=fix)


def read_config(text: str, source: Path) -> Config:
    """The config in mergekit's YAML. Raises RecipeError for anything that Alkahest could not do as it says."""
    value = _mapping(_loaded(text, source), "the config", source)
    config = Config(str(value.get("merge_method")), (), None, {}, None, source)
    _require_keys(value, config)
    listed = value.get("models")
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        raise config.refusal("models must be a list of them", found=listed)
    models = [_model(one, config) for one in listed]
    base_path = value.get("base_model")
    base = None if base_path is None else _model({"model": base_path}, config)
    if base is not None:
        base = next((one for one in models if one.path == base.path), base)
        if base not in models:
            models.append(base)
    paths = [one.path for one in models]
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise config.refusal("a model is listed twice", found=twice[0])
    parameters = _mapping(value.get("parameters") or {}, "parameters", source)
    dtype = value.get("out_dtype") or value.get("dtype")
    return Config(
        config.method,
        tuple(models),
        base,
        parameters,
        None if dtype is None else str(dtype),
        source,
        _notes(value),
    )


def _require_keys(value: Mapping[str, Any], config: Config) -> None:
    for key in value:
        if key in _OF_LAYERS:
            raise config.refusal(
                f"{key} put layers of models together, which Alkahest does not do",
                fix="models: with filters and gradients says which layers take how much of each",
            )
        if key not in _KEYS and key not in _OF_LANGUAGE_MODELS:
            raise config.refusal("mergekit has no such key", found=key, fix=nearest(str(key), _KEYS))
    for key in ("merge_method", "models"):
        if value.get(key) is None:
            raise config.refusal(f"{key} is missing", found=", ".join(map(str, value)))


def _notes(value: Mapping[str, Any]) -> list[str]:
    notes = [f"{key} is for language models: not used" for key in _OF_LANGUAGE_MODELS if value.get(key) is not None]
    dtype = value.get("dtype")
    if dtype is not None and str(dtype) != "float32":
        notes.append(f"mergekit calculates in {dtype}; here it is float32, rounded once when it is written")
    return notes


def _model(value: Any, config: Config) -> Model:
    given = _mapping(value, "a model", config.source)
    for key in given:
        if key not in ("model", "parameters"):
            raise config.refusal("a model has no such key", found=key, fix=nearest(str(key), ["model", "parameters"]))
    path = given.get("model")
    if isinstance(path, Mapping):
        path = path.get("path") if set(path) == {"path"} else _nested_path(path, config)
    if not isinstance(path, str) or not path:
        raise config.refusal("a model has no path", found=value)
    if "+" in os.path.basename(path):
        first, _, lora = path.rpartition("+")
        raise config.refusal(
            "a LoRA in a model is not read from here",
            found=path,
            fix=f'write it first: alkahest merge "model + lora" --model {first} --lora {lora} -o with-lora.safetensors',
        )
    return Model(path, _mapping(given.get("parameters") or {}, "parameters", config.source))


def _nested_path(value: Mapping[str, Any], config: Config) -> Any:
    inner = value.get("model")
    if set(value) == {"model"} and isinstance(inner, Mapping) and set(inner) == {"path"}:
        return inner["path"]
    raise config.refusal("only the path of a model is read", found=value, fix="model: FILE, its LoRA merged before")


def _mapping(value: Any, what: str, source: Path) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        found = printable(str(value))[:100]
        raise RecipeError("mergekit", f"{what} must be a mapping", file=source, found=found)
    return value


class _Loader(yaml.SafeLoader):
    """YAML's plain values, a key twice being an error rather than the last of the two."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _loaded(text: str, source: Path) -> Any:
    try:
        documents = list(yaml.load_all(text, Loader=_Loader))  # plain values only
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise RecipeError("mergekit", "the YAML cannot be read", file=source, found=said) from None
    if len(documents) != 1:
        fix = "one file for each: what one makes is a file that the next one names"
        raise RecipeError(
            "mergekit", "one config is read from a file", file=source, found=f"{len(documents)} documents", fix=fix
        )
    left, waiting = _MAX_NODES, [documents[0]]
    while waiting:
        value = waiting.pop()
        left -= 1
        waiting.extend(value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ())
        if left < 0 or len(waiting) > _MAX_NODES:
            raise RecipeError("mergekit", "this is too large for a config", file=source)
    return documents[0]

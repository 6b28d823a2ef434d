"""Text encoder, tokenizer, VAE and scheduler, from whatever people have them in."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alkahest import mini
from alkahest.algebra.weights import Weights
from alkahest.errors import AlkahestError, FileFormatError, MismatchError, UnsupportedError, unknown
from alkahest.files.header import read_header
from alkahest.files.paths import expanded
from alkahest.files.reader import Reader
from alkahest.model.stored import resolve, whole_packed

NAMES = ("text_encoder", "tokenizer", "vae", "scheduler")
# The last three are how all-in-one files name theirs.
_TEXT_PREFIXES = ("model.", "", "text_encoders.qwen3_4b.transformer.model.", "text_encoders.qwen3_4b.transformer.")
_VAE_PREFIXES = ("", "vae.", "first_stage_model.")
# One user turn and no thinking block: diffusers' ZImagePipeline and ComfyUI's z_image.py agree on it.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The VAE of Z-Image is FLUX.1's; its single file says nothing of these (black-forest-labs/FLUX.1-dev, vae/config.json).
_FLUX = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "norm_num_groups": 32, "sample_size": 1024}


def load_components(weights: Weights, components: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The parts by name, checked to fit the weights; `ak.pipeline` says what may be given.

    Raises FileFormatError for what is missing or does not load, MismatchError for what does not fit.
    """
    from diffusers import DiffusionPipeline

    if components is None:
        components = default_components(weights)
    if isinstance(components, DiffusionPipeline):
        parts = {name: getattr(components, name) for name in NAMES}
    elif isinstance(components, Mapping):
        parts = _from_mapping(components, dtype)
    else:
        parts = _from_folder(components, dtype)
    if absent := [name for name in NAMES if parts.get(name) is None]:
        raise FileFormatError("components", f"{', '.join(absent)} missing", expected=", ".join(NAMES))
    _check_fit(weights, parts)
    return parts


def default_components(weights: Weights) -> Path:
    """The pipeline folder that weights bring along: the miniature family's, or the one that a file lies in."""
    if mini.is_miniature(weights.leading.architecture):
        return mini.components()
    for leaf in weights.leaves():
        for reader in leaf.files:
            folder = Path(reader.path).parent.parent
            if (folder / "model_index.json").is_file():
                return folder
    raise FileFormatError(
        "pipeline",
        "components are needed: text encoder, tokenizer, VAE and scheduler",
        fix='components="Tongyi-MAI/Z-Image" (a hub id), a pipeline folder, or a mapping of files',
    )


def _from_folder(source: Any, dtype: torch.dtype) -> dict[str, Any]:
    from diffusers import ZImagePipeline

    path = Path(source)
    if not path.is_dir() and len(Path(str(source)).parts) != 2:
        raise FileFormatError("components", "no such folder", file=source, fix="a pipeline folder or a hub id")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise FileFormatError(
            "components", "this folder is no diffusers pipeline", file=source, expected="model_index.json in it"
        )
    if path.is_dir() and (absent := [name for name in NAMES if not (path / name).is_dir()]):
        raise FileFormatError("components", f"{', '.join(absent)} missing", file=source, expected=", ".join(NAMES))
    for name in ("text_encoder", "vae") if path.is_dir() else ():
        _require_safetensors(path / name)
    with _loading(source), quiet():
        loaded = ZImagePipeline.from_pretrained(str(source), transformer=None, dtype=dtype, use_safetensors=True)
        found = {name: getattr(loaded, name) for name in NAMES}
    for name in ("text_encoder", "vae") if path.is_dir() else ():
        _require_all_weights(path / name, found[name])
    return found


def _require_all_weights(folder: Path, module: Any) -> None:
    """Raise FileFormatError for weights that the files lack: the libraries would draw them at random."""
    files = [one for one in folder.iterdir() if one.suffix.lower() == ".safetensors"]
    held = {name.removeprefix("model.") for file in files for name in read_header(Reader(file)).entries}
    if lacking := [name for name in module.state_dict() if name.removeprefix("model.") not in held]:
        raise FileFormatError(
            "components",
            f"{len(lacking)} tensors are missing, and would be random numbers",
            file=folder,
            key=lacking[0],
            fix="the files are incomplete; get them again",
        )


def _from_mapping(given: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    for name in given:
        if name not in NAMES:
            raise unknown("components", "no such component", name, NAMES)
    # Sampling always states its shift, so any scheduler of the class will do.
    parts: dict[str, Any] = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), **given}
    loaders = {"text_encoder": _text_encoder, "tokenizer": _tokenizer, "vae": _vae}
    for name, load in loaders.items():
        if isinstance(parts.get(name), (str, os.PathLike)):
            path = expanded(parts[name], "components")
            if not path.exists():
                raise FileFormatError("components", "no such file or folder", file=path, key=name)
            with _loading(path):
                parts[name] = load(path, dtype)
    return parts


def _require_safetensors(folder: Path) -> None:
    """Raise UnsupportedError for a folder whose weights are pickles only."""
    pickles = [one.name for one in folder.iterdir() if one.suffix.lower() in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    if pickles and not any(one.suffix.lower() == ".safetensors" for one in folder.iterdir()):
        raise UnsupportedError(
            "components",
            "these weights are a pickle, which can run code when it is opened, and is never read",
            file=folder / pickles[0],
            expected=".safetensors",
            fix="get the .safetensors of the same model, or convert it where you trust it",
        )


@contextlib.contextmanager
def _loading(source: object) -> Iterator[None]:
    """What libraries raise about files that they cannot load, as one error: it may be anything."""
    try:
        yield
    except (AlkahestError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise FileFormatError(
            "components",
            "these do not load",
            file=str(source),
            found=f"{type(error).__name__}: {str(error)[:200]}",
            fix="a pipeline folder or a hub id; get the files again",
        ) from error


def _text_encoder(path: Path, dtype: torch.dtype) -> Any:
    """A Qwen3 from one file, such as ComfyUI's qwen_3_4b.safetensors; its sizes follow from the shapes."""
    from transformers import Qwen3Config, Qwen3Model

    state = _strip_prefix(path, _TEXT_PREFIXES, "embed_tokens.weight", dtype)
    rows = {name: tensor.shape[0] for name, tensor in state.items()}
    head = rows["layers.0.self_attn.q_norm.weight"]
    config = Qwen3Config(
        vocab_size=rows["embed_tokens.weight"],
        hidden_size=state["embed_tokens.weight"].shape[1],
        intermediate_size=rows["layers.0.mlp.up_proj.weight"],
        num_hidden_layers=1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers.")),
        num_attention_heads=rows["layers.0.self_attn.q_proj.weight"] // head,
        num_key_value_heads=rows["layers.0.self_attn.k_proj.weight"] // head,
        head_dim=head,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},  # Qwen/Qwen3-4B, config.json
    )
    # Made empty and then given the tensors themselves, so that 8 GB are held once.
    with torch.device("meta"):
        encoder = Qwen3Model(config)
    encoder.rotary_emb = type(encoder.rotary_emb)(config)
    return _fill(encoder, state, path, dtype)


def _vae(path: Path, dtype: torch.dtype) -> Any:
    """FLUX's autoencoder from one file, such as ComfyUI's ae.safetensors, or a diffusers folder."""
    from diffusers import AutoencoderKL

    if path.is_dir():
        _require_safetensors(path)
        return AutoencoderKL.from_pretrained(path, dtype=dtype, use_safetensors=True)
    state = _strip_prefix(path, _VAE_PREFIXES, "decoder.conv_in.weight", torch.float32)
    levels = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.down."))
    blocks = 1 + max(int(name.split(".")[4]) for name in state if name.startswith("encoder.down.0.block."))
    config = {
        "_class_name": "AutoencoderKL",
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "block_out_channels": [state[f"encoder.down.{n}.block.0.conv1.weight"].shape[0] for n in range(levels)],
        "layers_per_block": blocks,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        **_FLUX,
    }
    with tempfile.TemporaryDirectory() as folder, quiet():
        Path(folder, "config.json").write_text(json.dumps(config))
        return AutoencoderKL.from_single_file(state, config=folder, local_files_only=True).to(dtype).eval()


def _tokenizer(path: Path, dtype: torch.dtype) -> Any:
    """A folder with vocab.json and merges.txt or tokenizer.json, such as ComfyUI's qwen25_tokenizer."""
    from transformers import Qwen2Tokenizer

    folder = path if path.is_dir() else path.parent
    wanted = "vocab.json and merges.txt, or tokenizer.json"
    try:
        if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            raise OSError("no such files")  # transformers would make an empty one
        tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise FileFormatError(
            "components", "this tokenizer does not load", file=folder, expected=wanted, found=error
        ) from error
    tokenizer.chat_template = CHAT_TEMPLATE  # Qwen2.5's, which ComfyUI ships, would add a system prompt
    return tokenizer


def _strip_prefix(path: Path, prefixes: tuple[str, ...], landmark: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one model in a file, prefix removed, fp8 with its scale applied."""
    reader = Reader(path)
    header = read_header(reader)
    prefix = next((p for p in prefixes if p + landmark in header.entries), None)
    if prefix is None:
        raise FileFormatError("components", "this is another kind of file", file=path, expected=f"a tensor {landmark}")
    mine = {name: (reader, entry) for name, entry in header.entries.items() if name.startswith(prefix)}
    state: dict[str, Tensor] = {}
    # What else a text encoder's file may hold, a scale of an unknown kind among it, is not taken for a weight.
    found = resolve(mine, header.metadata, prefix, lambda name: name.endswith((".weight", ".bias")))
    for name, stored in found.weights.items():
        if stored.packed is not None:
            state[name] = whole_packed(stored).to(dtype).view(stored.shape)
            continue
        elements = torch.Size(stored.entry.shape).numel()
        raw = torch.empty(elements * stored.form.itemsize, dtype=torch.uint8)
        reader.read_into(raw.numpy().data, stored.entry.offset)
        values = torch.empty(elements)
        stored.decode(raw, 0, values)
        state[name] = values.to(dtype).view(stored.entry.shape)
    return state


def _fill(module: torch.nn.Module, state: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> torch.nn.Module:
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    for name, shape in wanted.items():
        if name not in state or tuple(state[name].shape) != shape:
            found = tuple(state[name].shape) if name in state else "no such tensor"
            raise MismatchError(
                "components", "the text encoder is not a Qwen3", file=path, key=name, expected=shape, found=found
            )
    module.load_state_dict({name: state[name] for name in wanted}, assign=True)
    return module.eval().requires_grad_(False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of the libraries that load parts: ours is the caller's to show."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    were_on = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, on in zip(libraries, were_on, strict=True):
            if on:
                library.enable_progress_bar()


def _check_fit(weights: Weights, parts: Mapping[str, Any]) -> None:
    text = weights.leading.architecture.text_width
    if (width := parts["text_encoder"].config.hidden_size) != text:
        raise MismatchError(
            "pipeline", "the text encoder does not fit the transformer", expected=f"text width {text}", found=width
        )
    channels = weights.leading.architecture.latent_channels
    if (found := parts["vae"].config.latent_channels) != channels:
        raise MismatchError(
            "pipeline", "the VAE does not fit the transformer", expected=f"{channels} latent channels", found=found
        )

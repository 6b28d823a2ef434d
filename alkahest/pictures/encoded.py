"""A dataset as training sees it: latents and text embeddings, computed once and kept in the cache by content."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from alkahest.engine.events import Event
from alkahest.errors import FileFormatError, UnsupportedError
from alkahest.files.cache import KINDS, cache_folder, load_tensors, store_tensors
from alkahest.files.whole import as_output_error
from alkahest.model.families.zimage import FAMILY
from alkahest.pictures.dataset import NOTES, Dataset, Example
from alkahest.pictures.fingerprints import fingerprint as fingerprint

if TYPE_CHECKING:
    from PIL.Image import Image

MULTIPLE = 32  # tokens: captions are padded to this, so batches of one bucket need no mask
MAX_TOKENS = FAMILY.text_tokens
_PIXELS = 1 << 21  # encoded at a time
_CAPTIONS = 64  # embedded at a time
_REMEMBERED = 1 << 30  # bytes of latents and embeddings kept in memory

Bucket = tuple[int, int, int]  # height and width of the latents, tokens of the caption rounded up


@dataclass(frozen=True)
class Item:
    """One encoded example: where its latents [channels, height, width] and its embedding [tokens, width] are."""

    name: str
    latents: Path
    embedding: Path
    bucket: Bucket


class _Held(OrderedDict[Path, Tensor]):
    """Latents and embeddings in memory, the latest up to a gigabyte: the cache's files may be cleared by others."""

    nbytes = 0

    def add(self, path: Path, value: Tensor) -> None:
        if path not in self:
            self[path] = value
            self.nbytes += value.nbytes
        while self.nbytes > _REMEMBERED and len(self) > 1:
            self.nbytes -= self.popitem(last=False)[1].nbytes


@dataclass
class Encoded:
    """Encoded examples, read when they are needed; ``empty`` is the embedding of no caption."""

    name: str
    items: Sequence[Item]
    empty: Tensor
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    _known: _Held = field(default_factory=_Held, repr=False)

    def __len__(self) -> int:
        return len(self.items)

    def latents(self, number: int) -> Tensor:
        return self._read(self.items[number].latents)

    def embedding(self, number: int) -> Tensor:
        return self._read(self.items[number].embedding)

    def _read(self, path: Path) -> Tensor:
        known = self._known.get(path)
        if known is None:
            known, _ = _load(path)
            if known is None:
                raise FileFormatError(
                    "dataset",
                    "an encoded example is gone or damaged",
                    file=path,
                    fix="start again: it will be encoded anew",
                )
            self._known.add(path, known)
        return known


def encode(
    dataset: Dataset, pipe: Any, resolution: int, multiple: int | None = None, strict: bool = False
) -> Iterator[Event]:
    """Encode what the cache does not hold yet: a generator of events, the result is `Encoded`.

    >>> *_, last = encode(from_folder("people"), pipe, 1024); last.result

    Pictures are scaled and cropped to the bucket of their shape: about ``resolution`` squared pixels, sides a
    ``multiple`` (default 64, 16 below 512). Latents are the posterior's mode, shifted and scaled as the transformer
    sees them; embeddings are what ``encode_prompt`` gives. Entries belong to one VAE or text encoder, whatever
    its file. Unreadable pictures are skipped and reported, or refused with ``strict``; FileFormatError if none is left.
    """
    step = multiple or (64 if resolution >= 512 else 16)
    if resolution % 16 or step % 16 or resolution < step:
        raise UnsupportedError(
            "dataset", "resolution and multiple must be multiples of 16", found=f"{resolution}, {step}"
        )
    vae, text = fingerprint(pipe.vae), fingerprint(pipe.text_encoder)
    total, done = 2 * len(dataset), 0
    captions = list(dict.fromkeys(["", *(example.caption for example in dataset.examples)]))
    where = {caption: _place("embeddings", text, caption) for caption in captions}
    held, tokens, missing = _Held(), {}, []
    for caption in captions:
        embedding, _ = _load(where[caption])
        if embedding is None or embedding.dim() != 2:
            missing.append(caption)
            continue
        tokens[caption] = embedding.shape[0]
        held.add(where[caption], embedding)
    for first in range(0, len(missing), _CAPTIONS):
        chosen = missing[first : first + _CAPTIONS]
        for caption, embedding in zip(chosen, embeddings(pipe.tokenizer, pipe.text_encoder, chosen), strict=True):
            _save(where[caption], embedding)
            tokens[caption] = embedding.shape[0]
            held.add(where[caption], embedding.cpu())
        yield Event(first + len(chosen), total, "captions")
    nothing = held.get(where[""])
    if nothing is None:  # forgotten among many
        nothing = embeddings(pipe.tokenizer, pipe.text_encoder, [""])[0].cpu()
    done = len(dataset)
    items, skipped, waiting = [], dict(dataset.skipped), _Waiting(pipe, vae, held)
    notes = dict(dataset.notes)
    for number, example in enumerate(dataset.examples):
        try:
            placed = waiting.add(example, resolution, step)
        except FileFormatError as error:
            if strict:
                raise
            skipped[example.name] = error.problem
            continue
        items.append((example, *placed))
        if done_to_it := waiting.notes[placed[0]]:
            notes[example.name] = "; ".join([*filter(None, [notes.get(example.name)]), *done_to_it])
        if number % 32 == 0:
            yield Event(done + number, total, example.name)
    waiting.flush()
    if not items:
        raise FileFormatError("dataset", "no picture could be read", found=next(iter(skipped.values()), "nothing"))
    found = [Item(e.name, path, where[e.caption], (*size, _round_up(tokens[e.caption]))) for e, path, size in items]
    yield Event(total, total, "done", Encoded(dataset.name, found, nothing, skipped, notes, held))


def bucket_size(width: int, height: int, resolution: int, step: int) -> tuple[int, int]:
    """Height and width in pixels that a picture of this shape is brought to.

    >>> bucket_size(1920, 1080, 1024, 64)
    (768, 1344)
    """
    ratio = math.sqrt(width / height)
    sides = (resolution / ratio, resolution * ratio)
    high, wide = (max(step, round(side / step) * step) for side in sides)
    return high, wide


def fit(image: Image, size: tuple[int, int]) -> Image:
    """A picture scaled and cropped round its middle to (height, width)."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)


@torch.no_grad()
def latents_of(vae: Any, images: Sequence[Image]) -> Tensor:
    """Latents [n, channels, height, width], float32, as the transformer sees them, of pictures of one size."""
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    values = pixels.permute(0, 3, 1, 2).to(vae.device, torch.float32) / 127.5 - 1
    found = vae.encode(values.to(vae.dtype)).latent_dist.mode().float()
    latents: Tensor = (found - vae.config.shift_factor) * vae.config.scaling_factor
    return latents.cpu()


def chat(tokenizer: Any, caption: str) -> str:
    """A caption as the pipeline gives it to the text encoder."""
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    return text


@torch.no_grad()
def embeddings(tokenizer: Any, encoder: nn.Module, captions: Sequence[str]) -> list[Tensor]:
    """What the pipeline's ``encode_prompt`` gives for each caption, [tokens, width], many at once."""
    unique = list(dict.fromkeys(captions))
    found: dict[str, Tensor] = {}
    for first in range(0, len(unique), 256):
        chosen = unique[first : first + 256]
        texts = [chat(tokenizer, text) for text in chosen]
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt").to(
            encoder.device
        )
        states = encoder(**tokens, output_hidden_states=True).hidden_states[-2]
        for text, state, mask in zip(chosen, states, tokens.attention_mask.bool(), strict=True):
            found[text] = state[mask].clone()
    return [found[text] for text in captions]


class _Waiting:
    """Pictures that wait until enough of one size are there to be encoded together."""

    def __init__(self, pipe: Any, vae: str, held: _Held) -> None:
        self.pipe, self.vae, self.held = pipe, vae, held
        self._images: dict[tuple[int, int], list[tuple[Path, Image]]] = {}
        self.notes: dict[Path, list[str]] = {}  # what was done to the picture of an entry

    def add(self, example: Example, resolution: int, step: int) -> tuple[Path, tuple[int, int]]:
        """Where the example's latents are or will be, and their height and width."""
        # The size of the picture decides the bucket, and is in the entry of an encoded one.
        path = _place("latents", self.vae, f"{example.identity} {resolution} {step}")
        known, notes = (self.held[path], self.notes[path]) if path in self.held else _load(path)
        if known is not None and known.dim() == 3:
            self.held.add(path, known)
            self.notes[path] = notes
            return path, (known.shape[1], known.shape[2])
        image = example.open()
        self.notes[path] = list(image.info.get(NOTES, ()))
        size = bucket_size(image.width, image.height, resolution, step)
        waiting = self._images.setdefault(size, [])
        waiting.append((path, fit(image, size)))
        if len(waiting) * size[0] * size[1] >= _PIXELS:
            self._encode(size)
        scale = self.pipe.vae_scale_factor
        return path, (size[0] // scale, size[1] // scale)

    def flush(self) -> None:
        for size in list(self._images):
            self._encode(size)

    def _encode(self, size: tuple[int, int]) -> None:
        waiting = self._images.pop(size)
        for (path, _), latents in zip(waiting, latents_of(self.pipe.vae, [image for _, image in waiting]), strict=True):
            _save(path, latents, self.notes[path])
            self.held.add(path, latents.clone())


def _round_up(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE


def _place(kind: str, of: str, what: str) -> Path:
    name = hashlib.blake2b(f"{KINDS[kind].format()} {of} {what}".encode(), digest_size=16).hexdigest()
    return cache_folder() / kind / name[:2] / f"{name}.safetensors"


def _save(path: Path, tensor: Tensor, notes: Sequence[str] = ()) -> None:
    with as_output_error(path):
        store_tensors(path, {"value": tensor}, list(notes))


def _load(path: Path) -> tuple[Tensor | None, list[str]]:
    """A kept tensor, if it is whole and of numbers, and what was done to the picture that it is of."""
    found = load_tensors(path)
    value = None if found is None else found[0].get("value")
    if found is None or value is None or not bool(torch.isfinite(value).all()):
        return None, []
    return value.clone(), list(found[1] or ())

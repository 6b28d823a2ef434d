"""The tensors of a Z-Image transformer, as a function of a few sizes.

Numbers are those of the published model: width 3840, 30 layers, 2 + 2 refiners, 6,154,908,736
parameters. Smaller models of the same class have the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from alkahest.errors import FileFormatError, MismatchError, UnsupportedError
from alkahest.model.keys import in_model_order, is_optional

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

# The Linears that ComfyUI's and musubi's fp8 files quantise: not adaLN, norms, embedders or final layer.
LINEARS = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")
STACKS = ("layers.", "noise_refiner.", "context_refiner.")


@dataclass(frozen=True)
class Architecture:
    """Sizes of one model; every tensor's shape follows from them."""

    layers: int = 30
    width: int = 3840
    feed_forward: int = 10240
    head: int = 128
    caption: int = 2560
    patch: int = 64
    time: int = 256
    time_hidden: int = 1024
    noise_refiners: int = 2
    context_refiners: int = 2

    def shapes(self) -> dict[str, Shape]:
        """Canonical name -> shape, in model order.

        >>> sum(math.prod(shape) for shape in Architecture().shapes().values())
        6154908736
        """
        d, t = self.width, self.time
        shapes: dict[str, Shape] = {
            "x_pad_token": (1, d),
            "cap_pad_token": (1, d),
            "all_x_embedder.2-1.weight": (d, self.patch),
            "all_x_embedder.2-1.bias": (d,),
            "t_embedder.mlp.0.weight": (self.time_hidden, 256),
            "t_embedder.mlp.0.bias": (self.time_hidden,),
            "t_embedder.mlp.2.weight": (t, self.time_hidden),
            "t_embedder.mlp.2.bias": (t,),
            "cap_embedder.0.weight": (self.caption,),
            "cap_embedder.1.weight": (d, self.caption),
            "cap_embedder.1.bias": (d,),
            "all_final_layer.2-1.linear.weight": (self.patch, d),
            "all_final_layer.2-1.linear.bias": (self.patch,),
            "all_final_layer.2-1.adaLN_modulation.1.weight": (d, t),
            "all_final_layer.2-1.adaLN_modulation.1.bias": (d,),
        }
        stacks = {
            "noise_refiner": self.noise_refiners,
            "context_refiner": self.context_refiners,
            "layers": self.layers,
        }
        for stack, count in stacks.items():
            for number in range(count):
                block = self._block(modulated=stack != "context_refiner")
                shapes |= {f"{stack}.{number}.{name}": shape for name, shape in block.items()}
        return {key: shapes[key] for key in in_model_order(shapes)}

    def _block(self, modulated: bool) -> dict[str, Shape]:
        d, f = self.width, self.feed_forward
        block: dict[str, Shape] = {f"attention.{name}.weight": (d, d) for name in ("to_q", "to_k", "to_v", "to_out.0")}
        block |= {f"attention.{name}.weight": (self.head,) for name in ("norm_q", "norm_k")}
        block |= {"feed_forward.w1.weight": (f, d), "feed_forward.w2.weight": (d, f), "feed_forward.w3.weight": (f, d)}
        norms = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
        block |= {f"{name}.weight": (d,) for name in norms}
        if modulated:
            block |= {"adaLN_modulation.0.weight": (4 * d, self.time), "adaLN_modulation.0.bias": (4 * d,)}
        return block

    def diffusers_config(self) -> dict[str, Any]:
        """A ``config.json`` for ZImageTransformer2DModel.

        Rotary axes cannot be read from weights: they are the published [32, 48, 48] scaled to the head size.
        """
        even = 2 * (self.head * 48 // 128 // 2)
        return {
            "_class_name": "ZImageTransformer2DModel",
            "all_patch_size": [2],
            "all_f_patch_size": [1],
            "in_channels": self.patch // 4,
            "dim": self.width,
            "n_layers": self.layers,
            "n_refiner_layers": self.noise_refiners,
            "n_heads": self.width // self.head,
            "n_kv_heads": self.width // self.head,
            "norm_eps": 1e-5,
            "qk_norm": True,
            "cap_feat_dim": self.caption,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
            "axes_dims": [self.head - 2 * even, even, even],
            "axes_lens": [1536, 512, 512],
        }


def is_quantisable(key: str) -> bool:
    """Whether fp8 output stores this tensor as fp8: the Linears of the three block stacks.

    >>> is_quantisable("layers.0.feed_forward.w1.weight"), is_quantisable("layers.0.adaLN_modulation.0.weight")
    (True, False)
    """
    return key.startswith(STACKS) and key.endswith(tuple(f".{name}.weight" for name in LINEARS))


def infer(shapes: Shapes, file: object) -> Architecture:
    """The sizes of a model whose tensors have these shapes.

    Raises FileFormatError if a tensor of Z-Image is missing, or has a shape that does not fit the
    others; UnsupportedError if this is some other model. Extra tensors are allowed.
    """
    require_z_image(shapes, file)
    d, caption = _matrix(shapes, "cap_embedder.1.weight", file)
    found = Architecture(
        layers=_count(shapes, "layers"),
        width=d,
        caption=caption,
        feed_forward=_matrix(shapes, "layers.0.feed_forward.w1.weight", file)[0],
        head=_get(shapes, "layers.0.attention.norm_q.weight", file)[0],
        patch=_matrix(shapes, "all_x_embedder.2-1.weight", file)[1],
        time=_matrix(shapes, "t_embedder.mlp.2.weight", file)[0],
        time_hidden=_matrix(shapes, "t_embedder.mlp.2.weight", file)[1],
        noise_refiners=_count(shapes, "noise_refiner"),
        context_refiners=_count(shapes, "context_refiner"),
    )
    expected = found.shapes()
    missing = [key for key in expected if key not in shapes]
    if missing:
        raise _missing(missing, file)
    for key, shape in expected.items():
        if shapes[key] != shape:
            raise FileFormatError(
                "open",
                "a tensor has a shape that does not fit the rest of the model",
                file=file,
                key=key,
                expected=shape,
                found=shapes[key],
                fix="the file is damaged, or is another model",
            )
    return found


def require_z_image(names: Iterable[str], file: object) -> None:
    """Raise UnsupportedError, saying what it is instead, unless these are the names of a Z-Image transformer."""
    names = list(names)
    if "cap_embedder.1.weight" not in names or not any(name.startswith("layers.0.attention.") for name in names):
        raise _other_model(names, file)


def unknown_tensors(shapes: Shapes, architecture: Architecture) -> list[str]:
    """Names that Z-Image does not have, not even optionally."""
    expected = architecture.shapes()
    return [key for key in shapes if key not in expected and not is_optional(key)]


def require_same_tensors(
    operation: str, left: Shapes, right: Shapes, left_name: Callable[[], str], right_name: Callable[[], str]
) -> None:
    """Raise MismatchError unless both have the same tensors; optional ones may be on one side only."""
    if left is right or left == right:
        return
    fix = "subtract and merge checkpoints of the same architecture"
    names = (left_name(), right_name())
    depths = (_count(left, "layers"), _count(right, "layers"))
    if depths[0] != depths[1]:
        found = "; ".join(f"{name}: {depth} layers" for name, depth in zip(names, depths, strict=True))
        alone = sorted(set(left) ^ set(right))
        key = f"{alone[0]}, ... ({len(alone)} tensors on one side only)" if alone else None
        raise MismatchError(operation, "the models have different depths", key=key, found=found, fix=fix)
    for key in {**left, **right}:
        if key in left and key in right and left[key] != right[key]:
            found = f"{names[0]}: {left[key]}; {names[1]}: {right[key]}"
            raise MismatchError(operation, "a tensor has different shapes", key=key, found=found, fix=fix)
        if (key in left) != (key in right) and not is_optional(key):
            has, lacks = names if key in left else names[::-1]
            found = f"{has} has it, {lacks} does not"
            raise MismatchError(operation, "a tensor is on one side only", key=key, found=found, fix=fix)


def _count(shapes: Shapes, stack: str) -> int:
    numbers = [key.split(".")[1] for key in shapes if key.startswith(f"{stack}.")]
    # A gap in the numbers shows up as missing tensors; a name like layers.99999999 must not.
    return min(1 + max((int(n) for n in numbers if n.isdigit() and len(n) < 5), default=-1), len(numbers))


def _get(shapes: Shapes, key: str, file: object) -> Shape:
    if key not in shapes:
        raise _missing([key], file)
    if not shapes[key]:
        raise FileFormatError("open", "a tensor has no dimensions", file=file, key=key, expected="a vector", found="()")
    return shapes[key]


def _matrix(shapes: Shapes, key: str, file: object) -> tuple[int, int]:
    shape = _get(shapes, key, file)
    if len(shape) != 2:
        raise FileFormatError(
            "open", "a tensor has the wrong number of dimensions", file=file, key=key, expected="a matrix", found=shape
        )
    return shape[0], shape[1]


def _missing(keys: list[str], file: object) -> FileFormatError:
    return FileFormatError(
        "open",
        f"{len(keys)} tensor(s) of Z-Image are missing",
        file=file,
        key=", ".join(keys[:3]) + (", ..." if len(keys) > 3 else ""),
        expected="a complete transformer",
        fix="the file is incomplete, or another model of the family: Lumina 2 has no pad tokens",
    )


def _other_model(names: list[str], file: object) -> UnsupportedError:
    if any(mark in key for key in names for mark in ("lora_A", "lora_down", "lora_up", "lokr_", "hada_")):
        what, fix = "this is a LoRA, not a checkpoint", "ak.open_lora(path), and add it to the checkpoint it belongs to"
    elif names and all(key.startswith(("decoder.", "encoder.", "vae.", "quant_conv", "post_quant")) for key in names):
        what, fix = "this is a VAE, not a transformer", "open the diffusion model's file"
    elif any(key.startswith(("model.layers.", "text_encoders.", "model.embed_tokens")) for key in names):
        what, fix = "this is a text encoder, not a transformer", "open the diffusion model's file"
    else:
        what, fix = "this is not a Z-Image model", "Alkahest handles Z-Image transformers only"
    found = ", ".join(names[:3]) + (f", ... ({len(names)} tensors)" if len(names) > 3 else "")
    return UnsupportedError(
        "open",
        what,
        file=file,
        expected="cap_embedder.1.weight, layers.0.attention.*",
        found=found or "nothing",
        fix=fix,
    )

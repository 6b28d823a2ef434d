"""Z-Image: its tensors as a function of a few sizes, and everything else that is true of this family alone.

Numbers are those of the published model: width 3840, 30 layers, 2 + 2 refiners, 6,154,908,736 parameters. Smaller
models of the same class have the same names. The native layout is the original one, which ComfyUI reads and writes.
Sources: Tongyi-MAI's files, ComfyUI's ``comfy/ldm/lumina/model.py`` (NextDiT), diffusers' ``ZImageTransformer2DModel``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alkahest.errors import FileFormatError
from alkahest.model.families.family import AS_A_PART, Family, Part, Shape, Shapes, count_blocks
from alkahest.model.layouts import Fused, Layout

_PADS = ("x_pad_token", "cap_pad_token")
_REFINERS = ("noise_refiner", "context_refiner", "siglip_refiner")
_EMBEDDERS = ("all_x_embedder", "t_embedder", "cap_embedder", *_PADS, "siglip_embedder", "siglip_pad_token")
_FINAL = ("all_final_layer", "norm_final")
_QKV = Fused(tuple(f".attention.to_{which}.weight" for which in "qkv"), (1, 1, 1))


@dataclass(frozen=True)
class Architecture:
    """Sizes of one model; every tensor's shape follows from them. The defaults are the published model's."""

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

    @property
    def text_width(self) -> int:
        """Of what the text encoder gives for a token."""
        return self.caption

    @property
    def latent_channels(self) -> int:
        """Of a latent pixel; a patch is two by two of them."""
        return self.patch // 4

    def guesses(self) -> list[str]:
        """What of the configuration does not follow from the weights."""
        return [] if self.head == 128 else ["rotary axes are not in the weights; guessed from the head size"]

    def lacks(self, config: Mapping[str, Any] | None) -> list[str]:
        """Which blocks are surely missing, in words. There are as many noise refiners as context refiners."""
        counts = {"noise_refiner": self.noise_refiners, "context_refiner": self.context_refiners}
        wanted = dict.fromkeys(counts, max(1, *counts.values())) | {"layers": self.layers}
        given = config or {}
        for name, stacks in (("n_layers", ("layers",)), ("n_refiner_layers", tuple(counts))):
            if type(given.get(name)) is int:
                wanted |= {stack: max(wanted[stack], given[name]) for stack in stacks}
        counts["layers"] = self.layers
        return [
            f"{counts[stack]} of {count} blocks of {stack}" for stack, count in wanted.items() if counts[stack] < count
        ]

    def oddities(self) -> list[str]:
        """How it differs from the published models, in words."""
        if self.width != 3840 or (self.layers, self.noise_refiners) == (30, 2):
            return []
        return [
            f"{self.layers} layers and {self.noise_refiners} refiners a stream; the published models of this width "
            "have 30 and 2"
        ]

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
        return {key: shapes[key] for key in FAMILY.in_model_order(shapes)}

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


def infer(shapes: Shapes, file: object) -> Architecture:
    """The sizes of a model whose tensors have these shapes.

    Raises FileFormatError if a tensor of Z-Image is missing, or has a shape that does not fit the
    others. Extra tensors are allowed.
    """
    d, caption = _matrix(shapes, "cap_embedder.1.weight", file)
    found = Architecture(
        layers=count_blocks(shapes, "layers"),
        width=d,
        caption=caption,
        feed_forward=_matrix(shapes, "layers.0.feed_forward.w1.weight", file)[0],
        head=_get(shapes, "layers.0.attention.norm_q.weight", file)[0],
        patch=_matrix(shapes, "all_x_embedder.2-1.weight", file)[1],
        time=_matrix(shapes, "t_embedder.mlp.2.weight", file)[0],
        time_hidden=_matrix(shapes, "t_embedder.mlp.2.weight", file)[1],
        noise_refiners=count_blocks(shapes, "noise_refiner"),
        context_refiners=count_blocks(shapes, "context_refiner"),
    )
    expected = found.shapes()
    missing = [key for key in expected if key not in shapes]
    if missing:
        raise _missing_error(missing, file)
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


def _get(shapes: Shapes, key: str, file: object) -> Shape:
    if key not in shapes:
        raise _missing_error([key], file)
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


def _missing_error(keys: list[str], file: object) -> FileFormatError:
    return FileFormatError(
        "open",
        f"{len(keys)} tensor(s) of Z-Image are missing",
        file=file,
        key=", ".join(keys[:3]) + (", ..." if len(keys) > 3 else ""),
        expected="a complete transformer",
        fix=f"{AS_A_PART}; another model of the family is none: Lumina 2 has no pad tokens",
    )


FAMILY = Family(
    name="z-image",
    title="Z-Image",
    landmarks=("cap_embedder.1.weight", "layers.0.attention.*"),
    parts=(
        Part("embedders", _EMBEDDERS, "emb."),
        Part("noise_refiner", ("noise_refiner",), "noise\nref.", is_stack=True),
        Part("context_refiner", ("context_refiner",), "context\nref.", is_stack=True),
        Part("siglip_refiner", ("siglip_refiner",), "siglip\nref.", is_stack=True, built_as="context_refiner"),
        Part("layers", ("layers",), "layers", is_stack=True, is_main=True),
        Part("final", _FINAL, "fin."),
    ),
    bridge="refiner",
    aliases={
        "all": ("*",),
        "refiner": _REFINERS,
        "refiners": _REFINERS,
        "embedders": _EMBEDDERS,
        "pad_tokens": (*_PADS, "siglip_pad_token"),
        "input": (*_REFINERS, *_EMBEDDERS),
        "final": _FINAL,
        # The names that ComfyUI's layout gives to the same tensors.
        "x_embedder": ("all_x_embedder",),
        "final_layer": ("all_final_layer",),
        "qkv": ("to_q", "to_k", "to_v"),
        "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
        "attention.out": ("attention.to_out",),
        "q_norm": ("norm_q",),
        "k_norm": ("norm_k",),
    },
    optional=("norm_final.", "siglip_"),  # the SigLIP branch is that of the omni models
    streams={"noise_refiner": "image", "context_refiner": "text"},
    units={
        "hidden unit": ("", tuple(f"feed_forward.{which}.weight" for which in ("w1", "w3", "w2"))),
        "head": ("head", tuple(f"attention.to_{which}.weight" for which in ("q", "k", "v", "out.0"))),
    },
    fused_modules={
        ".attention.to_qkv": (".attention.to_q", ".attention.to_k", ".attention.to_v"),
        ".feed_forward.w13": (".feed_forward.w1", ".feed_forward.w3"),
    },
    pads=_PADS,
    scales=("cap_embedder.0.weight",),
    layouts=(
        Layout("diffusers"),
        Layout(
            "native",
            renamed=(
                ("x_embedder.", "all_x_embedder.2-1."),
                ("final_layer.", "all_final_layer.2-1."),
                (".attention.out.", ".attention.to_out.0."),
                (".attention.q_norm.", ".attention.norm_q."),
                (".attention.k_norm.", ".attention.norm_k."),
            ),
            fused={".attention.qkv.weight": _QKV},
        ),
    ),
    default_layout="native",
    # The Linears that ComfyUI's and musubi's fp8 files quantise: not adaLN, norms, embedders or final layer.
    quantised=tuple(
        f".{name}.weight"
        for name in (
            "attention.to_q",
            "attention.to_k",
            "attention.to_v",
            "attention.to_out.0",
            "feed_forward.w1",
            "feed_forward.w2",
            "feed_forward.w3",
        )
    ),
    quantised_parts=("layers", "noise_refiner", "context_refiner"),
    infer=infer,
    smallest=Architecture(layers=1, width=128, feed_forward=341, head=128, caption=85, time=128),
    shift=3.0,  # the article's; Z-Image's own configuration says 6, Turbo's 3
    text_tokens=512,  # as ZImagePipeline
    kinds=("attention", "feed_forward", "adaLN", "norm"),
    lora_targets="attention, feed_forward",  # what diffusers' and musubi-tuner's trainers adapt
)

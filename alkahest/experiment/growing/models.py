"""The real classes at miniature size: transformer, VAE, text encoder, tokenizer and scheduler.

Sizes obey what the classes demand: RoPE axes add up to the head size and are even, a caption and a
picture fill 32 tokens each, the caption width is the text encoder's, latents have 16 channels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from alkahest.model.families.zimage import Architecture
from alkahest.pictures.components import CHAT_TEMPLATE

TEXT_WIDTH = 64
LATENT_CHANNELS = 16

ARCHITECTURE = Architecture(
    layers=4, width=96, feed_forward=256, head=24, caption=TEXT_WIDTH, patch=4 * LATENT_CHANNELS, time=96
)

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def transformer(seed: int) -> ZImageTransformer2DModel:
    """A fresh transformer of 1.5 million parameters; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ZImageTransformer2DModel.from_config(ARCHITECTURE.diffusers_config())


def vae(seed: int) -> AutoencoderKL:
    """A fresh autoencoder of 64 x 64 pictures into 16 x 8 x 8 latents."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=LATENT_CHANNELS,
            block_out_channels=(8, 16, 32, 64),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=1,  # more would take the level of a colour away with its mean
            use_quant_conv=False,
            use_post_quant_conv=False,
            sample_size=64,
        )


def tokenizer(captions: Iterable[str]) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer learnt from captions: about one token a word, any text works."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=_SPECIAL,
        show_progress=False,
    )
    # The words of the chat template count as words too.
    trained.train_from_iterator(["user\n", "assistant\n", *captions], trainer)
    model = json.loads(trained.to_str())["model"]
    built = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token=_SPECIAL[0],
        eos_token=_SPECIAL[2],
        pad_token=_SPECIAL[0],
        additional_special_tokens=_SPECIAL[1:],
    )
    built.chat_template = CHAT_TEMPLATE
    return built


def text_encoder(vocabulary: int, seed: int) -> Qwen3Model:
    """A fresh Qwen3 of three layers; the pipeline reads the output of the second."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3Model(config).eval()


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of Z-Image: static shift, here 3 as the article samples."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)

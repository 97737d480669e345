"""Pipelines of one block as wide as a real model's, around small encoders that read letters.

A prompt is encoded to few columns, since what widens it to a block's own is no part of the block
(in a U-Net it is, for 77 tokens of thousands).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dense_attn.examples import _tiny_pipeline as tiny

_CLIP_TOKENS = 77
_HEADS, _HEAD_DIM, _AXES = 24, 128, (16, 56, 56)  # FLUX's and Qwen-Image's


@dataclass(frozen=True)
class Network:
    """A family: how its pipeline is made, and where its block is."""

    make: Callable[[bool], Any]  # the pipeline, small in a dry run
    component: str
    block: str  # the name of its module
    pixels: int  # of the pipeline's on a side of an image token
    joint: bool = True  # text and image in one attention
    side: int | None = None  # image tokens on a side; None: as asked
    real: bool = False  # as many as at 1,024 pixels: float32 alone, and fewer calls
    call: dict[str, Any] = field(default_factory=dict)  # options of the pipeline's call


def _unet(kind: str, dry: bool, channels: int, heads: int, **sizes: Any) -> Any:
    import diffusers

    pipe = _tiny(kind)
    pipe.unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32 if dry else channels,),
        layers_per_block=1,
        cross_attention_dim=pipe.unet.config.cross_attention_dim,
        attention_head_dim=2 if dry else heads,  # how many there are
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        **sizes,
    ).eval()
    return pipe


def _tiny(kind: str) -> Any:
    """A small pipeline whose CLIP reads as many tokens as the real one."""
    import diffusers

    with mock.patch.object(tiny, "TOKENS", _CLIP_TOKENS):
        return tiny.tiny_pipeline(getattr(diffusers, kind))


def stable_diffusion(dry: bool) -> Any:
    """Stable Diffusion 1.5's finest blocks."""
    return _unet("StableDiffusionPipeline", dry, 320, 8)


def stable_diffusion_xl(dry: bool) -> Any:
    """Stable Diffusion XL's finest blocks with attention."""
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    added |= {"projection_class_embeddings_input_dim": 6 * 8 + tiny.WIDTH}
    return _unet("StableDiffusionXLPipeline", dry, 640, 10, use_linear_projection=True, **added)


def flux(dry: bool) -> Any:
    """FLUX.1's blocks of two streams."""
    pipe = _tiny("FluxPipeline")
    if not dry:
        wide = {"attention_head_dim": _HEAD_DIM, "num_attention_heads": _HEADS}
        options = wide | {"axes_dims_rope": _AXES, "num_single_layers": 0}
        pipe.transformer = _wider(pipe.transformer, **options)
    return pipe


def qwen(dry: bool) -> Any:
    """Qwen-Image's blocks."""
    import diffusers

    tokenizer = _chat_tokenizer()
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16 if dry else _HEAD_DIM,
        num_attention_heads=2 if dry else _HEADS,
        joint_attention_dim=32,
        axes_dims_rope=(8, 4, 4) if dry else _AXES,
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe = diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=_LastHidden(len(tokenizer) + 8, 32),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    # whose own message of the system, here as many tokens as letters, the pipeline drops
    before = pipe.prompt_template_encode.split("{}")[0]
    pipe.prompt_template_encode_start_idx = len(tokenizer(before).input_ids)
    return pipe


def z_image(dry: bool) -> Any:
    """Z-Image's blocks, of one stream."""
    import diffusers

    tokenizer = _chat_tokenizer()
    tokenizer.chat_template = "{{ '<|im_start|>' }}{{ messages[0]['content'] }}{{ '<|im_end|>' }}"
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32 if dry else 30 * _HEAD_DIM,
        n_layers=1,
        n_refiner_layers=0,
        n_heads=2 if dry else 30,
        n_kv_heads=2 if dry else 30,
        cap_feat_dim=16,
        axes_dims=[4, 4, 8] if dry else [32, 48, 48],
        axes_lens=[1024, 128, 128],
    )
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=tiny._vae(4),
        text_encoder=_LastHidden(len(tokenizer) + 8, 16),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def _wider(small: torch.nn.Module, **options: Any) -> torch.nn.Module:
    return type(small).from_config({**small.config, **options}).eval()


def _chat_tokenizer() -> Any:
    """A tokenizer of letters, and of the signs of a chat's template."""
    from transformers import Qwen2Tokenizer

    letters = [*tiny.LETTERS, "Ċ", "Ġ", "<", "|", ">", "_"]
    tokenizer = Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.pad_token = "<|im_end|>"
    return tokenizer


class _LastHidden(torch.nn.Module):
    """A text encoder with the outputs of a language model, of as many layers as are read."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(tokens, width)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def forward(self, input_ids: Tensor, **_: object) -> Any:
        return types.SimpleNamespace(hidden_states=[self.embedding(input_ids)] * 28)


_BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
_UNGUIDED = {"guidance_scale": 1.0}
_TRUE = {"true_cfg_scale": 1.0}
_TWO_STREAMS = "transformer_blocks.0"
_FLUX = partial(Network, flux, "transformer", _TWO_STREAMS, 4)
NETWORKS = {
    "sd15": Network(stable_diffusion, "unet", _BLOCK, 2, joint=False, side=64, call=_UNGUIDED),
    "sdxl": Network(stable_diffusion_xl, "unet", _BLOCK, 2, joint=False, side=64, call=_UNGUIDED),
    "flux": _FLUX(call={"max_sequence_length": 512}),
    "flux-1024px": _FLUX(side=64, real=True, call={"max_sequence_length": 512}),
    "flux-1024px-256": _FLUX(side=64, real=True, call={"max_sequence_length": 256}),
    "flux-1024px-128": _FLUX(side=64, real=True, call={"max_sequence_length": 128}),
    "qwen": Network(qwen, "transformer", _TWO_STREAMS, 16, call=_TRUE),
    "qwen-1024px": Network(qwen, "transformer", _TWO_STREAMS, 16, side=64, real=True, call=_TRUE),
    "z-image": Network(z_image, "transformer", "layers.0", 4, call={"guidance_scale": 0.0}),
}

"""The model: a whole Stable Diffusion 3 pipeline, on 12 x 16 x 16 latents that are the pixels."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from ..tiny_scenes.model import SPECIAL, TOKENS, PixelLatents, load_weights, tokenizer
from ..tiny_scenes.scenes import SIDE, WORDS

WEIGHTS = "tiny_scenes_flow.safetensors"
PARTS = ("transformer", "text_encoder")  # that are trained
TEXT = 96  # width of the text encoder
LAYERS, HEADS, HEAD = 4, 4, 48  # of the transformer


class OneEncoder(StableDiffusion3Pipeline):
    """Stable Diffusion 3's pipeline with the first of its three text encoders alone."""

    usual: ClassVar[dict[str, float]] = {"num_inference_steps": 20, "guidance_scale": 4.0}

    def _get_clip_prompt_embeds(
        self, *args: Any, clip_model_index: int = 0, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Each token's state and the pooled one; of the second encoder, no channels."""
        states, pooled = super()._get_clip_prompt_embeds(*args, **options)
        return (states, pooled) if clip_model_index == 0 else (states[..., :0], pooled[..., :0])

    def _get_t5_prompt_embeds(self, *args: Any, **options: Any) -> Tensor:
        """No tokens of the third encoder."""
        return super()._get_t5_prompt_embeds(*args, **options)[:, :0]


def untrained() -> OneEncoder:
    """The pipeline with random weights, and zeros where a block adds to its input."""
    text = CLIPTextConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=TEXT,
        intermediate_size=2 * TEXT,
        num_hidden_layers=3,  # the last serves the pooled state alone
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=TEXT,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        num_layers=LAYERS,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT,
        caption_projection_dim=HEADS * HEAD,
        pooled_projection_dim=TEXT,
        pos_embed_max_size=SIDE // 4,
        qk_norm="rms_norm",
    )
    _begin_at_zero(transformer)
    pipe = OneEncoder(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=PixelLatents(),
        text_encoder=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer(),
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _begin_at_zero(transformer: SD3Transformer2DModel) -> None:
    """Every block, and the output, begin as nothing, as DiT's do and diffusers' do not."""
    zero = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        zero += [block.norm1.linear, block.norm1_context.linear]
    for layer in zero:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)


def load_pipeline(path: Path | str | None = None) -> OneEncoder:
    """The pipeline with trained weights, by default the shipped ones, in float32."""
    return load_weights(untrained, PARTS, path or str(resources.files(__package__) / WEIGHTS))

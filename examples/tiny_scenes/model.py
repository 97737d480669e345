"""The model: a whole Stable Diffusion pipeline, on 12 x 16 x 16 latents that are the pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from .scenes import SIDE, WORDS

WEIGHTS = "tiny_scenes.safetensors"
PARTS = ("unet", "text_encoder")  # that are trained
TOKENS = 20  # of a prompt
WIDTH = 96  # of the text encoder
CHANNELS = (64, 128)
SPECIAL = ("<start>", "<end>", "<unknown>")


class PixelLatents(ModelMixin, ConfigMixin):
    """In the place of a VAE: 2 x 2 pixels are one latent of 12 channels, and nothing is lost."""

    @register_to_config
    def __init__(
        self, block_out_channels: tuple[int, ...] = (3, 12), latent_channels: int = 12
    ) -> None:
        super().__init__()
        self.register_to_config(scaling_factor=1.0, shift_factor=0.0, force_upcast=False)
        # tells dtype and device
        nothing = torch.zeros((), dtype=torch.float32, device="cpu")
        self.nothing = torch.nn.Parameter(nothing, requires_grad=False)

    def encode(self, images: Tensor, return_dict: bool = True) -> Any:
        """Images [B, 3, H, W] to latents [B, 12, H/2, W/2]."""
        latents = pixel_unshuffle(images, 2)
        return SimpleNamespace(
            latent_dist=SimpleNamespace(mode=lambda: latents, sample=lambda *_: latents)
        )

    def decode(self, latents: Tensor, return_dict: bool = True, generator: object = None) -> Any:
        """And back."""
        images = pixel_shuffle(latents, 2)
        return SimpleNamespace(sample=images) if return_dict else (images,)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    start, end, unknown = SPECIAL
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unknown))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(start, vocabulary[start]), (end, vocabulary[end])]
    words.post_processor = processors.TemplateProcessing(f"{start} $A {end}", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_max_length=TOKENS,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        unk_token=unknown,
    )


def untrained() -> StableDiffusionPipeline:
    """The pipeline with random weights."""
    text = CLIPTextConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2,
        in_channels=12,
        out_channels=12,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=16,
    )
    pipe = StableDiffusionPipeline(
        vae=PixelLatents(),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's, for velocities."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def weights_of(pipe: DiffusionPipeline, parts: Sequence[str] = PARTS) -> dict[str, Tensor]:
    """All that is trained, by name."""
    return {
        f"{part}.{name}": value
        for part in parts
        for name, value in getattr(pipe, part).state_dict().items()
    }


def set_weights(
    pipe: DiffusionPipeline, weights: dict[str, Tensor], parts: Sequence[str] = PARTS
) -> None:
    """The inverse of `weights_of`."""
    for part in parts:
        prefix = f"{part}."
        own = {
            name.removeprefix(prefix): value
            for name, value in weights.items()
            if name.startswith(prefix)
        }
        getattr(pipe, part).load_state_dict(own)


def load_pipeline(path: Path | str | None = None) -> StableDiffusionPipeline:
    """The pipeline with trained weights, by default the shipped ones, in float32."""
    return load_weights(untrained, PARTS, path or str(resources.files(__package__) / WEIGHTS))


def load_weights(
    make: Callable[[], DiffusionPipeline], parts: Sequence[str], path: Path | str
) -> DiffusionPipeline:
    """A pipeline that `make` builds, with the weights of a file in its trained parts."""
    from safetensors.torch import load_file

    with torch.device("cpu"):
        pipe = make()
    for part in (*parts, "vae"):
        getattr(pipe, part).float()
    set_weights(pipe, {name: value.float() for name, value in load_file(path).items()}, parts)
    for part in parts:
        getattr(pipe, part).eval().requires_grad_(False)
    return pipe

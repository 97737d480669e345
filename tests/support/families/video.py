"""Tiny pipelines of random weights of the families of video models."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from pipelines import ALL, diffusers
from torch import Tensor

import families
from dense_attn.examples import _tiny_pipeline as tiny
from families import images

SYSTEM = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
# a video of 3 frames of latents, of 2 x 4 tokens each
SHAPES = {"num_frames": 9, "height": 32, "width": 64, "max_sequence_length": 24}


def wan_2_2() -> object:
    """Two denoisers, of which the second has the last steps."""
    second = tiny._wan()["transformer"]
    return diffusers.WanPipeline(**tiny._wan(), transformer_2=second, boundary_ratio=0.5)


def skyreels() -> object:
    parts = tiny._wan()
    config = dict(parts["transformer"].config)
    parts["transformer"] = diffusers.SkyReelsV2Transformer3DModel.from_config(config)
    text = sys.modules[diffusers.SkyReelsV2Pipeline.__module__]
    if not hasattr(text, "ftfy"):
        text.ftfy = types.SimpleNamespace(fix_text=str)
    return diffusers.SkyReelsV2Pipeline(**parts)


def ltx() -> object:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=32,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        spatial_compression_ratio=16,
        temporal_compression_ratio=4,
    )
    return diffusers.LTXPipeline(
        **tiny._t5("", 32), vae=vae, transformer=transformer, scheduler=families.flow()
    )


def cogvideox(frames: int | None = None) -> object:
    """CogVideoX, with a number of latent frames in a token as CogVideoX 1.5 has them."""
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=8,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        patch_size_t=frames,
        patch_bias=frames is None,
        max_text_seq_length=24,
        use_rotary_positional_embeddings=True,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    return diffusers.CogVideoXPipeline(
        **tiny._t5("", 32),
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )


def hunyuan_tokenizer() -> object:
    """A tokenizer of letters that reads 95 tokens before a prompt: signs, and the rest as one."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    template, count = (DEFAULT_PROMPT_TEMPLATE[name] for name in ("template", "crop_start"))
    before, behind = template.split("{}")
    tokenizer = families.chat_tokenizer()
    rest = before[count - 1 :]
    tokenizer.add_special_tokens({"additional_special_tokens": ["D", rest, behind]})
    return tokenizer


def hunyuan_video() -> object:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=32,
        pooled_projection_dim=tiny.WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    tokenizer, clip = hunyuan_tokenizer(), tiny._clip("_2")
    config = clip["text_encoder_2"].config.to_dict() | {"max_position_embeddings": 77}
    config = type(clip["text_encoder_2"].config)(**config)
    clip["text_encoder_2"] = type(clip["text_encoder_2"])(config)
    return diffusers.HunyuanVideoPipeline(
        **clip,
        vae=vae,
        transformer=transformer,
        scheduler=families.flow(),
        tokenizer=tokenizer,
        text_encoder=families.LastHidden(len(tokenizer) + 8, 32),
    )


def hunyuan_video15() -> object:
    """HunyuanVideo 1.5, whose chats drop what stands before their message here too."""
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
        target_size=32,
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
    )
    tokenizer = families.chat_tokenizer()
    tokenizer.chat_template = SYSTEM
    pipe = diffusers.HunyuanVideo15Pipeline(
        text_encoder=families.LastHidden(len(tokenizer) + 8, 16),
        tokenizer=tokenizer,
        transformer=transformer,
        vae=vae,
        scheduler=families.flow(),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
        **images.glyphs(),
    )
    pipe.system_message, pipe.vision_num_semantic_tokens = "see", 6
    pipe.prompt_template_encode_start_idx = 5  # <|im_start|> s e e <|im_end|>
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 24, 16
    return pipe


KINDS = {
    "LTX": "ltx",
    "CogVideoX": "cogvideox",
    "HunyuanVideo15": "hunyuan_video15",
    "HunyuanVideo": "hunyuan_video",
    "HunyuanSkyreels": "hunyuan_video",
    "SkyReels": "skyreels",
    "ChronoEdit": "skyreels",
}
NAMES = tuple(KINDS)  # how pipelines' names begin
READERS = "image_processor", "feature_extractor"  # the names that classes have for one
CHANNELS = {  # of latents and of an image's beside them, and of a mask's frames
    "CogVideoXImageToVideoPipeline": 8,
    "CogVideoXFunControlPipeline": 8,
    "HunyuanSkyreelsImageToVideoPipeline": 8,
    "SkyReelsV2ImageToVideoPipeline": 12,
    "ChronoEditPipeline": 12,
    "HunyuanVideo15Pipeline": 9,
    "HunyuanVideo15ImageToVideoPipeline": 9,
}
SIZES = {"height": 32, "width": 32, "guidance_scale": 4.0, "negative_prompt": "fog"}


def model_name(name: str) -> str:
    """The family of a pipeline's class."""
    return next(family for start, family in KINDS.items() if name.startswith(start))


def extras(name: str, parts: dict[str, Any]) -> dict[str, Any]:
    """The parts that a class has in the place of others, or beside them."""
    transformer = parts["transformer"]
    config = (
        dict(transformer.config) | ALL | {"in_channels": CHANNELS.get(name, 4), "out_channels": 4}
    )
    kind = type(transformer)
    if config["in_channels"] == 12:  # whose text has 512 tokens behind an image's
        config |= {"image_dim": 8, "added_kv_proj_dim": 24}
        kind = diffusers.ChronoEditTransformer3DModel if "Chrono" in name else kind
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return vision() | {"transformer": kind.from_config(config).eval()}


def arguments(name: str, picture: Tensor) -> dict[str, object]:
    """The arguments of a class's calls, in the place of others."""
    given = {"control_video": [Image.new("RGB", (32, 32))] * 5, "video": [picture] * 5}
    return SIZES | given | ({"max_sequence_length": 512} if CHANNELS.get(name) == 12 else {})


def vision() -> dict[str, Any]:
    """An encoder of images."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    size = {"height": 8, "width": 8}
    processor = CLIPImageProcessor(size=size, crop_size=size)
    encoder = CLIPVisionModel(config).eval()
    return {"image_encoder": encoder} | dict.fromkeys(READERS, processor)


FAMILIES: dict[str, tuple[Callable[[], object], dict[str, object]]] = {
    "wan_2_2": (wan_2_2, SHAPES),
    "skyreels": (skyreels, SHAPES),
    "ltx": (ltx, SHAPES),
    "cogvideox": (cogvideox, {**SHAPES, "guidance_scale": 6.0}),
    "hunyuan_video": (
        hunyuan_video,
        {**SHAPES, "negative_prompt": "fog", "true_cfg_scale": 4.0},
    ),
    "hunyuan_video15": (
        hunyuan_video15,
        {"num_frames": 9, "height": 32, "width": 64, "negative_prompt": "fog"},
    ),
}

"""Tiny pipelines of random weights of the families of models whose records are tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from pipelines import diffusers
from torch import Tensor

from dense_attn.examples import _tiny_pipeline as tiny
from families import images
from families.chats import LastHidden, chat_tokenizer, flow, louder

TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n"
SHAPES = {"height": 16, "width": 24}


def auraflow() -> object:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=256,
    )
    return diffusers.AuraFlowPipeline(
        **tiny._t5("", 32),
        vae=tiny._vae(4),
        transformer=louder(transformer, ".attn."),
        scheduler=flow(),
    )


def wan() -> object:
    return diffusers.WanPipeline(**tiny._wan())


def flux2() -> object:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ '<|im_start|>' }}{{ messages[0]['content'] }}{{ '<|im_end|>' }}"
    return diffusers.Flux2KleinPipeline(
        scheduler=flow(),
        vae=vae,
        text_encoder=LastHidden(len(tokenizer) + 8, 16),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def z_image() -> object:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 4, 8],
        axes_lens=[128, 32, 32],
    )
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if name.endswith("pad_token"):
                weight.normal_()  # its memory is not filled
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ '<|im_start|>' }}{{ messages[0]['content'] }}{{ '<|im_end|>' }}"
    return diffusers.ZImagePipeline(
        scheduler=flow(),
        vae=tiny._vae(4),
        text_encoder=LastHidden(len(tokenizer) + 8, 16),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def qwen() -> object:
    tokenizer = chat_tokenizer()
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(8, 4, 4),
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
        scheduler=flow(),
        vae=vae,
        text_encoder=LastHidden(len(tokenizer) + 8, 32),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipe.prompt_template_encode = TEMPLATE
    pipe.prompt_template_encode_start_idx = len(tokenizer(TEMPLATE.split("{}")[0]).input_ids)
    return pipe


def chroma() -> object:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return diffusers.ChromaPipeline(
        **tiny._t5("", 32), vae=tiny._vae(4), transformer=transformer, scheduler=flow()
    )


def lumina2() -> object:
    transformer = diffusers.Lumina2Transformer2DModel(
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 16, 16),
        cap_feat_dim=32,
    )
    pipe = diffusers.Lumina2Pipeline(
        **tiny._t5("", 32), vae=tiny._vae(4), transformer=transformer, scheduler=flow()
    )
    pipe.system_prompt = "s"
    return pipe


def pixart() -> object:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        caption_channels=32,
    )
    return diffusers.PixArtSigmaPipeline(
        **tiny._t5("", 32),
        vae=tiny._vae(4),
        transformer=louder(transformer, ".attn"),
        scheduler=tiny._ddim(),
    )


# how each is made, and what its calls are given beside a prompt
FAMILIES: dict[str, tuple[Callable[[], object], dict[str, object]]] = {
    "auraflow": (auraflow, {"max_sequence_length": 24, **SHAPES}),
    "flux2": (flux2, {"max_sequence_length": 24, **SHAPES}),
    "wan": (wan, {"max_sequence_length": 24, "num_frames": 5, "height": 32, "width": 48}),
    "qwen": (qwen, {"height": 32, "width": 48, "true_cfg_scale": 4.0, "negative_prompt": "fog"}),
    "z_image": (z_image, {"negative_prompt": "fog " * 12, "max_sequence_length": 64, **SHAPES}),
    "lumina2": (lumina2, {"max_sequence_length": 32, "height": 32, "width": 48}),
    "pixart": (
        pixart,
        {
            "max_sequence_length": 20,
            "clean_caption": False,
            "use_resolution_binning": False,
            **SHAPES,
        },
    ),
    "chroma": (chroma, {"max_sequence_length": 24, "negative_prompt": "fog", **SHAPES}),
    **images.FAMILIES,
}


def made_of(name: str) -> tuple[Callable[[], object], dict[str, object]]:
    from families import video

    return (FAMILIES | video.FAMILIES)[name]


@cache
def family(name: str) -> object:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = made_of(name)[0]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(name: str, prompt: str, *, steps: int = 4, **options: object) -> Tensor:
    """The latents of a whole run."""
    given = made_of(name)[1] | {"generator": torch.Generator().manual_seed(0)} | options
    return family(name)(
        prompt=prompt, num_inference_steps=steps, output_type="latent", return_dict=False, **given
    )[0]

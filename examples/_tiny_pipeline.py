"""Pipelines of random weights in the shape of real ones: no download, pictures of noise."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dense_attn import _command, _files

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENS = 16  # of a prompt
WIDTH = 16  # of a text encoder


def tiny_pipeline(
    kind: type[DiffusionPipeline], seed: int = 0, blocks: int = 2
) -> DiffusionPipeline:
    """A pipeline built like Stable Diffusion's, its XL's and 3's, FLUX's or Wan's.

    A latent has 2 x 2 pixels, of Wan's 8 x 8.

    Args:
        kind: the class, of which the constructor's arguments say what it is made of.
        seed: of the weights.
        blocks: resolutions of a U-Net; 4 have Stable Diffusion 1.5's 32 attention layers.
    """
    from inspect import signature

    parts = signature(kind.__init__).parameters
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if "transformer" not in parts:
            made = (
                _stable_diffusion_xl(blocks)
                if "text_encoder_2" in parts
                else _stable_diffusion(blocks)
            )
        elif "transformer_2" in parts:
            made = _wan()
        else:
            made = _stable_diffusion_3() if "tokenizer_3" in parts else _flux()
        pipe = kind(**{name: part for name, part in made.items() if name in parts})
    for part in made.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # as from_pretrained does
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_modular_pipeline(seed: int = 0) -> Any:
    """Stable Diffusion XL's modular pipeline, of the parts of `tiny_pipeline`."""
    from diffusers import StableDiffusionXLPipeline
    from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

    parts = tiny_pipeline(StableDiffusionXLPipeline, seed).components
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    needed = pipe.components.keys()
    pipe.update_components(
        **{name: part for name, part in parts.items() if part is not None and name in needed}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def command_line(description: str, model: str) -> tuple[str | None, int]:
    """The --model and --steps of an example."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", help=f"such as {model}; none: random weights, noise"
    )
    parser.add_argument("--steps", type=int, default=20, help="of denoising (20)")
    arguments = parser.parse_args()
    if arguments.model is None:
        print(f"no --model, such as {model}: random weights, so the picture is noise")
    return arguments.model, arguments.steps


def load(kind: str, model: str | None) -> DiffusionPipeline:
    """A pipeline of a model, or of random weights, on the GPU where there is one."""
    import diffusers

    if model is None:
        return tiny_pipeline(getattr(diffusers, kind))
    gpu = torch.cuda.is_available()
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        model, torch_dtype=torch.bfloat16 if gpu else torch.float32
    )
    return pipe.to("cuda" if gpu else "cpu")


def side_by_side(images: list[Image.Image], path: str) -> None:
    """Write images into one file."""
    _files.write_by(path, partial(joined(images).save, format="PNG"))
    print(f"wrote {path}")


def joined(images: list[Image.Image]) -> Image.Image:
    """Images as one, from left to right."""
    from PIL import Image

    whole = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for i, image in enumerate(images):
        whole.paste(image, (i * image.width, 0))
    return whole


def animation(videos: list[list[Image.Image]], path: str) -> None:
    """Write the frames of videos, side by side, into one GIF of 16 frames a second."""
    frames = [joined(list(images)) for images in zip(*videos)]
    options = {"format": "GIF", "save_all": True, "append_images": frames[1:], "loop": 0}
    _files.write_by(path, partial(frames[0].save, duration=1000 // 16, **options))
    print(f"wrote {path}")


def command(main: Callable[[], None]) -> None:
    """Run an example to its end, as the library's own commands run."""
    sys.exit(_command.run(Path(sys.argv[0]).stem, main))


def _stable_diffusion(blocks: int) -> dict[str, Any]:
    return {
        **_clip(""),
        "unet": _unet(blocks),
        "vae": _vae(4),
        "scheduler": _ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _stable_diffusion_xl(blocks: int) -> dict[str, Any]:
    embedding = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    sizes = {
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
        "cross_attention_dim": 2 * WIDTH,
    }
    unet = _unet(blocks, **embedding, **sizes)
    return {
        **_clip(""),
        **_clip("_2", projection=True),
        "unet": unet,
        "vae": _vae(4),
        "scheduler": _ddim(),
    }


def _stable_diffusion_3() -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        out_channels=16,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    encoders = {**_clip("", projection=True), **_clip("_2", projection=True), **_t5("_3", 32)}
    return {
        **encoders,
        "transformer": transformer,
        "vae": _vae(16),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


def _flux() -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    return {
        **_clip(""),
        **_t5("_2", 32),
        "transformer": transformer,
        "vae": _vae(4),
        "scheduler": scheduler,
    }


def _wan() -> dict[str, Any]:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=8,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    return {**_t5("", 32), "vae": vae, "transformer": transformer, "scheduler": scheduler}


def _clip(suffix: str, projection: bool = False) -> dict[str, Any]:
    """A text encoder that reads letters, and its tokenizer."""
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *LETTERS,
        *(f"{letter}</w>" for letter in LETTERS),
    ]
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        projection_dim=WIDTH,
        **sizes,
    )
    encoder = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    tokenizer = CLIPTokenizer(
        {token: i for i, token in enumerate(tokens)}, [], model_max_length=TOKENS
    )
    return {f"text_encoder{suffix}": encoder, f"tokenizer{suffix}": tokenizer}


def _t5(suffix: str, width: int) -> dict[str, Any]:
    """A T5 text encoder that reads letters, and its tokenizer."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    vocabulary = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")] + [
        (token, -2.0) for token in ("▁", *LETTERS)
    ]
    config = T5Config(
        vocab_size=len(vocabulary), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=2 * TOKENS)
    return {f"text_encoder{suffix}": T5EncoderModel(config), f"tokenizer{suffix}": tokenizer}


def _unet(blocks: int, cross_attention_dim: int = WIDTH, **options: Any) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    down = ["CrossAttnDownBlock2D"] * (blocks - 1) + ["DownBlock2D"]
    up = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (blocks - 1)
    if blocks == 2:  # attention in the middle of the depth alone
        down, up = down[::-1], up[::-1]
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16, 16)[:blocks],
        layers_per_block=1 if blocks == 2 else 2,
        norm_num_groups=4,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        down_block_types=down,
        up_block_types=up,
        **options,
    )


def _vae(channels: int) -> torch.nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        shift_factor=0.0,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )


def _ddim() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )

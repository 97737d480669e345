"""Which pipelines of Stable Diffusion 1 and 2 reversible chains take, and latents of theirs."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from dense_attn import _checks

from ..hooks import unwrapped, watchers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PARTS = ("vae", "tokenizer", "text_encoder", "scheduler")
ENCODED = (
    "prompt",
    "negative_prompt",
    "device",
    "num_images_per_prompt",
    "do_classifier_free_guidance",
)
WANTED = {  # what a U-Net's config says that it wants beside latents, timestep and text
    "class_embed_type": "class labels",
    "num_class_embeds": "class labels",
    "time_cond_proj_dim": "the guidance scale's embedding, as those distilled for few steps (LCM)",
}


def is_stable_diffusion(pipe: DiffusionPipeline) -> bool:
    """Whether a pipeline is to be one of Stable Diffusion 1 or 2: XL's U-Net is told of sizes."""
    unet = unwrapped(getattr(pipe, "unet", None))
    known = type(unet).__name__ == "UNet2DConditionModel"
    return known and unet.config.addition_embed_type != "text_time"


def check_pipe(pipe: DiffusionPipeline, *, pictures: bool = True) -> None:
    """Refuse all but Stable Diffusion 1 and 2, whose U-Net takes latents, time and text alone.

    Args:
        pipe: any.
        pictures: whether images are to be made tensors or tensors images.
    """
    unet, kind = unwrapped(getattr(pipe, "unet", None)), type(pipe).__name__
    if unet.config.addition_embed_type:
        _checks.refuse("pipe", "be of Stable Diffusion 1 or 2", kind)
    parts = (*PARTS, "image_processor") if pictures else PARTS
    missing = [name for name in parts if getattr(pipe, name, None) is None]
    if missing:
        _checks.refuse(
            "pipe", "be of Stable Diffusion 1 or 2", f"{kind} without {', '.join(missing)}"
        )
    try:
        inspect.signature(pipe.encode_prompt).bind(**dict.fromkeys(ENCODED))
    except (AttributeError, TypeError):
        _checks.refuse("pipe", "have an encode_prompt of a prompt", kind)
    _check_inputs(
        kind, unet.config, getattr(pipe.vae.config, "latent_channels", unet.config.in_channels)
    )
    if watchers(unet):
        _checks.refuse(
            "pipe",
            "be outside of apply_layout and semantic_guidance",
            "a pipeline inside of such a block",
        )


def _check_inputs(kind: str, config: Any, channels: int) -> None:
    """Refuse a U-Net that wants more than it would be given."""
    if (config.in_channels, config.out_channels) != (channels, channels):
        rule = f"have a U-Net of {channels} channels in and out, those of its VAE's latents"
        _checks.refuse(
            "pipe", rule, f"{kind} with {config.in_channels} in and {config.out_channels} out"
        )
    for name, what in WANTED.items():
        if config[name] is not None:
            _not_alone(kind, f"{name}={config[name]!r}, which wants {what}")
    if config.encoder_hid_dim_type not in (None, "text_proj"):
        _not_alone(
            kind,
            (
                f"encoder_hid_dim_type={config.encoder_hid_dim_type!r}, which wants an image "
                "(IP-Adapter)"
            ),
        )


def _not_alone(kind: str, got: str) -> NoReturn:
    _checks.refuse("pipe", "have a U-Net of latents, timestep and text alone", f"{kind} with {got}")


def noise_shape(
    pipe: DiffusionPipeline,
    count: int,
    height: int | None,
    width: int | None,
    latents: Tensor | None,
) -> tuple[int, ...]:
    """The shape of the noise of images: that of latents, or the U-Net's own by default."""
    config, unit = unwrapped(pipe.unet).config, pipe.vae_scale_factor
    own = config.sample_size if latents is None else None
    rows, columns = own if isinstance(own, (list, tuple)) else (own, own)
    rows, columns = (
        latent if side is None else side // unit
        for side, latent in ((height, rows), (width, columns))
    )
    if latents is not None:
        _check_latents(latents, (count, config.in_channels, rows or "height", columns or "width"))
        check_noise(pipe, "latents", latents)
        return tuple(latents.shape)
    for name, side in (("height", rows), ("width", columns)):
        if side is None:
            _checks.refuse(name, "be given for a U-Net without a sample_size", side)
    return count, config.in_channels, rows, columns


def _check_latents(latents: Tensor, wanted: tuple[int | str, ...]) -> None:
    """Refuse what has not the shape wanted, where a word stands for any length."""
    shape = tuple(latents.shape) if isinstance(latents, Tensor) else ()
    if (
        len(shape) != 4
        or 0 in shape
        or any(a != b for a, b in zip(shape, wanted) if isinstance(b, int))
    ):
        rule = f"be a tensor of shape ({', '.join(map(str, wanted))})"
        _checks.refuse(
            "latents", rule, shape if isinstance(latents, Tensor) else type(latents).__name__
        )


def check_noise(pipe: DiffusionPipeline, argument: str, noise: Tensor) -> None:
    """Refuse noise that the pipeline's U-Net cannot be given."""
    device, channels = pipe._execution_device, unwrapped(pipe.unet).config.in_channels
    if _checks.floats(argument, noise).dim() != 4 or noise.shape[1] != channels:
        _checks.refuse(argument, f"be of pipe's {channels} channels", f"shape {tuple(noise.shape)}")
    if noise.device.type != device.type:
        _checks.refuse(argument, f"be on pipe's device {device}", noise.device)
    if not noise.isfinite().all():
        _checks.refuse(argument, "be finite", "nan or inf")

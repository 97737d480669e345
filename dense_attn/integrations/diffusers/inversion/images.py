"""Images as a pipeline's VAE takes them: which are, and what becomes of their sides."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from dense_attn import _checks

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DEEP = ("I", "F")  # how the modes begin of whose values PIL cuts off what 8 bits do not hold


def check_images(
    pipe: DiffusionPipeline, images: Any, least: int | None = None
) -> list[Any] | Tensor:
    """PIL images in colour and of one size, or a tensor [B, 3, H, W] in 0..1.

    `least`: pixels on a side, None for the image processor's own.
    """
    # ConsistencyDecoderVAE has another name for it
    channels = getattr(pipe.vae.config, "in_channels", 3)
    if channels != 3:
        got = f"{type(pipe).__name__} with {channels}"
        _checks.refuse("pipe", "have a VAE of images of 3 channels", got)
    images = _tensor(images) if isinstance(images, Tensor) else pictures(images)
    least = least or pipe.image_processor.config.vae_scale_factor
    width, height = size_of(images)
    if min(width, height) < least:
        _checks.refuse("image", f"be of at least {least} x {least} pixels", f"{width} x {height}")
    return images


def pixels_of(
    pipe: DiffusionPipeline, images: list[Any] | Tensor, unit: int | None = None
) -> Tensor:
    """Images [B, 3, H, W] in -1..1 of sides that the VAE takes; says so where they were others.

    `unit`: what the sides are to be multiples of, None for the image processor's own.
    """
    before, sides = size_of(images), {}
    if unit is not None:
        sides = {name: side - side % unit for name, side in zip(("width", "height"), before)}
    pixels = pipe.image_processor.preprocess(images, **sides)
    after = size_of(pixels)
    if before != after:
        unit = unit or pipe.image_processor.config.vae_scale_factor
        rule = f"have sides of multiples of {unit} to be taken as it is"
        text = f"image must {rule}, got {before[0]} x {before[1]}"
        warnings.warn(f"{text}: it is resized to {after[0]} x {after[1]}", stacklevel=3)
    return pixels.to(pipe._execution_device)


def size_of(images: list[Any] | Tensor) -> tuple[int, int]:
    """The images' width and height."""
    return (images.shape[3], images.shape[2]) if isinstance(images, Tensor) else images[0].size


def _tensor(images: Tensor) -> Tensor:
    if _checks.tensor("image", images).dim() != 4 or images.shape[1] != 3 or not images.numel():
        _checks.refuse("image", "have shape (B, 3, H, W)", tuple(images.shape))
    return check_values(images)


def check_values(images: Tensor, rule: str = "be a tensor of floats in 0..1") -> Tensor:
    """Tensors of floats in 0..1."""
    if images.dtype not in _checks.DTYPES:
        _checks.refuse("image", rule, _checks.name(images.dtype), TypeError)
    _checks.readable("image", images)
    if not bool(((images >= 0) & (images <= 1)).all()):
        _checks.refuse("image", rule, _bounds(*(bound.item() for bound in images.aminmax())))
    return images


def _bounds(low: float, high: float) -> str:
    """Values in words, by the least and the largest."""
    return "nan" if low != low else f"values from {low:g} to {high:g}"


def pictures(images: Any, argument: str = "image", level: int = 4) -> list[Any]:
    """PIL images of one size, in colour; `level` frames up stands the user's line."""
    listed = images if isinstance(images, (list, tuple)) else [images]
    if not listed or not all(hasattr(image, "convert") for image in listed):
        kinds = ", ".join(dict.fromkeys(type(image).__name__ for image in listed)) or "nothing"
        got = f"a {type(images).__name__} of {kinds}" if listed is images else kinds
        _checks.refuse("image", "be a PIL image, a list of them or a tensor", got, TypeError)
    sizes = dict.fromkeys(f"{image.width} x {image.height}" for image in listed)
    if len(sizes) > 1:
        _checks.refuse("image", "hold pictures of one size", " and ".join(sizes))
    if any(_transparent(image) for image in listed):
        text = f"{argument} must be opaque to be taken as it looks, got transparent pixels"
        warnings.warn(f"{text}: their colours are taken instead", stacklevel=level)
    return [_in_colour(image) for image in listed]


def _transparent(image: Any) -> bool:
    if image.mode == "LAB" or ("A" not in image.getbands() and "transparency" not in image.info):
        return False  # of LAB A is a colour
    return image.convert("RGBA").getchannel("A").getextrema()[0] < 255


def _in_colour(image: Any) -> Any:
    """The image in 8 bits a channel, where they hold it."""
    if image.mode.startswith(DEEP) and image.width and image.height:
        low, high = np.min(image), np.max(image)
        if not (low >= 0 and high <= 255) or (image.mode == "F" and 0 < high <= 1):
            rule = f"hold values in 0..255 where it is of mode {image.mode}"
            _checks.refuse("image", rule, _bounds(low, high))
    return image.convert("RGB")

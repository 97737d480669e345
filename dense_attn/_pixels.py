"""PIL images of every mode, depth, palette, alpha and orientation as a mask or as labels."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

from dense_attn import _checks

if TYPE_CHECKING:
    from PIL import Image

WHOLE = 2.0**53  # float64 counts up to here


def mask(argument: str, image: Image.Image) -> np.ndarray:
    """The light and opaque pixels, bool [H, W]: luminance * alpha at least half of white.

    White is 255. Modes of one wide channel ("I;16", "I", "F") have the smallest white of 1 ("F"
    alone), 255, 511, ... 65535, ... (8, 9, ... bits) that holds their largest value: scanners write
    12 bits into 16.
    """
    image = _upright(image)
    if _is_wide(image):
        values = _values(argument, image)
        return (2 * values >= _white(image, values)) & _visible(image)
    colours = _colours(image)
    luminance, alpha = (
        np.asarray(band).astype(np.int64)
        for band in (colours.convert("L"), colours.getchannel("A"))
    )
    return 2 * luminance * alpha >= 255 * 255


def labels(argument: str, image: Image.Image) -> np.ndarray:
    """The labels of an image's pixels, int64 [H, W], 0 where it is transparent.

    Palette entries and values of one channel are labels as they are; in a colour image every colour
    is one, black 0.
    """
    image = _upright(image)
    if _is_wide(image):
        values = _values(argument, image)
        if not bool(((values == np.floor(values)) & (abs(values) <= WHOLE)).all()):
            _checks.refuse(
                argument, "hold whole numbers", f"others in an image of mode {image.mode}"
            )
        return values.astype(np.int64) * _visible(image)
    if image.mode in ("1", "L", "P", "LA", "PA", "La"):
        first = (image.convert("LA") if image.mode == "La" else image).getchannel(0)
        return np.asarray(first).astype(np.int64) * _visible(image)
    red, green, blue, alpha = np.moveaxis(np.asarray(_colours(image)).astype(np.int64), -1, 0)
    return ((red << 16) | (green << 8) | blue) * (alpha > 0)


def _upright(image: Image.Image) -> Image.Image:
    """An image as its EXIF orientation shows it; EXIF that cannot be read turns nothing."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, struct.error):
        return image


def _is_wide(image: Image.Image) -> bool:
    return image.mode.split(";")[0] in ("I", "F")


def _values(argument: str, image: Image.Image) -> np.ndarray:
    """The values of a wide channel, float64 [H, W], which PIL's own conversion would cut off."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        _checks.refuse(argument, "hold finite values", f"others in an image of mode {image.mode}")
    return values


def _white(image: Image.Image, values: np.ndarray) -> float:
    largest = values.max(initial=0.0)
    if image.mode == "F" and largest <= 1:
        return 1.0
    return float(2 ** max(8, int(np.ceil(largest)).bit_length()) - 1)


def _visible(image: Image.Image) -> np.ndarray:
    """The pixels that are not fully transparent, bool [H, W]."""
    if _is_wide(image):
        return np.asarray(image) != image.info.get("transparency", np.nan)
    return np.asarray(_colours(image).getchannel("A")) > 0


def _colours(image: Image.Image) -> Image.Image:
    """An image of 8-bit channels in the mode RGBA."""
    # there is no way from the one, and one without alpha from the other
    between = {"La": "LA", "LAB": "RGB"}.get(image.mode)
    return (image if between is None else image.convert(between)).convert("RGBA")

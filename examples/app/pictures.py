"""Pictures of the page: images with their settings inside, and the words of the latent grid."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dense_attn import Layout

from . import canvas
from .refused import refuse
from .settings import Settings, from_json

if TYPE_CHECKING:
    from PIL import Image

KEY = "dense_attn"  # of the text in a PNG
MOST_BYTES = 1 << 20  # of settings in JSON
SHOWN = 256  # pixels at least of a shown image


def png(image: Image.Image, settings: str) -> bytes:
    """An image as PNG, with settings in it."""
    from PIL.PngImagePlugin import PngInfo

    info, buffer = PngInfo(), io.BytesIO()
    info.add_text(KEY, settings)
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_settings(path: str | Path) -> tuple[Settings, str]:
    """The settings in a PNG or a JSON file of the page, and the name of their model."""
    from PIL import Image

    text: object = None
    try:
        with open(path, "rb") as file:
            start = file.read(MOST_BYTES + 1)
        if start.startswith(b"\x89PNG"):
            with Image.open(path) as image:
                text = image.info.get(KEY)
        elif len(start) <= MOST_BYTES:
            text = start.decode()
    except (Image.DecompressionBombError, SyntaxError, ValueError, OSError):
        pass
    if not isinstance(text, str):
        refuse("file", "the file", "be an image of this page or its JSON", Path(path).name)
    return from_json(text)


def shown(image: Image.Image) -> Image.Image:
    """An image large enough to be looked at, its pixels kept."""
    factor = -(-SHOWN // image.width)
    return image.resize((image.width * factor, image.height * factor), 0) if factor > 1 else image


def words_picture(labels: np.ndarray, grid: tuple[int, int]) -> Image.Image:
    """Region words [height x width] of the latent grid, each in its region's colour."""
    from PIL import Image

    painted = [int(label) for label in np.unique(labels) if label]
    words = Layout(np.stack([labels == label for label in painted])).query_regions(*grid)
    found = np.zeros(grid, dtype=np.uint8)
    for bit, label in enumerate(painted):
        found[(words.view(grid).numpy() >> bit & 1).astype(bool)] = label
    cell = max(4, SHOWN // max(grid))
    picture = Image.new("RGBA", (grid[1] * cell, grid[0] * cell), "#ffffff")
    picture.alpha_composite(canvas.painting(found, cell))
    pixels = np.asarray(picture.convert("RGB")).copy()
    pixels[::cell], pixels[:, ::cell] = 200, 200  # the lines between tokens
    return Image.fromarray(pixels)

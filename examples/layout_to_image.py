"""A layout to an image: two animals where two boxes say, with Stable Diffusion, XL or 3."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dense_attn.examples._tiny_pipeline import command, command_line, load, side_by_side
from dense_attn.integrations.diffusers import apply_layout

if TYPE_CHECKING:
    from PIL import Image

MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PROMPT = "a cat and a dog"
# x0, y0, x1, y1 of the image
REGIONS = [("a cat", (0.05, 0.4, 0.45, 1.0)), ("a dog", (0.55, 0.2, 1.0, 1.0))]


def main(model: str | None = None, steps: int = 50) -> list[Image.Image]:
    """The image of a prompt without and with the layout, from the same noise."""
    pipe = load("StableDiffusionPipeline", model)

    def image() -> Image.Image:
        return pipe(
            PROMPT, num_inference_steps=steps, generator=torch.Generator().manual_seed(0)
        ).images[0]

    plain = image()
    with apply_layout(pipe, PROMPT, REGIONS):
        return [plain, image()]


if __name__ == "__main__":
    command(lambda: side_by_side(main(*command_line(__doc__, MODEL)), "layout_to_image.png"))

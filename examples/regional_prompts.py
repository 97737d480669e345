"""Regional prompting: a prompt for each region of an image, on U-Nets, FLUX and other models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dense_attn.examples._tiny_pipeline import command, command_line, load, side_by_side
from dense_attn.integrations.diffusers import Region, apply_layout

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

MODEL = "black-forest-labs/FLUX.1-dev"
TINY = "StableDiffusionPipeline", "FluxPipeline"  # both run where no model is given
PROMPT = "a forest in winter"
REGIONS = [
    Region((0.0, 0.3, 0.5, 1.0), "a red fox in the snow"),
    Region((0.5, 0.0, 1.0, 0.7), "a blue owl on a branch"),
]


def main(model: str | None = None, steps: int = 28) -> list[Image.Image]:
    """The images of each pipeline without and with regions, from the same noise."""
    if model is not None:
        return pair(load("DiffusionPipeline", model), steps)
    size = {"height": 32, "width": 32}
    return [image for kind in TINY for image in pair(load(kind, None), steps, **size)]


def pair(pipe: DiffusionPipeline, steps: int, **size: Any) -> list[Image.Image]:
    """The image of the call's prompt, and that of the regions' with a fifth of it beneath."""

    def image() -> Image.Image:
        generator = torch.Generator().manual_seed(0)
        return pipe(PROMPT, num_inference_steps=steps, generator=generator, **size).images[0]

    plain = image()
    with apply_layout(pipe, PROMPT, REGIONS, base_ratio=0.2):
        return [plain, image()]


if __name__ == "__main__":
    command(lambda: side_by_side(main(*command_line(__doc__, MODEL)), "regional_prompts.png"))

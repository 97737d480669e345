"""One line turns concepts of an image up or down, with Stable Diffusion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dense_attn.examples._tiny_pipeline import command, command_line, load, side_by_side
from dense_attn.integrations.diffusers import Edit, semantic_guidance

if TYPE_CHECKING:
    from PIL import Image

MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PROMPT = "a photo of the face of a woman"


def main(model: str | None = None, steps: int = 50) -> list[Image.Image]:
    """The image of a prompt, and that with a smile and without glasses, from the same noise."""
    pipe = load("StableDiffusionPipeline", model)
    smile = Edit("smiling, smile", scale=5, threshold=0.95, warmup=steps // 5)
    glasses = Edit("glasses", scale=4, warmup=steps // 5, reverse=True)

    def image() -> Image.Image:
        return pipe(
            PROMPT, num_inference_steps=steps, generator=torch.Generator().manual_seed(0)
        ).images[0]

    plain = image()
    with semantic_guidance(pipe, [smile, glasses]):
        return [plain, image()]


if __name__ == "__main__":
    command(lambda: side_by_side(main(*command_line(__doc__, MODEL)), "semantic_edit.png"))

"""A picture to its noise and back, and back under another prompt: exact inversion on a Stable Diffusion pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dense_attn.examples._tiny_pipeline import command_line, load, side_by_side
from dense_attn.integrations.diffusers import invert, optimize, reconstruct

if TYPE_CHECKING:
    from PIL import Image

MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def main(model: str | None = None, steps: int = 50) -> list[Image.Image]:
    """A picture, its reconstruction, an edit of it, and a picture whose noise was optimised to be red."""
    pipe = load("StableDiffusionPipeline", model)
    start = torch.Generator().manual_seed(0)
    picture = pipe("a cat", num_inference_steps=steps, generator=start).images[0]
    inversion = invert(pipe, picture, "a cat", num_inference_steps=steps)
    print(f"inverted in {inversion.seconds:.1f} s")

    def not_red(images: torch.Tensor) -> torch.Tensor:  # [B, 3, H, W] in -1..1
        return (images - torch.tensor([0.8, -0.4, -0.6], device=images.device).view(1, 3, 1, 1)).square().mean()

    red = optimize(pipe, "a cat", not_red, num_inference_steps=min(steps, 20), steps=min(steps, 20), clip=1e-2)
    print(f"optimised in {red.seconds:.1f} s, {(red.peak_bytes or 0) / 1e6:.0f} MB at the peak")
    return [picture, reconstruct(pipe, inversion)[0], reconstruct(pipe, inversion, "a dog")[0], red.images[0]]


if __name__ == "__main__":
    side_by_side(main(*command_line(__doc__, MODEL)), "pipeline_inversion.png")

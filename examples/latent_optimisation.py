"""Change the noise until the image is red, then until its salient part is: DOODL and SGOOL."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dense_attn import spectral_residual_saliency
from dense_attn.examples._tiny_pipeline import command, command_line, load, side_by_side
from dense_attn.integrations.diffusers import optimize

if TYPE_CHECKING:
    from PIL import Image

MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
RED = (0.8, -0.4, -0.6)  # in -1..1


def not_red(images: torch.Tensor) -> torch.Tensor:  # [B, 3, H, W] in -1..1
    """How far the mean colour is from red."""
    return (images.mean((2, 3)) - images.new_tensor(RED)).square().mean()


def main(model: str | None = None, steps: int = 20) -> tuple[list[Image.Image], list[list[float]]]:
    """The image at the start, DOODL's and SGOOL's; the losses of both."""
    pipe = load("StableDiffusionPipeline", model)
    images, losses = [], []
    for name, updates, saliency in (
        ("", 0, None),
        ("DOODL", steps, None),
        ("SGOOL", steps, spectral_residual_saliency),
    ):
        start = torch.Generator().manual_seed(0)
        found = optimize(
            pipe,
            "a bowl of fruit",
            not_red,
            saliency,
            num_inference_steps=steps,
            steps=updates,
            clip=3e-2,
            generator=start,
            progress=False,
        )
        images += found.images
        if updates:
            losses.append(found.result.losses)
            cost = f"{found.seconds:.1f} s, {(found.peak_bytes or 0) / 1e6:.0f} MB at the peak"
            print(
                f"{name}: loss {losses[-1][0]:.4f} to {losses[-1][-1]:.4f} in {updates} "
                f"updates, {cost}"
            )
    return images, losses


if __name__ == "__main__":
    command(lambda: side_by_side(main(*command_line(__doc__, MODEL))[0], "latent_optimisation.png"))

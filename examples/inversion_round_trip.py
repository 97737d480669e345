"""A picture to its noise and back, and back under another prompt, by exact inversion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dense_attn.examples._tiny_pipeline import command, command_line, load, side_by_side
from dense_attn.integrations.diffusers import invert, reconstruct

if TYPE_CHECKING:
    from PIL import Image

MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def main(model: str | None = None, steps: int = 50) -> tuple[list[Image.Image], dict[str, float]]:
    """A picture, its reconstruction and an edit; the latents' errors, largest over largest."""
    pipe = load("StableDiffusionPipeline", model)
    start = torch.Generator().manual_seed(0)
    picture = pipe("a cat", num_inference_steps=steps, generator=start).images[0]
    pixels = pipe.image_processor.preprocess(picture).to(pipe.device, pipe.vae.dtype)
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    errors = {}
    for name, sampler in {"floats": {"exact": False}, "exact": {}}.items():
        inversion = invert(pipe, picture, "a cat", num_inference_steps=steps, **sampler)
        back = reconstruct(pipe, inversion, output_type="latent")
        errors[name] = ((back - latents).abs().max() / latents.abs().max()).item()
    return [
        picture,
        reconstruct(pipe, inversion)[0],
        reconstruct(pipe, inversion, "a dog")[0],
    ], errors


def show() -> None:
    """Print the errors, draw the images."""
    images, errors = main(*command_line(__doc__, MODEL))
    print(
        f"latents after the round trip are off by {errors['exact']:.1e}, in floats by "
        f"{errors['floats']:.1e}"
    )
    side_by_side(images, "inversion_round_trip.png")


if __name__ == "__main__":
    command(show)

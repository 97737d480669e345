"""Regional prompting with FLUX: tokens of a region alone see its phrase of the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dense_attn.examples._tiny_pipeline import command, command_line, load, side_by_side
from dense_attn.integrations.diffusers import apply_layout

if TYPE_CHECKING:
    from PIL import Image

MODEL = "black-forest-labs/FLUX.1-dev"
PROMPT = "a red fox and a blue owl"
REGIONS = [("a red fox", (0.0, 0.3, 0.5, 1.0)), ("a blue owl", (0.5, 0.0, 1.0, 0.7))]


def main(model: str | None = None, steps: int = 28) -> list[Image.Image]:
    """The image of a prompt without and with its regions, from the same noise."""
    pipe = load("FluxPipeline", model)
    size = {} if model else {"height": 32, "width": 32, "max_sequence_length": 64}

    def image() -> Image.Image:
        generator = torch.Generator().manual_seed(0)
        return pipe(PROMPT, num_inference_steps=steps, generator=generator, **size).images[0]

    plain = image()
    with apply_layout(pipe, PROMPT, REGIONS, modulation="mask", active=0.4):
        return [plain, image()]


if __name__ == "__main__":
    command(lambda: side_by_side(main(*command_line(__doc__, MODEL)), "flux_regional_prompt.png"))

"""A layout to a video: a cat that walks from left to right past a dog, with Wan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dense_attn.examples._tiny_pipeline import animation, command, command_line, load
from dense_attn.integrations.diffusers import apply_layout

if TYPE_CHECKING:
    from PIL import Image

MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
PROMPT = "a cat and a dog"
DOG = (0.35, 0.1, 0.65, 0.5)  # x0, y0, x1, y1 of every frame


def walk(frames: int) -> torch.Tensor:
    """The lower half of two fifths of the width, going to the right, bool [frames, 30, 52]."""
    x = (torch.arange(52) + 0.5) / 52
    left = torch.linspace(0, 0.6, frames)[:, None]
    masks = ((left <= x) & (x < left + 0.4))[:, None].repeat(1, 30, 1)
    masks[:, :15] = False
    return masks


def main(model: str | None = None, steps: int = 50) -> list[list[Image.Image]]:
    """The frames of a prompt without and with the layout, from the same noise."""
    pipe = load("WanPipeline", model)
    size = {"height": 480, "width": 832, "num_frames": 81}
    if model is None:
        size = {"height": 32, "width": 64, "num_frames": 9, "max_sequence_length": 64}

    def video() -> list[Image.Image]:
        generator = torch.Generator().manual_seed(0)
        given = {"num_inference_steps": steps, "generator": generator, "output_type": "pil"}
        return pipe(PROMPT, **size, **given).frames[0]

    plain = video()
    regions = [("a cat", walk(size["num_frames"])), ("a dog", DOG)]
    with apply_layout(pipe, PROMPT, regions):
        return [plain, video()]


if __name__ == "__main__":
    command(lambda: animation(main(*command_line(__doc__, MODEL)), "layout_to_video.gif"))

"""LTX-Video: self-attention of a video, cross-attention from it to the words of the text."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..record import IMAGE, TEXT, Attention, Call, Model


class LTX(Model):
    """LTXVideoTransformer3DModel, whose calls are told the frames, rows and columns of latents."""

    denoiser = "LTXVideoTransformer3DModel"
    video = True
    pipelines = "LTX(ImageToVideo)?Pipeline"  # others put latents of their own before the video's
    attentions = Attention("attn1", (IMAGE,)), Attention("attn2", (IMAGE,), (TEXT,))

    def read(self, arguments: dict[str, Any]) -> Call:
        """The layout's part of a call, with the sizes of the latents in the place of positions."""
        sizes = tuple(arguments[name] for name in ("num_frames", "height", "width"))
        return super().read(arguments)._replace(places=sizes)

    def arranged(self, latents: Tensor) -> Tensor:
        """Latents [B, C, F, H, W] as tokens [B, N, C]."""
        return latents.flatten(2).transpose(1, 2)

    def pictured(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [B, N, C] as latents [B, C, F, H, W]."""
        return latents.transpose(1, 2).unflatten(2, (-1, *grid))

    def grid(self, call: Call) -> tuple[int, int]:
        """The latents' height and width."""
        return call.places[1:]

    def length(self, call: Call) -> int:
        """The latents' frames."""
        return call.places[0]

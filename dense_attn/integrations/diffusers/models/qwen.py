"""Qwen-Image and its Edit: joint attention, a chat before the image, a call for each prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .record import (
    IMAGE,
    REFERENCES,
    TEXT,
    Attention,
    Call,
    Model,
    like_norm,
    packed,
    unpacked,
)

if TYPE_CHECKING:
    from ..prompts.texts import Slots


class QwenImage(Model):
    """QwenImageTransformer2DModel, whose calls are told the grids of the image and of others."""

    denoiser = "QwenImageTransformer2DModel"
    unit = 1e-3
    packs = 2
    branches = "calls"
    sees_images = True
    attentions = (Attention("attn", (TEXT, IMAGE, REFERENCES)),)
    longer_text = True
    text_mask = "encoder_hidden_states_mask"
    masks = ("encoder_hidden_states_mask",)
    numbering = "pos_embed", "forward"

    def read(self, arguments: dict[str, Any]) -> Call:
        """The layout's part of a call, with the grids in the place of positions."""
        return super().read(arguments)._replace(places=arguments["img_shapes"])

    def guided(self, negative: Tensor, prompt: Tensor, scale: float) -> Tensor:
        """The estimate of two, as long as the prompt's."""
        return like_norm(super().guided(negative, prompt, scale), prompt)

    def arranged(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] as tokens."""
        return packed(latents)

    def pictured(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens as latents [B, C, H, W]."""
        return unpacked(latents, grid)

    def grid(self, call: Call) -> tuple[int, int]:
        """The latents' height and width; ControlNet's pipelines give an image one grid, no list."""
        grids = call.places[0]
        _, height, width = grids if isinstance(grids[0], int) else grids[0]
        return 2 * height, 2 * width

    def without_text(self, arguments: dict[str, Any]) -> bool:
        """Take a call's own text out; its mask is cut to the text that there is."""
        self.write(arguments, arguments["encoder_hidden_states"][:, :0])
        return True

    def numbered(
        self, own: Any, slots: Slots, *args: Any, max_txt_seq_len: int, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The rotations of the image's tokens and the text's, whose places begin anew."""
        image, text = own(*args, max_txt_seq_len=max(slots.sizes), **kwargs)
        return image, text[slots.positions(text.device)]

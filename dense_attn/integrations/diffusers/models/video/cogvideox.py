"""CogVideoX: joint attention, the text before the video, in two halves of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..record import IMAGE, TEXT, Attention, Call, Model

if TYPE_CHECKING:
    from ...prompts.texts import Slots


class CogVideoX(Model):
    """CogVideoXTransformer3DModel, whose latents have frames before channels.

    Its pipelines say in `encode_prompt` alone that they guide.
    """

    denoiser = "CogVideoXTransformer3DModel"
    video = True
    hears_guidance = True
    lengths = 2  # its VAE decodes an even number to as many times 4
    longer_text = True  # tokens of the text have no places
    attentions = (Attention("attn1", (TEXT, IMAGE)),)

    @classmethod
    def of(cls, denoiser: torch.nn.Module) -> Model:
        """The record of one denoiser."""
        config = denoiser.config
        placed = config.use_learned_positional_embeddings
        placed |= not config.use_rotary_positional_embeddings
        return super().of.__func__(CogVideoXPlaced if placed else cls, denoiser)

    def length(self, call: Call) -> int:
        """The latents' frames."""
        return call.latents.shape[1]

    def arranged(self, latents: Tensor) -> Tensor:
        """Latents [B, C, F, H, W] as [B, F, C, H, W], the first twice where tokens have two."""
        latents = latents.transpose(1, 2)
        return torch.cat([latents[:, : -latents.shape[1] % self.frames], latents], 1)

    def pictured(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """Latents [B, F, C, H, W] as [B, C, F, H, W], without those that fill a token."""
        return latents.transpose(1, 2)[:, :, self.frames - 1 :]


class CogVideoXPlaced(CogVideoX):
    """One that adds places to so many tokens of text and of a video."""

    numbering = "patch_embed", "forward"

    def numbered(self, own: Any, slots: Slots, text: Tensor, latents: Tensor) -> Tensor:
        """The tokens of texts, each with the places of its own, and then of the video."""
        parts = [part for part in text.split(slots.sizes, 1) if part.shape[1]]
        made = [own(part, latents) for part in parts]
        texts = [tokens[:, : part.shape[1]] for tokens, part in zip(made, parts)]
        return torch.cat([*texts, made[0][:, parts[0].shape[1] :]], 1)

"""Wan: self-attention of a video, cross-attention from it to the text, a call for each prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..record import IMAGE, TEXT, Attention, Model

if TYPE_CHECKING:
    from ...prompts.texts import Texts

CROSS = "attn2"


@dataclass(frozen=True)
class Wan(Model):
    """WanTransformer3DModel; the image that a video begins with is another call of `attn2`."""

    beside: str | None = None  # where there is one, whose keys are all before the last 512
    denoiser = "WanTransformer3DModel"
    video = True
    branches = "calls"
    attentions = Attention("attn1", (IMAGE,)), Attention(CROSS, (IMAGE,), (TEXT,))

    @classmethod
    def of(cls, denoiser: torch.nn.Module) -> Model:
        """The record of one denoiser."""
        there = denoiser.config.added_kv_proj_dim is not None
        return replace(super().of(denoiser), beside=CROSS if there else None)

    def lengthen(self, arguments: dict[str, Any], texts: Texts) -> None:
        """Put the texts of regions behind a call's, or as rows below it, with the image's keys."""
        if self.beside is None:
            super().lengthen(arguments, texts)
            return
        image, rows = "encoder_hidden_states_image", texts.as_rows()
        self.write(arguments, rows)
        arguments[image] = arguments[image].repeat(len(rows) // len(texts.tokens), 1, 1)

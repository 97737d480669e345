"""Z-Image: one stream, the image before the text, both padded; the prompt's rows come first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .record import IMAGE, TEXT, Attention, Call, Model


class ZImage(Model):
    """ZImageTransformer2DModel, which takes lists of latents and of texts, and time from 0 to 1.

    Its refiners, of the image or the text alone, are left alone.
    """

    denoiser = "ZImageTransformer2DModel"
    latents = "x"
    text = "cap_feats"
    unit = 1e-3
    branches = "prompt first"
    attentions = (
        Attention(
            r"layers\.\d+\.attention", (IMAGE._replace(multiple=32), TEXT._replace(multiple=32))
        ),
    )

    @classmethod
    def of(cls, denoiser: torch.nn.Module) -> ZImage:
        """The record of any of them: calls make tokens of 2 x 2 latents."""
        return cls(patch=2)

    def read(self, arguments: dict[str, Any]) -> Call:
        """The layout's part of a call; texts are as long as the longest."""
        text = pad_sequence(arguments[self.text], batch_first=True)
        return Call(1 - arguments["t"], text, torch.stack(arguments[self.latents]))

    def write(self, arguments: dict[str, Any], text: Tensor) -> None:
        """Give a call other texts, of the lengths that they had."""
        old = arguments[self.text]
        arguments[self.text] = [row[: len(own)] for row, own in zip(text, old)]

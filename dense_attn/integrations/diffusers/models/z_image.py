"""Z-Image: one stream of the image and the text, each padded, and the prompt's half first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .record import IMAGE, TEXT, Attention, Call, Model


class ZImage(Model):
    """ZImageTransformer2DModel, whose refiners, of the image or the text alone, are left alone."""

    denoiser = "ZImageTransformer2DModel"
    pipelines = "ZImage(ControlNet)?(Img2Img|Inpaint)?Pipeline"
    latents = "x"
    packs = 2
    branches = "prompt first"
    attentions = (
        Attention(
            r"layers\.\d+\.attention", (IMAGE._replace(multiple=32), TEXT._replace(multiple=32))
        ),
    )

    def read(self, arguments: dict[str, Any]) -> Call:
        """The layout's part of a call, of lists with an entry a sample; time rises there."""
        text = pad_sequence(arguments["cap_feats"], batch_first=True)
        return Call(1000 * (1 - arguments["t"]), text, torch.stack(arguments["x"]))

    def write(self, arguments: dict[str, Any], text: Tensor) -> None:
        """Put text tokens [B, L, C] into a call, as many in each sample as there were."""
        lengths = [len(tokens) for tokens in arguments["cap_feats"]]
        arguments["cap_feats"] = [tokens[:length] for tokens, length in zip(text, lengths)]

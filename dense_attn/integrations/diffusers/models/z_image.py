"""Z-Image: one stream of the image and the text, each padded, and the prompt's half first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from .record import IMAGE, TEXT, Attention, Call, Model

if TYPE_CHECKING:
    from ..prompts.texts import Slots, Texts


class ZImage(Model):
    """ZImageTransformer2DModel, whose refiners, of the image or the text alone, are left alone."""

    denoiser = "ZImageTransformer2DModel"
    pipelines = "ZImage(ControlNet)?(Img2Img|Inpaint)?Pipeline"
    latents = "x"
    packs = 2
    branches = "prompt first"
    sign = -1
    unguided = 0.0
    shifts = True
    attentions = (
        Attention(
            r"layers\.\d+\.attention", (IMAGE._replace(multiple=32), TEXT._replace(multiple=32))
        ),
    )
    longer_text = True
    text_layers = r"^context_refiner\.\d+\.attention$"
    numbering = "", "patchify_and_embed"

    def read(self, arguments: dict[str, Any]) -> Call:
        """The layout's part of a call, of lists with an entry a sample; time rises there."""
        text = pad_sequence(arguments["cap_feats"], batch_first=True)
        return Call(1000 * (1 - arguments["t"]), text, torch.stack(arguments["x"]))

    def guided(self, negative: Tensor, prompt: Tensor, scale: float) -> Tensor:
        """The estimate of two, for which a scale of 0 is the prompt's alone."""
        return prompt + scale * (prompt - negative)

    def given(self, latents: Tensor) -> list[Tensor]:
        """Latents [B, C, H, W] as a list of [C, 1, H, W]."""
        return list(latents.unsqueeze(2).unbind(0))

    def taken(self, made: list[Tensor]) -> Tensor:
        """A list of [C, 1, H, W] as [B, C, H, W]."""
        return torch.stack(made).squeeze(2)

    def write(self, arguments: dict[str, Any], text: Tensor) -> None:
        """Put text tokens [B, L, C] into a call, as many in each sample as there were."""
        lengths = [len(tokens) for tokens in arguments["cap_feats"]]
        arguments["cap_feats"] = [tokens[:length] for tokens, length in zip(text, lengths)]

    def own_text(self, arguments: dict[str, Any], text: Tensor) -> tuple[Tensor, list[int]]:
        """A call's text [B, L, C], and the tokens of each row."""
        return text, [len(tokens) for tokens in arguments["cap_feats"]]

    def lengthen(self, arguments: dict[str, Any], texts: Texts) -> None:
        """Put the texts of regions behind a call's; a ControlNet's sums have none for them."""
        arguments["cap_feats"] = list(texts.tokens)
        sums = arguments.get("controlnet_block_samples")
        if sums is not None:
            more = texts.slots.count - texts.slots.own
            sums = {layer: pad(x, (0, 0, 0, more)) for layer, x in sums.items()}
            arguments["controlnet_block_samples"] = sums

    def numbered(
        self, own: Any, slots: Slots, images: list[Tensor], texts: list[Tensor], *sizes: int
    ) -> tuple[Any, ...]:
        """Tokens, places and padding of texts that begin anew; images stand behind the longest."""
        seen = [text[:longest] for text, longest in zip(texts, slots.longest)]
        image, _, size, image_ids, text_ids, image_padding, _ = own(images, seen, *sizes)
        places = slots.positions(texts[0].device)
        text_ids = [ids[places.clamp(max=len(ids) - 1)] for ids in text_ids]
        padding = [slots.padding(row, places.device) for row in range(len(texts))]
        return image, texts, size, image_ids, text_ids, image_padding, padding

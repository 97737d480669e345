"""Lumina 2: joint attention, the text's own tokens and then the image, a call for each prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dense_attn import _checks

from ..rows import counted
from .record import IMAGE, TEXT, Attention, Call, Model, like_norm

if TYPE_CHECKING:
    from ..prompts.texts import Slots, Texts


class Lumina2(Model):
    """Lumina2Transformer2DModel, which leaves padding out; its time goes from 0 to 1.

    Its refiners, of the image or the text alone, are left alone.
    """

    denoiser = "Lumina2Transformer2DModel"
    unit = 1e-3
    branches = "calls"
    sign = -1
    shifts = True
    attentions = (Attention(r"layers\.\d+\.attn", (TEXT, IMAGE)),)
    longer_text = True
    text_layers = r"^context_refiner\.\d+\.attn$"
    numbering = "rope_embedder", "forward"

    def read(self, arguments: dict[str, Any]) -> Call:
        """The layout's part of a call, of the text tokens that are there."""
        longest = max(counted(arguments["encoder_attention_mask"]))
        call = super().read(arguments)
        return call._replace(timestep=1 - call.timestep, text=call.text[:, :longest])

    def guided(self, negative: Tensor, prompt: Tensor, scale: float) -> Tensor:
        """The estimate of two, as long as the prompt's, which is the pipeline's default."""
        return like_norm(super().guided(negative, prompt, scale), prompt)

    def check(self, arguments: dict[str, Any]) -> None:
        """Refuse texts behind which images stand in other places."""
        lengths = counted(arguments["encoder_attention_mask"])
        if len(set(lengths)) > 1:
            rule = "have prompts of as many tokens as each other, which the image stands behind"
            _checks.refuse("prompt", rule, lengths)

    def write(self, arguments: dict[str, Any], text: Tensor) -> None:
        """Put text tokens [B, L, C] into a call, before its padding."""
        padding = arguments["encoder_hidden_states"][:, text.shape[1] :]
        arguments["encoder_hidden_states"] = torch.cat((text, padding), 1)

    def lengthen(self, arguments: dict[str, Any], texts: Texts) -> None:
        """Put the texts of regions behind a call's, in the place of its padding."""
        own = arguments["encoder_attention_mask"][:, : texts.slots.own]
        arguments["encoder_hidden_states"] = texts.tokens
        arguments["encoder_attention_mask"] = torch.cat([own, texts.mask.to(own)], 1)

    def numbered(self, own: Any, slots: Slots, latents: Tensor, mask: Tensor) -> tuple[Any, ...]:
        """The rotations of texts whose places begin anew; images stand behind their longest."""
        longest = torch.tensor(slots.longest, dtype=torch.int64, device=latents.device)[:, None]
        seen = torch.arange(max(slots.longest), dtype=torch.int64, device=latents.device) < longest
        tokens, text, image, both, _, _ = own(latents, seen)
        places = slots.positions(text.device)[None].minimum(longest - 1)  # [B, N]
        text = torch.stack([row[at] for row, at in zip(text, places)])
        end = image.shape[1]
        behind = [row[n : n + end] for row, n in zip(both, slots.longest)]
        both = torch.cat([text, torch.stack(behind)], 1)
        counts = [slots.count] * len(latents)
        return tokens, text, image, both, counts, [n + end for n in counts]

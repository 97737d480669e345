"""HunyuanDiT: cross-attention from the image to the tokens of two encoders, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dense_attn import _checks

from ...text.encoding import beside
from ...text.segments import HUNYUAN_DIT
from ..record import IMAGE, TEXT, Attention, Call, Model

if TYPE_CHECKING:
    from ...prompts.texts import Slots, Texts

ENCODED = "encoder_hidden_states", "encoder_hidden_states_t5"
MASKS = "text_embedding_mask", "text_embedding_mask_t5"


class HunyuanDiT(Model):
    """HunyuanDiT2DModel, which is given the tokens of each encoder by themselves."""

    denoiser = "HunyuanDiT2DModel"
    beside = "attn2"  # padding that the model has learned is that of so many tokens
    numbering = "time_extra_emb", "forward"
    attentions = Attention("attn1", (IMAGE,)), Attention("attn2", (IMAGE,), (TEXT,))

    def read(self, arguments: dict[str, Any]) -> Call:
        """The layout's part of a call, of the tokens of both."""
        first, second = (arguments[name] for name in ENCODED)
        return super().read(arguments)._replace(text=beside(first, second))

    def write(self, arguments: dict[str, Any], text: Tensor) -> None:
        """Put text tokens [B, L, C] into a call, in the width of each encoder."""
        start = 0
        for name in ENCODED:
            _, length, width = arguments[name].shape
            arguments[name] = text[:, start : start + length, :width].contiguous()
            start += length

    def check(self, arguments: dict[str, Any]) -> None:
        """Refuse embeddings of other lengths than those that the pipeline's encoders have."""
        lengths = tuple(arguments[name].shape[1] for name in ENCODED)
        if lengths != HUNYUAN_DIT:
            rule = "have {} tokens, and prompt_embeds_2 {}".format(*HUNYUAN_DIT)
            _checks.refuse("prompt_embeds", rule, "{} and {}".format(*lengths))

    def lengthen(self, arguments: dict[str, Any], texts: Texts) -> None:
        """Put the texts of regions as rows below a call's, with their masks."""
        own = torch.cat([arguments[name] for name in MASKS], 1)
        self.write(arguments, texts.as_rows())
        masks = texts.rows_of(torch.cat([own, texts.mask.to(own)], 1))
        arguments.update(zip(MASKS, masks.split(HUNYUAN_DIT, 1)))

    def numbered(
        self, own: Any, slots: Slots, time: Tensor, text: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """A time's vector with what is pooled of the text of the call's own prompt."""
        return own(time, text[: len(time)], *args, **kwargs)

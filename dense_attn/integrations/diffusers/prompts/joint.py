"""Region prompts in joint attention, where text tokens attend to the image too.

A region's text attends to itself and to the image in its region; the image attends to all of the
image, and to the texts of its regions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn.layout_attention.layout import _BITS

from ..state import Layer, LayerMark, Side, order_of
from .sharing import Round, members, rounds, words_of
from .state import Blocks, RegionState

if TYPE_CHECKING:
    from ..models.record import Call

IMAGE = _BITS[-1]  # a bit beside those of the texts, which tokens of the image have in common
EVERY = -1  # all bits


class JointMark(LayerMark):
    """A block's knowledge of one attention module, and its place among those of its kind."""

    state: JointState

    def __init__(self, state: JointState, name: str, kind: str, depth: int, index: int) -> None:
        super().__init__(state, name, kind, depth)
        self.on = index % state.options.every == 0

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: object = None
    ) -> Tensor:
        """Attention of q, k, v [B, H, N, D], of which all keys are there."""
        if mask is not None:
            _checks.refuse("attention_mask", "be None while regions have prompts", "a mask")
        blocks = self.state.halves[self.on, self.depth]
        return blocks.attention(q, k, v, scale, self.state.num_tokens, self.state.masked)


class JointState(RegionState):
    """One `apply_layout` block whose regions have prompts, for FLUX."""

    def marks(self, layers: dict[str, tuple[Any, str, int]]) -> list[tuple[Any, LayerMark]]:
        """The marks of attention modules, given by name with their kind and depth."""
        kind = self.model.denoiser
        if self.options.isolate not in (0, 1):
            _checks.refuse("isolate", f"be 0 or 1 for a {kind}", self.options.isolate)
        if any(text is not None for image in self.reading.images_of for text in image.negatives):
            _checks.refuse("negative", f"be None for a {kind}", "a negative prompt of a region")
        self.attentions = {name: layer for name, (layer, *_) in layers.items()}
        return [
            (layer, JointMark(self, name, *at, index))
            for index, (name, (layer, *at)) in enumerate(layers.items())
        ]

    def _with_texts(self, given: dict[str, Any], call: Call, first: int, last: int) -> None:
        """The texts of the regions in a call's arguments; in FLUX all have one place."""
        super()._with_texts(given, call, first, last)
        places = given["txt_ids"]
        size = *places.shape[:-2], self.num_keys - self.num_tokens, places.shape[-1]
        given["txt_ids"] = torch.cat([places, places.new_zeros(size)], -2)

    def _make_layers_of(
        self, call: Call, texts: dict[bool, list[list[Tensor | None]]], each: int
    ) -> None:
        """Attention with regions, and that of layers which are left out: the first text alone."""
        height, width = (side // self.model.patch for side in self.model.grid(call))
        packed = call.latents.shape[1]
        self.sizes[0], references = self.num_keys + packed, packed - height * width
        shares = [
            members(image.masks, image.weights, (height, width), self.reading.base)
            for image in self.reading.images_of
        ]
        inside = [self._of_blocks(*pair) for pair in zip(shares, texts[True])]
        outside = [torch.zeros_like(image) for image in inside]
        for image in outside:
            image[0] = 1
        k_text, device = self._key_words(texts[True]), call.text.device
        for on, images in ((True, inside), (False, outside)):
            seen = [words_of(image) | words_of(all_) for image, all_ in zip(inside, images)]
            k_words = self._joined(k_text, torch.stack(seen), references)
            calls = [
                self._call_of(one, j, k_text, k_words, references, each, device)
                for j, one in enumerate(rounds(images))
            ]
            self.halves[on, 0] = Blocks(calls)
        self.layers["attn", 0] = self.halves[True, 0].calls[0][0]

    def _joined(self, text: Tensor, image: Tensor, references: int) -> Tensor:
        """The words of all tokens, int32 [P, N]; image tokens meet each other unless isolated."""
        if not self.options.isolate:
            image = torch.where(image == 0, 0, image | IMAGE)
        others = torch.full((len(image), references), EVERY, dtype=torch.int32, device="cpu")
        return torch.cat([text, image, others], 1)

    def _call_of(
        self,
        one: Round,
        j: int,
        k_text: Tensor,
        k_words: Tensor,
        references: int,
        each: int,
        device: torch.device,
    ) -> tuple[Layer, Tensor | None]:
        """The j-th call of the attention; all but the first leave tokens other than these alone."""
        words = self._joined(k_text, one.words, references)
        shares = one.shares
        if j:
            words[:, : self.num_keys] = 0
            words[:, words.shape[1] - references :] = 0
        if shares is not None:
            edge = torch.ones if j == 0 else torch.zeros
            rest = {"dtype": torch.float32, "device": "cpu"}
            text, others = (edge(len(words), n, **rest) for n in (self.num_keys, references))
            shares = torch.cat([text, shares, others], 1)

        def spread(side: Tensor) -> Tensor:
            side = side if len(self.images) == 1 else side.repeat_interleave(each, 0)
            return side.to(device)

        order, k_order = (spread(order_of(Side(side, side))) for side in (words, k_words))
        now = torch.zeros(1, 1, 1, dtype=torch.float32, device=device)
        layer = Layer(spread(words), spread(k_words), now, order, k_order, now)
        return layer, None if shares is None else spread(shares)[:, None, :, None]

"""The ways to run a block: plain, with a layout, with prompts of regions, and these by hand.

By hand: attention couple, an attention for each prompt whose results are put together by masks, in
U-Nets; a mask of all pairs in joint attention.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dense_attn.integrations.diffusers import Region, apply_layout

from .networks import Network

PROMPT = "a red cat by a blue dog on green grass"
PHRASES = ("red cat", "blue dog", "green grass")
BOXES = ((0.0, 0.0, 0.25, 1.0), (0.25, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))  # all of the image
Call = Callable[[], Any]
COUPLE, DENSE = "attention couple", "dense mask"


class Ways:
    """The calls of one block, of which each has a copy of the denoiser around the same weights."""

    def __init__(self, network: Network, pipe: Any, side: int, stack: ExitStack) -> None:
        self.network, self.pipe, self.side, self.stack = network, pipe, side, stack
        denoiser = getattr(pipe, network.component)
        tensors = [*denoiser.parameters(), *denoiser.buffers()]
        self._copy = partial(copy.deepcopy, denoiser)
        self._shared = {id(tensor): tensor for tensor in tensors}

    def call(self, name: str) -> Call:
        """The call of a way, by its name."""
        if name == "plain":
            return self._block()
        if name == "layout":
            regions = list(zip(PHRASES, BOXES))
            return self._block(partial(apply_layout, regions=regions, encode_phrases=False))
        if name == "regions":
            return self._block(partial(apply_layout, regions=_regions()))
        return self._couple() if name == COUPLE else self._dense()

    def _block(self, around: Callable[..., Any] | None = None) -> Call:
        """A call of the block as the denoiser makes it, inside of `around`."""
        pipe, denoiser, seen = copy.copy(self.pipe), self._copy(dict(self._shared)), []
        setattr(pipe, self.network.component, denoiser)
        block = denoiser.get_submodule(self.network.block)
        if around is not None:
            self.stack.enter_context(around(pipe, PROMPT))
        hook = block.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        size = self.network.pixels * self.side
        given = {"height": size, "width": size, "num_inference_steps": 1, "output_type": "latent"}
        noise = torch.Generator().manual_seed(0)
        pipe(PROMPT, generator=noise, **given, **self.network.call)
        hook.remove()
        args, kwargs = seen[0]
        return partial(block, *args, **kwargs)

    def _couple(self) -> Call:
        call = self._block()
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        found = self.pipe.encode_prompt(list(PHRASES), device="cpu", **options)
        call.func.attn2.processor = _Couple(found[0], self._masks())
        return call

    def _dense(self) -> Call:
        """The call with prompts of regions behind each other, under a mask of all pairs."""
        with ExitStack() as inside:
            outer, self.stack = self.stack, inside
            call = self.call("regions")
            self.stack = outer
        return partial(_masked, call, {})

    def _masks(self) -> Tensor:
        """The image tokens of each region, bool [R, M]."""
        column = (torch.arange(self.side) + 0.5) / self.side
        rows = [((left <= column) & (column < right)) for left, _, right, _ in BOXES]
        return torch.stack([row.repeat(self.side) for row in rows])


def _regions() -> list[Region]:
    return [Region(box, phrase) for box, phrase in zip(BOXES, PHRASES)]


class _Couple:
    """Attention of all image tokens to each prompt, of which each token takes its region's."""

    def __init__(self, texts: Tensor, masks: Tensor) -> None:
        self.texts, self.masks = texts, masks.to(texts.dtype)[:, None, :, None]

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """The layer's output, of one image."""
        count = len(self.texts)
        q, k, v = attn.to_q(hidden_states), attn.to_k(self.texts), attn.to_v(self.texts)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(q.expand(count, -1, -1, -1), k, v)
        out = (out * self.masks).sum(0, keepdim=True)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def _masked(call: Call, masks: dict[int, Tensor]) -> Any:
    """A call whose joint attention has a mask of all pairs, made once."""
    with _dispatched(masks):
        return call()


@contextmanager
def _dispatched(masks: dict[int, Tensor]) -> Iterator[None]:
    """A mask for all that goes through diffusers' active backend of attention."""
    from diffusers.models import attention_dispatch

    registry = attention_dispatch._AttentionBackendRegistry
    name, entries = registry._active_backend, registry._backends
    inner = entries[name]

    def attention(**options: Any) -> Tensor:
        num_tokens = options["query"].shape[1]
        if num_tokens not in masks:
            masks[num_tokens] = _pairs(num_tokens)
        return inner(**options | {"attn_mask": masks[num_tokens]})

    entries[name] = attention
    try:
        yield
    finally:
        entries[name] = inner


def _pairs(num_tokens: int) -> Tensor:
    """Tokens of three parts that see their own, bool [1, 1, N, N]; each has some to see."""
    part = torch.arange(num_tokens) * len(BOXES) // num_tokens
    return (part[:, None] == part)[None, None]

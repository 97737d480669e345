"""Tokens that another extension merges, or that a layer has of its own."""

from __future__ import annotations

import warnings

import pytest
from pipelines import PROMPT, REGIONS, diffusers, latents
from torch import Tensor

from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import apply_layout

pytestmark = pytest.mark.usefixtures("one_thread")


def merging(share: int, kind: type) -> type:
    """A block of a U-Net whose self-attention gets one of `share` tokens, as token merging does."""

    class Merged(kind):
        def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
            inner = self.attn1.forward

            def fewer(x: Tensor, *rest: object, **options: object) -> Tensor:
                return inner(x[:, ::share], *rest, **options).repeat_interleave(share, 1)

            self.attn1.forward = fewer
            try:
                return super().forward(hidden_states, *args, **kwargs)
            finally:
                del self.attn1.forward

    return Merged


@pytest.mark.parametrize("share", [2, 4])
def test_merged_tokens_are_told_of_once(share: int, calls: list) -> None:
    """A quarter of the tokens is as many as the next resolution has, but gets no layout of it."""
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline, blocks=4)
    blocks = [m for m in pipe.unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    for block in blocks:
        block.__class__ = merging(share, type(block))
    with warnings.catch_warnings(record=True) as caught, apply_layout(pipe, PROMPT, REGIONS):
        warnings.simplefilter("always")
        for _ in range(2):
            latents(pipe, height=32, width=32)
    told = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert len(told) == 1
    assert (
        "a layout leaves down_blocks.0.attentions.0.transformer_blocks.0.attn1, and layers "
        "like it, alone"
    ) in told[0]
    assert "Merged" in told[0]
    assert len(calls) == 2 * 3 * len(blocks)
    assert all(call[1].shape[2] == 16 for call in calls)  # cross-attention alone


def test_merged_tokens_by_a_replaced_method_or_a_hook(calls: list) -> None:
    for way in ("method", "hook"):
        pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
        layer = next(m for name, m in pipe.unet.named_modules() if name.endswith("attn1"))
        if way == "method":
            layer.forward = lambda x, *args, inner=layer.forward, **kwargs: inner(
                x[:, ::2], *args, **kwargs
            ).repeat_interleave(2, 1)
        else:
            layer.register_forward_pre_hook(lambda _, args: (args[0][:, ::2], *args[1:]))
            layer.register_forward_hook(lambda _, __, out: out.repeat_interleave(2, 1))
        with (
            apply_layout(pipe, PROMPT, REGIONS),
            pytest.warns(UserWarning, match="a layout leaves .* alone"),
        ):
            latents(pipe, steps=1)


@pytest.mark.parametrize("offloaded", [False, True])
def test_tokens_of_a_layers_own_that_no_layout_has(offloaded: bool) -> None:
    """A U-Net that rounds odd sizes down; of even ones it has what a layout is for."""
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline, blocks=4)
    for block in pipe.unet.down_blocks:
        for sampler in block.downsamplers or ():
            sampler.padding, sampler.conv.padding = 0, (0, 0)
    if offloaded:
        pytest.importorskip("accelerate").cpu_offload(pipe.unet, "cpu")
    with apply_layout(pipe, PROMPT, REGIONS):
        latents(pipe, height=32, width=32, steps=1)
        with pytest.raises(ValueError, match=r"pipe must give mid_block.* 6 tokens .*, got 2"):
            latents(pipe, height=24, width=40, steps=1)
    latents(pipe, height=24, width=40, steps=1)


def test_without_weights_of_a_kind_nothing_is_told() -> None:
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    for block in (m for m in pipe.unet.modules() if type(m).__name__ == "BasicTransformerBlock"):
        block.__class__ = merging(2, type(block))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with apply_layout(pipe, PROMPT, REGIONS, self_weight=0):
            latents(pipe, steps=1)

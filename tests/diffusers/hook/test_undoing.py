"""A block that cannot begin leaves layers, processors and the wrapped points as they were."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from pipelines import PROMPT, REGIONS, latents, pipeline

from dense_attn.integrations.diffusers import _attention_hook as hook
from dense_attn.integrations.diffusers import apply_layout

attention_processor = pytest.importorskip("diffusers.models.attention_processor")
from diffusers.models import attention_dispatch  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


class Slotted:
    """A processor whose objects can have no other class."""

    __slots__ = ()
    __call__ = attention_processor.AttnProcessor2_0.__call__


def test_a_processor_that_cannot_be_marked_leaves_nothing_wrapped() -> None:
    pipe = pipeline("sd")
    plain = latents(pipe, steps=2)
    points = dict(attention_dispatch._AttentionBackendRegistry._backends), attention_processor.F
    layers = [module for module in pipe.unet.modules() if hasattr(module, "processor")]
    kept = layers[-1].processor
    layers[-1].processor = Slotted()
    try:
        rule = "^pipe must have processors whose class can change, got Slotted$"
        with pytest.raises(ValueError, match=rule), apply_layout(pipe, PROMPT, REGIONS):
            pytest.fail("the block must not run")
    finally:
        layers[-1].processor = kept
    assert hook._blocks == 0
    assert not hook._replaced
    assert points == (
        dict(attention_dispatch._AttentionBackendRegistry._backends),
        attention_processor.F,
    )
    assert not any(hasattr(layer, hook.MARKS) for layer in layers)
    assert not any(hook.is_marked(layer.processor) for layer in layers)
    assert torch.equal(latents(pipe, steps=2), plain)


@pytest.mark.parametrize("processor", [lambda attn, x: x, functools.partial(max, 0), None])
def test_processors_that_are_no_objects_with_a_call_are_refused(processor: object) -> None:
    pipe = pipeline("sd")
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    kept, layer.processor = layer.processor, processor
    rule = f"^pipe must have attention processors that call .*, got {type(processor).__name__} in "
    try:
        with pytest.raises(ValueError, match=rule), apply_layout(pipe, PROMPT, REGIONS):
            pytest.fail("the block must not run")
    finally:
        layer.processor = kept


def test_processors_made_of_a_layers_class_are_not_a_blocks() -> None:
    """Diffusers makes them so where it exchanges those of some layers."""
    unet = pipeline("sd").unet
    with apply_layout(pipeline("sd"), PROMPT, REGIONS):
        processors = unet.attn_processors.values()
        assert all(hook.is_marked(each) for each in processors)
        assert not any(hook.is_marked(each.__class__()) for each in processors)


@torch.no_grad()
def test_a_copy_of_a_denoiser_is_in_no_block() -> None:
    """Neither inside of the block nor behind it, and it can have a block of its own."""
    pipe = pipeline("sd")
    text = torch.randn(2, 8, pipe.unet.config.cross_attention_dim)
    given = torch.randn(2, 4, 8, 12), torch.tensor(5), text
    plain = pipe.unet(*given).sample
    with apply_layout(pipe, PROMPT, REGIONS):
        copied = copy.deepcopy(pipe.unet)
        processors = copied.attn_processors.values()
        assert not any(hook.is_marked(each) for each in processors)
        assert torch.equal(copied(*given).sample, plain)
        layer = copy.deepcopy(pipe.unet.mid_block.attentions[0])
        run = {"encoder_hidden_states": text}
        x = torch.randn(2, layer.in_channels, 2, 2)
        inside = layer(x, **run).sample
    assert torch.equal(layer(x, **run).sample, inside)
    assert torch.equal(pipe.unet.mid_block.attentions[0](x, **run).sample, inside)
    assert torch.equal(copied(*given).sample, plain)
    original, right = pipe.unet, layout_latents(pipe)
    pipe.unet = copied
    try:
        assert torch.equal(layout_latents(pipe), right)
    finally:
        pipe.unet = original


def layout_latents(pipe: object) -> torch.Tensor:
    with apply_layout(pipe, PROMPT, REGIONS):
        return latents(pipe, steps=2)

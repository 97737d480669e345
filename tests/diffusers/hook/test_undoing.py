"""A block that cannot begin leaves layers, processors and the wrapped points as they were."""

from __future__ import annotations

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

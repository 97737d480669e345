"""One attention layer of a small U-Net, by its layout's processor and by diffusers' own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from dense_attn.examples._tiny_pipeline import tiny_pipeline

from ..harness import machine
from .public import LATENT, randn
from .recorded import Call

_PROMPT, _REGIONS = "a cat", [("cat", (0.0, 0.0, 0.5, 1.0))]
_TEXT_TOKENS = 16


@contextmanager
def ready(guided: bool, strength: float) -> Iterator[tuple[Call, Call]]:
    """Calls of the first self-attention's processor, as a run's step makes them, and of diffusers'.

    `guided`: with the rows of classifier-free guidance, which no layout modulates.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.models.attention_processor import AttnProcessor2_0

    from dense_attn.integrations.diffusers import apply_layout

    pipe = tiny_pipeline(StableDiffusionPipeline).to(machine.current().device)
    pipe._guidance_scale = 7.5 if guided else 1.0  # what a call of the pipeline sets
    pipe.scheduler.set_timesteps(50)
    rows = 1 + guided
    latents = randn(*LATENT).repeat(rows, 1, 1, 1)
    text = randn(rows, _TEXT_TOKENS, pipe.unet.config.cross_attention_dim)
    layer = next(x for name, x in pipe.unet.named_modules() if name.endswith("attn1"))
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    weights = {"self_weight": strength, "cross_weight": 0.0, "encode_phrases": False}
    with apply_layout(pipe, _PROMPT, _REGIONS, **weights):
        hook = layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        pipe.unet(latents, pipe.scheduler.timesteps[0], encoder_hidden_states=text)
        hook.remove()
        args, kwargs = seen[0]
        yield tuple(
            partial(processor, layer, *args, **kwargs)
            for processor in (layer.processor, AttnProcessor2_0())
        )

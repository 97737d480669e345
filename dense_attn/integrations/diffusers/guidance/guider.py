"""semantic_guider: the concepts of semantic guidance in diffusers' modular pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from dense_attn import _checks

from .concepts import Edit, settings, warn_of_idle

if TYPE_CHECKING:
    from diffusers.guiders import BaseGuidance
    from diffusers.modular_pipelines import StableDiffusionXLModularPipeline


def semantic_guider(
    pipe: StableDiffusionXLModularPipeline,
    edits: Sequence[Edit],
    guidance_scale: float = 7.5,
    *,
    momentum_scale: float = 0.1,
    momentum_beta: float = 0.4,
    backend: str = "auto",
) -> BaseGuidance:
    """A guider of a modular pipeline by concepts, whose latents are those of `semantic_guidance`.

    The estimate that the scheduler gets is `SemanticGuidance`'s; a modular pipeline evaluates the
    prompt, the negative prompt and each concept in calls of their own.

    Args:
        pipe: a modular pipeline of Stable Diffusion XL, whose text encoders encode the concepts.
        edits: the concepts, encoded now: a LoRA scale of the call does not reach them.
        guidance_scale: g, as of the ClassifierFreeGuidance whose place this takes.
        momentum_scale, momentum_beta: how much of the momentum is added, and how much of it is
            kept.
        backend: as in `sega_guidance`.

    Returns:
        The guider, for `pipe.update_components(guider=...)`.

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names.

    Source: Brack et al., SEGA: Instructing Text-to-Image Models using Semantic Guidance, NeurIPS
    2023.

    Example:
        >>> from dense_attn.examples._tiny_pipeline import tiny_modular_pipeline
        >>> from dense_attn.integrations.diffusers import Edit, semantic_guider
        >>> pipe = tiny_modular_pipeline()
        >>> guider = semantic_guider(pipe, [Edit("smiling", scale=4, warmup=1)], 7.5)
        >>> pipe.update_components(guider=guider)
        >>> size = {"height": 16, "width": 16}
        >>> image = pipe(prompt="a face", num_inference_steps=4, output="images", **size)[0]
    """
    if type(pipe).__name__ != "StableDiffusionXLModularPipeline":
        _checks.refuse("pipe", "be a StableDiffusionXLModularPipeline", type(pipe).__name__)
    options = settings(edits, momentum_scale, momentum_beta, backend)
    warn_of_idle(edits, 2)
    options["guidance_scale"] = _checks.number("guidance_scale", guidance_scale)
    from diffusers.modular_pipelines.stable_diffusion_xl.encoders import (
        StableDiffusionXLTextEncoderStep,
    )

    from .modular_guider import SemanticGuider

    with torch.no_grad():
        encoded: Any = StableDiffusionXLTextEncoderStep.encode_prompt(
            pipe, [edit.prompt for edit in edits], prepare_unconditional_embeds=False
        )
    return SemanticGuider({"prompt_embeds": encoded[0], "text_embeds": encoded[2]}, options)

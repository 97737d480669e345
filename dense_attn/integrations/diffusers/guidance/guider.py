"""semantic_guider: the concepts of semantic guidance in diffusers' modular pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dense_attn import _checks

from ...edits import Edit, settings, warn_of_idle
from ..models import model_of
from ..modular.pipeline import viewed
from .calls import FAMILIES, TEXT, Family, encoded

if TYPE_CHECKING:
    from diffusers.guiders import BaseGuidance
    from diffusers.modular_pipelines import ModularPipeline

# transformers that guiders were run with, and the names that guiders have for their texts
GUIDED = {
    "UNet2DConditionModel": Family(("prompt_embeds", None, "text_embeds")),
    "SD3Transformer2DModel": Family((TEXT, None, "text_embeds")),
    "Flux2Transformer2DModel": Family((TEXT,), channels=2),
}
GUIDED |= {
    name: FAMILIES[name]
    for name in ("QwenImageTransformer2DModel", "ZImageTransformer2DModel", "WanTransformer3DModel")
}


def semantic_guider(
    pipe: ModularPipeline,
    edits: Sequence[Edit],
    guidance_scale: float = 7.5,
    *,
    max_sequence_length: int | None = None,
    momentum_scale: float = 0.1,
    momentum_beta: float = 0.4,
    backend: str = "auto",
) -> BaseGuidance:
    """A guider of a modular pipeline by concepts, whose latents are those of `semantic_guidance`.

    The estimate is `SemanticGuidance`'s, `eps_u + g*(eps_t - eps_u)` and the concepts' part; a
    modular pipeline evaluates the prompt, the negative prompt and each concept in calls of their
    own. What a pipeline makes of a guider's estimate it makes of this one: Qwen-Image gives it the
    norm of the prompt's, where `semantic_guidance` adds the concepts' part after that.

    Args:
        pipe: a modular pipeline with a guider: of Stable Diffusion XL or 3, FLUX.2 klein,
            Qwen-Image, Z-Image or Wan; its text encoders encode the concepts.
        edits: the concepts, encoded now: a LoRA scale of the call does not reach them.
        guidance_scale: g, as of the ClassifierFreeGuidance whose place this takes.
        max_sequence_length: of the calls, where they say it; None: the encoders' own.
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
    options = settings(edits, momentum_scale, momentum_beta, backend)
    options["guidance_scale"] = _checks.number("guidance_scale", guidance_scale)
    view = viewed(pipe)
    if view is pipe or getattr(pipe, "guider", None) is None:
        _checks.refuse("pipe", "be a modular pipeline with a guider", type(pipe).__name__)
    kind = model_of(view).denoiser
    family = GUIDED.get(kind)
    if family is None:
        got = f"{type(pipe).__name__} with {kind}"
        _checks.refuse("pipe", f"have a {' or '.join(GUIDED)}", got)
    length = max_sequence_length
    given = {} if length is None else {"max_sequence_length": length}
    warn_of_idle(edits, 2)
    from .modular_guider import SemanticGuider

    texts = [edit.prompt for edit in edits]
    if kind == "UNet2DConditionModel":  # texts of one length, in one batch as semantic_guidance's
        whole = encoded(view, family, texts, given)
        concepts = [{name: x[i : i + 1] for name, x in whole.items()} for i in range(len(texts))]
    else:
        concepts = [encoded(view, family, text, given) for text in texts]
    return SemanticGuider(concepts, options, family.channels)

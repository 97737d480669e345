"""semantic_guidance: concepts turned up or down in the images and videos of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dense_attn import SemanticGuidance, _checks

from ...edits import Edit, settings, warn_of_idle
from ..models import model_of
from .transformer import guided_transformer
from .unet import guided_unet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dense_attn.sega.vectors import Vectors


@contextmanager
def semantic_guidance(
    pipe: DiffusionPipeline,
    edits: Sequence[Edit] = (),
    *,
    momentum_scale: float = 0.1,
    momentum_beta: float = 0.4,
    batch_concepts: bool = True,
    apply: Vectors | None = None,
    backend: str = "auto",
) -> Iterator[SemanticGuidance]:
    """Calls of the pipeline inside the block are guided by concepts, in the batch of its network.

    The estimate that the scheduler gets is the pipeline's own and `SemanticGuidance`'s addition,
    `eps + sum_e w_e * d_e where |d_e| >= quantile(|d_e|, threshold_e)` with
    `d_e = scale_e*(eps_e - eps_u)`, warm-up and momentum. Estimates are as the scheduler takes
    them: noise, or a flow's velocity noise - image, whose directions have the same sign. Without a
    negative branch, as where guidance is distilled (FLUX, few-step models), `eps_u` is the prompt's
    estimate. Quantiles are over the tokens of each sample and channel. Blocks inside of a block:
    the innermost counts. Call `pipe` itself, not another pipeline around the same model.

    Args:
        pipe: of a family with a record; with a U-Net (Stable Diffusion 1, 2, XL), called with a
            guidance scale above 1.
        edits: the concepts, encoded with the options of the call (LoRA scale, `clip_skip`).
        momentum_scale, momentum_beta: how much of the momentum is added, and how much of it is
            kept.
        batch_concepts: concepts are in the batch of the prompt's call, where their texts have as
            many tokens as its own; False, and else: a call of their own each, for less memory.
        apply: the guidance vectors of another run of as many steps and from the same noise, which
            are added too; there may then be no edits.
        backend: as in `sega_guidance`.

    Yields:
        The block's `SemanticGuidance`, whose `record()` returns a list that the next run fills with
        its guidance vectors, for `apply`.

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names; the pipeline is
            as it was.

    Source: Brack et al., SEGA: Instructing Text-to-Image Models using Semantic Guidance, NeurIPS
    2023.

    Example:
        >>> import torch
        >>> from diffusers import StableDiffusion3Pipeline
        >>> from dense_attn.examples._tiny_pipeline import tiny_pipeline
        >>> from dense_attn.integrations.diffusers import Edit, semantic_guidance
        >>> pipe = tiny_pipeline(StableDiffusion3Pipeline)
        >>> smile, hat = Edit("smiling", scale=4, warmup=1), Edit("hat", warmup=2, reverse=True)
        >>> noise = {"num_inference_steps": 4, "height": 16, "width": 16}
        >>> with semantic_guidance(pipe, [smile, hat]) as guidance:
        ...     vectors = guidance.record()
        ...     image = pipe("a face", **noise, generator=torch.manual_seed(0)).images[0]
        >>> with semantic_guidance(pipe, apply=vectors):  # more of both, without an estimate
        ...     image = pipe("a drawing", **noise, generator=torch.manual_seed(0)).images[0]
    """
    model = model_of(pipe)
    together = _checks.flag("batch_concepts", batch_concepts)
    options = settings(edits, momentum_scale, momentum_beta, backend, apply)
    block = guided_unet if model.component == "unet" else guided_transformer
    with block(pipe, model, options, [edit.prompt for edit in edits], together) as guidance:
        warn_of_idle(edits, 3)  # at the user's `with`
        yield guidance

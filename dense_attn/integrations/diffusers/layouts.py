"""apply_layout: each phrase of a prompt where the layout says, on a pipeline of a known model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dense_attn import _checks
from dense_attn._backends import table
from dense_attn.layout_attention.op import MODULATIONS

from ._attention_hook import marked
from .hooks import unwrapped, watched
from .models import attention_layers, model_of
from .regions import parse
from .state import LayoutState, Options
from .text.encoding import heard
from .text.reading import Reading

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@contextmanager
def apply_layout(
    pipe: DiffusionPipeline,
    prompt: str | Sequence[str],
    regions: Sequence[Any],
    *,
    cross_weight: float = 1.0,
    self_weight: float = 0.3,
    active: float = 0.3,
    exponent: float = 5.0,
    size_weight: float = 1.0,
    modulation: str = "range",
    encode_phrases: bool = True,
    backend: str = "auto",
) -> Iterator[None]:
    """Calls of the pipeline inside the block put each phrase of the prompt where its region is.

    In the first steps every attention layer of the conditional half is `layout_attention` with the
    strength `c = weight * time^exponent * (1 - size_weight*area)` of an image token, where time
    falls from 1 to 0 and area is the image's share of the token's regions. All other attention is
    that of the pipeline, in the backend that it has. Blocks inside of a block: the innermost
    counts. Call `pipe` itself, not another pipeline around the same model.

    Args:
        pipe: of a UNet2DConditionModel (Stable Diffusion 1, 2, XL, Kolors), or the transformer of
            Stable Diffusion 3, FLUX, Chroma, Qwen-Image, Z-Image, Lumina 2, PixArt, AuraFlow or Wan
            (every frame has the regions).
        prompt: what the pipeline will be called with, or one prompt for each image; all its
            tokenizers read it. A call with another one is warned of, also of `prompt_embeds` that
            are not the prompt's in any weight.
        regions: a list of `(phrase, mask)`, or one such list for each prompt. A phrase is a part of
            the prompt, or None for a region without one; its mask a bool array [H, W], a PIL image,
            light and opaque there, or a box (x0, y0, x1, y1) in 0..1. A phrase is whole words,
            where they first stand in the prompt; a `Phrase` names another place. Where two overlap
            the later counts; a region left without a token is warned of.
        cross_weight, self_weight: strengths of attention to text and to the image; 0 leaves it
            alone. In joint attention (all but U-Nets, PixArt and Wan) image tokens' rows take
            self_weight, rows of a phrase's tokens cross_weight; under "mask", which has no
            strength, only both at 0 count there.
        active: the part of the steps in which the layout acts, from the first.
        exponent, size_weight: how fast strength falls with time, and how much less a large region
            gets.
        modulation: as in `layout_attention`; under "mask" tokens of no region take part everywhere.
        encode_phrases: replace the embeddings of a phrase's tokens by those that it has on its own,
            as `encode_prompt` makes them with the options of the call (LoRA scale, `clip_skip`,
            `max_sequence_length`).
        backend: as in `layout_attention`.

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names; the pipeline is
            as it was. So does a call whose rows, steps or tokens are no layout's; those that
            another extension has merged are warned of.

    Source: Kim et al., Dense Text-to-Image Generation with Attention Modulation, ICCV 2023.

    Example:
        >>> from diffusers import StableDiffusionPipeline
        >>> from dense_attn.examples._tiny_pipeline import tiny_pipeline
        >>> from dense_attn.integrations.diffusers import apply_layout
        >>> pipe = tiny_pipeline(StableDiffusionPipeline)
        >>> with apply_layout(pipe, "a cat", [("cat", (0.0, 0.0, 0.5, 1.0))]):
        ...     image = pipe("a cat", num_inference_steps=4).images[0]
    """
    model = model_of(pipe)
    options = Options(
        cross_weight=_checks.number("cross_weight", cross_weight),
        self_weight=_checks.number("self_weight", self_weight),
        active=_checks.fraction("active", active),
        exponent=_not_negative("exponent", exponent),
        size_weight=_checks.number("size_weight", size_weight),
        modulation=_checks.choice("modulation", modulation, MODULATIONS),
        backend=_checks.choice("backend", backend, ("auto", *table.ORDER)),
    )
    prompts = _prompts(prompt)
    parsed = parse(regions, len(prompts))
    _checks.flag("encode_phrases", encode_phrases)
    component = getattr(pipe, model.component)
    layers = attention_layers(unwrapped(component), model)
    reading = Reading(pipe, prompts, parsed, encode_phrases)
    state = LayoutState(pipe, model, reading, options)
    with (
        heard(pipe, reading.hear),
        marked(state.marks(layers)),
        watched(component, state, state.before_call),
    ):
        yield


def _not_negative(argument: str, value: object) -> float:
    if _checks.number(argument, value) < 0:
        _checks.refuse(argument, "be at least 0", value)
    return float(value)


def _prompts(prompt: object) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if (
        not isinstance(prompts, Sequence)
        or not prompts
        or not all(isinstance(text, str) for text in prompts)
    ):
        _checks.refuse("prompt", "be a string or a list of strings", repr(prompt), TypeError)
    return list(prompts)

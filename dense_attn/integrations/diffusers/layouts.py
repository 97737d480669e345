"""apply_layout: each phrase of a prompt where the layout says, on a pipeline of a known model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from dense_attn import _checks
from dense_attn._backends import table

from ._attention_hook import marked
from .calls import called
from .hooks import unwrapped, watched
from .models import attention_layers, model_of
from .modular.pipeline import listened, viewed
from .options.blocks import check_count, check_phrases
from .options.numbers import options_of
from .prompts import region
from .prompts.models import region_state
from .prompts.numbering import numbered
from .prompts.options import options_of as region_options
from .prompts.region import has_prompts
from .prompts.state import RegionState
from .regions import parse
from .state import LayoutState
from .text.reading import Reading

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@contextmanager
def apply_layout(
    pipe: DiffusionPipeline,
    prompt: str | Sequence[str] | None,
    regions: Sequence[Any],
    *,
    cross_weight: float | None = None,
    self_weight: float | None = None,
    active: float | tuple[float, float] | None = None,
    active_sigma: float | None = None,
    exponent: float | None = None,
    size_weight: float = 1.0,
    modulation: str | None = None,
    blocks: str | Sequence[str] | None = None,
    encode_phrases: bool = True,
    base_ratio: float = 0.0,
    isolate: float = 0.0,
    every: int = 1,
    area_scaling: bool = False,
    backend: str = "auto",
) -> Iterator[None]:
    """Calls of the pipeline inside the block put each phrase of the prompt where its region is.

    In the first steps every attention layer of the conditional half is `layout_attention` with the
    strength `c = weight * time^exponent * (1 - size_weight*area)` of an image token, where time
    falls from 1 to 0 and area is the image's share of the token's regions. All other attention is
    that of the pipeline, in the backend that it has. Blocks inside of a block: the innermost
    counts. Call `pipe` itself, not another pipeline around the same model.

    Numbers that are None are the model's: DenseDiffusion's for attention across to the text, as in
    U-Nets, PixArt and Wan (range, 1.0 and 0.3, time^5, 0.3 of the steps); for joint attention a
    bias of 3 on image tokens towards text tokens, as strong in all of the first half of the steps,
    which two small models found (docs/diffusers.md). With a modulation that is not the
    model's own they are DenseDiffusion's.

    Regions may have prompts of their own instead (`Region`): a token of the image then sees the
    prompt of its region, and the call's where it is in none. Regions share a token by
    `weight * mask`: `sum_r share_r * attention(q, k_r, v_r)`, which is one call of the attention
    where they do not overlap, and else as many as a token has prompts. In joint attention a
    region's text sees itself and the image in its region; its tokens are numbered from the first,
    and an image that stands behind the text is behind the longest that it sees. What a model makes
    of the whole prompt beside its tokens (the pooled vector of SDXL and FLUX) stays the call's.

    Args:
        pipe: of a UNet2DConditionModel (Stable Diffusion 1, 2, XL, Kolors), or the transformer of
            Stable Diffusion 3, FLUX.1 and FLUX.2, Chroma, Qwen-Image and its Edit, Z-Image,
            Lumina 2, CogView4, AuraFlow, PixArt, HunyuanDiT, HunyuanImage, SANA (without its
            self-attention, which is linear), Kandinsky 5 or ChronoEdit, or of a video's Wan (also
            2.2, of two), SkyReels V2, LTX-Video, HunyuanVideo (also 1.5) or CogVideoX. Of a modular
            pipeline the calls are changed that its guider makes for the prompt's estimate
            (`pred_cond`), in any order.
        prompt: what the pipeline will be called with, or one prompt for each image; all its
            tokenizers read it. A call with another one is warned of, also of `prompt_embeds` that
            are not the prompt's in any weight. None where regions with prompts cover the image:
            theirs alone count, whatever the call's, in all layers and steps.
        regions: a list of `(phrase, mask)` or of `Region`, or one such list for each prompt, which
            may be empty among those of `Region`. A phrase is a part of the prompt, or None for a
            region without one; its mask a bool array [H, W], a PIL image, light and opaque there,
            or a box (x0, y0, x1, y1) in 0..1. Every frame of a video has it; an array [F, H, W] has
            a mask for each frame of the video, or of its latents, which take the middle one of
            their frames. A phrase is whole words, where they first stand in the prompt; a `Phrase`
            names another place. Where two overlap the later counts; a region left without a token
            is warned of.
        cross_weight, self_weight: strengths of attention to text and to the image; 0 leaves it
            alone. In joint attention a row has one: image tokens' self_weight where blocks has
            image->image, and else cross_weight, which is also that of a phrase's tokens. They must
            be equal for image->text and image->image alone, where one that is not given follows
            the other. One that counts nowhere is refused unless it is 0. Under "mask", which has no
            strength, only 0 counts, for all rows that blocks touch.
        active: the part of the steps in which the layout acts, from the first, or its first and
            last end, `(start, stop)`, where regions have prompts, and None is all of them.
        active_sigma: in the place of active, on a flow: the layout acts until its sigma, 1 at pure
            noise, has fallen to this, however many steps a schedule's shift spends above it.
        exponent, size_weight: how fast strength falls with time, and how much less a large region
            gets.
        modulation: as in `layout_attention`; under "mask" tokens of no region take part everywhere.
        blocks: the pairs that are touched, from queries to keys: some of "image->text" and
            "image->image" (cross- and self-attention), in joint attention also "text->image" and
            "text->text"; all others are as without a layout. "range" changes all scores of a row,
            and takes both of a kind of rows or none. Blocks that are not all of some rows towards
            all of some columns take two bits a region, 16 regions at most.
        encode_phrases: replace the embeddings of a phrase's tokens by those that it has on its own,
            as `encode_prompt` makes them with the options of the call (LoRA scale, `clip_skip`,
            `max_sequence_length`), and beside its images where the pipeline reads them so.
        base_ratio: the call's prompt has this share in every region with a prompt, and these the
            rest; it costs a call of the attention.
        isolate: how much less regions with prompts see of each other in self-attention: a token of
            another region, or of none, counts `1 - isolate` times (joint attention takes 0 or 1).
        every: regions with prompts act in the first of so many cross-attention layers, and likewise
            of self-attention layers.
        area_scaling: scores of tokens of a region's prompt are multiplied by the image's area over
            the region's, `softmax(area_image / area_r * scale * q k_r^T)`, which makes small
            regions decided (Omost); in cross-attention alone.
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
    given = {
        "cross_weight": cross_weight,
        "self_weight": self_weight,
        "exponent": exponent,
        "size_weight": size_weight,
        "modulation": modulation,
        "blocks": blocks,
        "active": active,
        "active_sigma": active_sigma,
        "encode_phrases": encode_phrases,
        "base_ratio": base_ratio,
        "isolate": isolate,
        "every": every,
        "area_scaling": area_scaling,
    }
    pipe = viewed(pipe)
    build = _with_prompts if has_prompts(regions) else _with_phrases
    state = build(pipe, prompt, regions, given, backend)
    layers: dict[str, tuple[Any, str, int]] = {}
    denoisers = state.model.denoisers(pipe)
    for start, denoiser in denoisers.items():
        layers |= attention_layers(unwrapped(denoiser), state.model, start)
    with ExitStack() as stack:
        stack.enter_context(listened(pipe, state.reading.hear))
        if state.model.video or state.options.active_sigma is not None:
            stack.enter_context(called(getattr(pipe, "pipe", pipe), state.hear_call))
        stack.enter_context(marked(state.marks(layers)))
        stack.enter_context(numbered(state))
        for denoiser in denoisers.values():
            stack.enter_context(watched(denoiser, state, state.before_call))
        yield
    if isinstance(state, RegionState):
        state.tell_of_negatives()


def _with_phrases(
    pipe: DiffusionPipeline,
    prompt: object,
    regions: object,
    given: dict[str, Any],
    backend: object,
) -> LayoutState:
    """The state of regions with phrases."""
    model = model_of(pipe)
    options = options_of(model, given, _backend(backend))
    prompts = _prompts(prompt)
    parsed = parse(regions, len(prompts), model.video)
    check_count(options.blocks, max(len(image.phrases) for image in parsed))
    check_phrases(options.blocks, options.modulation, parsed)
    encode_phrases = _checks.flag("encode_phrases", given["encode_phrases"])
    _unused(given, ("base_ratio", "isolate", "every", "area_scaling"), "phrases")
    return LayoutState(pipe, model, Reading(pipe, prompts, parsed, encode_phrases), options)


def _with_prompts(
    pipe: DiffusionPipeline,
    prompt: object,
    regions: Sequence[Any],
    given: dict[str, Any],
    backend: object,
) -> RegionState:
    """The state of regions with prompts."""
    prompts, model = None if prompt is None else _prompts(prompt), model_of(pipe)
    parsed = region.parse(regions, prompts, model.video)
    weights = "cross_weight", "self_weight", "exponent", "size_weight"
    _unused(given, (*weights, "modulation", "blocks", "encode_phrases"), "prompts of their own")
    ratios = region_options(given, _backend(backend), prompts is not None)
    return region_state(pipe, model, prompts, parsed, ratios)


def _unused(given: dict[str, Any], names: tuple[str, ...], kind: str) -> None:
    """Refuse arguments that regions of a kind do not have, but for their defaults."""
    for name in names:
        default = inspect.signature(apply_layout).parameters[name].default
        kinds = (float, int) if type(default) is float else (type(default),)
        if type(given[name]) not in kinds or given[name] != default:  # arrays tell no truth
            rule = f"stay {default!r} where regions have {kind}"
            _checks.refuse(name, rule, repr(given[name]))


def _backend(backend: object) -> str:
    return _checks.choice("backend", backend, ("auto", *table.ORDER))


def _prompts(prompt: object) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if (
        not isinstance(prompts, Sequence)
        or not prompts
        or not all(isinstance(text, str) for text in prompts)
    ):
        _checks.refuse("prompt", "be a string or a list of strings", repr(prompt), TypeError)
    return list(prompts)

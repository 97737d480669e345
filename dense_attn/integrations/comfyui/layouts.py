"""apply_layout and apply_region_prompts: a model of ComfyUI that has masks for conditionings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dense_attn import _checks
from dense_attn._backends import table
from dense_attn._backends.contract import MODULATIONS

from .models import model_of
from .numbers import Numbers
from .regions import Region, checked
from .words import of_layouts, of_prompts
from .wrapper import Wrapper

KEY = "dense_attn"  # of what the library adds to a model
AUTO = "auto"


def apply_layout(
    model: Any,
    regions: Sequence[Region],
    *,
    modulation: str = AUTO,
    strength: float = 1.0,
    self_strength: float = 1.0,
    size_weight: float = 1.0,
    start: float = 0.0,
    end: float | None = None,
    backend: str = AUTO,
) -> Any:
    """A model that pulls each region of an image toward a conditioning (DenseDiffusion).

    The texts of the regions stand behind the prompt's, and attention is modulated as `apply_layout`
    on a pipeline does, in rows that see the positive prompt: `cond_or_uncond` of a call says which.
    Attention that is not modulated goes on to the `optimized_attention_override` that there is.

    Args:
        model: a ModelPatcher, of a UNet (Stable Diffusion 1, 2, XL), Stable Diffusion 3, FLUX,
            Qwen-Image or Wan.
        regions: masks above 0.5 and their conditionings.
        modulation: "range", "max" or "bias" as in `layout_attention`, or "auto" for the model's:
            "bias" where text and image attend jointly, else "range".
        strength, self_strength: times what the model has without a word: 1.0 towards the text and
            0.3 towards the image, falling with time^5, and a bias of 3 in joint attention. 0 leaves
            that attention alone, to the prompt without the regions' texts.
        size_weight: how much less a large region gets.
        start, end: the part of the schedule, in ComfyUI's percents from 0 to 1; None ends where the
            model has it, at 0.3, or 0.5 in joint attention.
        backend: as in `layout_attention`.

    Returns:
        A clone of the model; the one that is given stays as it is.

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names; later, when
            sampling, a call whose rows or tokens are not known.

    Source: Kim et al., Dense Text-to-Image Generation with Attention Modulation, ICCV 2023.
    """
    record = model_of(model)
    checked_regions = checked(regions)
    own = record.defaults
    if modulation != AUTO:
        _checks.choice("modulation", modulation, (AUTO, *MODULATIONS[:3]))
    numbers = Numbers.of(
        record,
        own.modulation if modulation == AUTO else modulation,
        _checks.number("strength", strength, torch.float32),
        _checks.number("self_strength", self_strength, torch.float32),
        _checks.number("size_weight", size_weight, torch.float32),
        _backend(backend),
    )
    window = _window(start, numbers.end if end is None else end)
    if not numbers.acts:
        return model.clone()
    make = of_layouts(checked_regions, numbers)
    return _with(model, Wrapper(checked_regions, record, make, window, numbers.exponent))


def apply_region_prompts(
    model: Any,
    regions: Sequence[Region],
    *,
    base_ratio: float = 0.0,
    start: float = 0.0,
    end: float = 1.0,
    backend: str = AUTO,
) -> Any:
    """A model whose image sees a conditioning in its region, and the prompt where it is in none.

    `sum_r share_r * attention(q, k_r, v_r)`: one call of the attention where regions do not
    overlap. They share a token by `weight * mask`, and soft masks leave the rest to the prompt.

    Args:
        model: as in `apply_layout`.
        regions: masks, soft ones too, and their conditionings.
        base_ratio: the prompt's share in every region; it costs a call of the attention.
        start, end: the part of the schedule, in ComfyUI's percents from 0 to 1.
        backend: as in `layout_attention`.

    Returns:
        A clone of the model; the one that is given stays as it is.

    Raises:
        ValueError, TypeError: as `apply_layout`.
    """
    record = model_of(model)
    checked_regions = checked(regions)
    ratio = _checks.fraction("base_ratio", base_ratio)
    make = of_prompts(checked_regions, ratio, _backend(backend))
    return _with(model, Wrapper(checked_regions, record, make, _window(start, end), 0.0))


def _with(model: Any, wrapper: Wrapper) -> Any:
    """A clone of a model with a wrapper of its calls."""
    from comfy.patcher_extension import WrappersMP

    if model.wrappers.get(WrappersMP.APPLY_MODEL, {}).get(KEY):
        _checks.refuse("model", "have no regions of dense_attn yet", "some: give them in one list")
    patched = model.clone()
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, wrapper)
    return patched


def _window(start: float, end: float) -> tuple[float, float]:
    first, last = _checks.fraction("start", start), _checks.fraction("end", end)
    if first > last:
        _checks.refuse("start", f"be at most end, {last}", first)
    return first, last


def _backend(backend: object) -> str:
    return _checks.choice("backend", backend, (AUTO, *table.ORDER))

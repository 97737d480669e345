"""Which models take prompts of regions, and with which options."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from dense_attn import _checks

from ..hooks import unwrapped
from ..text.encoding import missing
from .reading import RegionReading
from .state import RegionState

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..models.record import Model
    from .options import Options
    from .region import Regions


def region_state(
    pipe: DiffusionPipeline,
    model: Model,
    prompts: list[str] | None,
    regions: list[Regions],
    options: Options,
) -> RegionState:
    """The state of a block, for a model whose kind of attention is known."""
    kind, joint = model.denoiser, model.joint
    if not (model.longer_text or (model.longer_text is None and not joint)):
        rule = "have a model whose record places texts of regions (longer_text)"
        _checks.refuse("pipe", rule, f"{type(pipe).__name__} with {kind}")
    if joint and options.isolate not in (0, 1):
        _checks.refuse("isolate", f"be 0 or 1 for a {kind}", options.isolate)
    if joint and options.area_scaling:  # a key's factor would count for the text's queries too
        _checks.refuse("area_scaling", f"be False for a {kind}, of joint attention", True)
    lacking = missing(pipe)
    if lacking is not None:
        rule = f"have its {lacking} where regions have prompts of their own"
        _checks.refuse("pipe", rule, "none")
    reading = RegionReading(pipe, prompts, regions, _as_long(pipe, model))
    return RegionState(pipe, model, reading, options)


def _as_long(pipe: DiffusionPipeline, model: Model) -> bool:
    """Whether a region's text must be as long as a call's: rows below it, or padding is seen."""
    if model.beside is not None or model.keeps_padding or model.component == "unet":
        return True
    calls = (unwrapped(denoiser).forward for denoiser in model.denoisers(pipe).values())
    return not any(model.text_mask in inspect.signature(call).parameters for call in calls)

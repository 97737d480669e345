"""The kinds of denoisers that take prompts of regions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dense_attn import _checks

from ..text.encoding import missing
from .joint import JointState
from .state import RegionReading, RegionState

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..models.record import Model
    from .options import Options
    from .region import Regions

STATES: dict[str, type[RegionState]] = {
    "UNet2DConditionModel": RegionState,
    "FluxTransformer2DModel": JointState,
}


def region_state(
    pipe: DiffusionPipeline,
    model: Model,
    prompts: list[str] | None,
    regions: list[Regions],
    options: Options,
) -> RegionState:
    """The state of a block, for a model whose kind of attention is known."""
    if model.denoiser not in STATES:
        rule = f"have a {' or '.join(STATES)} where regions have prompts of their own"
        _checks.refuse("pipe", rule, f"{type(pipe).__name__} with {model.denoiser}")
    lacking = missing(pipe)
    if lacking is not None:
        rule = f"have its {lacking} where regions have prompts of their own"
        _checks.refuse("pipe", rule, "none")
    return STATES[model.denoiser](pipe, model, RegionReading(pipe, prompts, regions), options)

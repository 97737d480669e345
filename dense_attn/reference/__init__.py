"""The maths in PyTorch: what every kernel of the library computes, without tiling or options."""

from dense_attn._dtypes import accumulation_dtype
from dense_attn.reference.layout_attention import layout_attention, modulate
from dense_attn.reference.reversible import (
    GRID_LIMIT,
    OffGridError,
    ddim_step,
    edict_mix,
    edict_unmix,
    exact_couple,
    exact_leapfrog,
    exact_mix,
    exact_unmix,
    leapfrog_step,
    off_grid,
)
from dense_attn.reference.sega import (
    percentile_mask,
    quantile,
    sega_combine,
    sega_differences,
    sega_guidance,
    sega_magnitudes,
    sega_weights,
)

__all__ = [
    "GRID_LIMIT",
    "OffGridError",
    "accumulation_dtype",
    "ddim_step",
    "edict_mix",
    "edict_unmix",
    "exact_couple",
    "exact_leapfrog",
    "exact_mix",
    "exact_unmix",
    "layout_attention",
    "leapfrog_step",
    "modulate",
    "off_grid",
    "percentile_mask",
    "quantile",
    "sega_combine",
    "sega_differences",
    "sega_guidance",
    "sega_magnitudes",
    "sega_weights",
]

"""The checks of raw calls of kernels that have none of their own: one of each op, by its name and
with its signature. No value on a GPU is looked at, since that would wait for it.
"""

from dense_attn._backends.raw_checks.forms import bwd_form, fwd_form, sega_form
from dense_attn._backends.raw_checks.layout_attention import (
    layout_attention_bwd,
    layout_attention_fwd,
    lists,
    tile_lists,
    values,
)
from dense_attn._backends.raw_checks.reversible import (
    ddim_step,
    edict_mix,
    edict_unmix,
    exact_couple,
    exact_leapfrog,
    exact_mix,
    exact_unmix,
    leapfrog_step,
    looked_at,
    on_the_grid,
)
from dense_attn._backends.raw_checks.sega import (
    collapses,
    percentile_mask,
    sega_guidance,
)

__all__ = [
    "bwd_form",
    "collapses",
    "ddim_step",
    "edict_mix",
    "edict_unmix",
    "exact_couple",
    "exact_leapfrog",
    "exact_mix",
    "exact_unmix",
    "fwd_form",
    "layout_attention_bwd",
    "layout_attention_fwd",
    "leapfrog_step",
    "lists",
    "looked_at",
    "on_the_grid",
    "percentile_mask",
    "sega_form",
    "sega_guidance",
    "tile_lists",
    "values",
]

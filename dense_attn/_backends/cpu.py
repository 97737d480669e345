"""The CPU backend: the compiled library's ops under the names of the table, and their fake
kernels.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dense_attn._backends import ops


def _load() -> str | None:
    """Load the compiled library; the reason why not, or None."""
    libraries = sorted(Path(__file__).parents[1].glob("_C*.so"))
    if not libraries:
        return "the compiled library is missing: install dense_attn from a wheel or with a C++ compiler"
    try:
        torch.ops.load_library(str(libraries[0]))
    except (OSError, RuntimeError) as error:
        return f"the compiled library does not load: {str(error).splitlines()[0]}"
    absent = [name for name in ops.OPS if not hasattr(torch.ops.dense_attn, name)]
    if absent:
        return f"the compiled library is of another version, without {', '.join(absent)}: install it again"
    return None


def isa_error() -> str | None:
    """The reason why DENSE_ATTN_ISA lets no kernel run; None if it lets one."""
    try:
        torch.ops.dense_attn.cpu_isa()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


LOAD_ERROR = _load()

if LOAD_ERROR is None:
    layout_attention_fwd = torch.ops.dense_attn.layout_attention_fwd.default
    layout_attention_bwd = torch.ops.dense_attn.layout_attention_bwd.default
    percentile_mask = torch.ops.dense_attn.percentile_mask.default
    sega_guidance = torch.ops.dense_attn.sega_guidance.default
    ddim_step = torch.ops.dense_attn.ddim_step.default
    leapfrog_step = torch.ops.dense_attn.leapfrog_step.default
    edict_mix = torch.ops.dense_attn.edict_mix.default
    edict_unmix = torch.ops.dense_attn.edict_unmix.default
    exact_couple = torch.ops.dense_attn.exact_couple.default
    exact_leapfrog = torch.ops.dense_attn.exact_leapfrog.default
    exact_mix = torch.ops.dense_attn.exact_mix.default
    exact_unmix = torch.ops.dense_attn.exact_unmix.default

    for _name, _fake in ops.OPS.items():
        torch.library.register_fake(f"dense_attn::{_name}", _fake)

"""The Triton backend: launchers as opaque ops under the names of the table, with the fake kernels
of every backend.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from importlib.util import find_spec

import torch
from torch import Tensor

from dense_attn import _environment, _tuned
from dense_attn._backends import ops, raw_checks

_OLDEST = (3, 6)
_NO_GPU = "this build of torch knows no GPU, and TRITON_INTERPRET=1 is not set"


def _load() -> str | None:
    """Load Triton and the launchers; the reason why not, or None."""
    global layout_attention, reversible, sega
    if find_spec("triton") is None:
        return "Triton is not installed: pip install dense_attn[triton]"
    knows_gpu = torch.version.cuda is not None or torch.version.hip is not None
    try:
        if not knows_gpu and not _environment.flag("TRITON_INTERPRET"):
            return _NO_GPU
        import triton

        if tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) < _OLDEST:
            oldest = ".".join(map(str, _OLDEST))
            return f"needs Triton {oldest} or newer, got {triton.__version__}: pip install dense_attn[triton]"
        from dense_attn.triton_kernels import autotune, layout_attention, reversible, sega
    except _environment.VariableError as error:
        return str(error)
    except Exception as error:  # another package's, of any kind, and not to take this one along
        return f"Triton does not load: {(str(error).splitlines() or [type(error).__name__])[0]}"
    autotune.store = _tuned
    return None


def _on_its_device(launch: Callable) -> Callable:
    """The same launcher: kernels go to the current device, which this makes that of the first
    tensor.
    """

    @wraps(launch)
    def launched(first: Tensor, *arguments: object, **named: object) -> object:
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            return launch(first, *arguments, **named)

    return launched


def _layout_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, q_regions: Tensor, k_regions: Tensor, strength: Tensor, modulation: str,
    scale: float, q_order: Tensor | None, k_order: Tensor | None = None,
    lists: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    raw_checks.inputs(q, k, v, q_regions, k_regions, strength, modulation, scale, q_order, k_order)
    if lists is not None:
        raw_checks.lists(lists, q, k, layout_attention.fwd_blocks(q, k))
        lists = layout_attention.TileLists(*lists)
    return layout_attention.layout_attention_fwd(
        q, k, v, q_regions, k_regions, strength, modulation, scale, q_order, k_order, lists
    )


def _layout_attention_bwd(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, q_regions: Tensor, k_regions: Tensor,
    strength: Tensor, out: Tensor, stats: Tensor, modulation: str, scale: float, q_order: Tensor | None,
    k_order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    raw_checks.inputs(q, k, v, q_regions, k_regions, strength, modulation, scale, q_order, k_order)
    raw_checks.saved(grad_out, grad_lse, q, out, stats)
    return layout_attention.layout_attention_bwd(
        grad_out,
        grad_lse,
        q,
        k,
        v,
        q_regions,
        k_regions,
        strength,
        out,
        stats,
        modulation,
        scale,
        q_order,
        k_order,
    )


def _tile_lists(
    q_regions: Tensor,
    k_regions: Tensor,
    q_order: Tensor | None,
    k_order: Tensor | None,
    block_m: int,
    block_n: int,
) -> tuple[Tensor, Tensor, Tensor]:
    raw_checks.tokens(q_regions, k_regions, q_order, k_order, block_m, block_n)
    return tuple(
        layout_attention.tile_lists(q_regions, k_regions, q_order, k_order, block_m, block_n)
    )


def lists_of(
    q: Tensor,
    k: Tensor,
    q_regions: Tensor,
    k_regions: Tensor,
    q_order: Tensor | None,
    k_order: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Tile lists of calls like this one, None for those that visit no tiles."""
    blocks = layout_attention.fwd_blocks(q, k)
    return None if blocks is None else tile_lists(q_regions, k_regions, q_order, k_order, *blocks)


_EDICT = "(Tensor x, Tensor y, Tensor? eps, float a, float b, float mix, bool couple_x) -> (Tensor x_out, Tensor y_out)"
_EXACT_EDICT = (
    "(Tensor x, Tensor y, Tensor? eps, float step, float mix, bool couple_x, float to_latent, bool latent_x, "
    "ScalarType dtype) -> (Tensor x_out, Tensor y_out, Tensor latent)"
)
SCHEMAS = {  # those of the compiled ops, but for what has a default
    "layout_attention_fwd": (
        "(Tensor q, Tensor k, Tensor v, Tensor q_regions, Tensor k_regions, Tensor strength, str modulation, "
        "float scale, Tensor? q_order, Tensor? k_order=None, Tensor[]? lists=None) -> "
        "(Tensor out, Tensor lse, Tensor stats)"
    ),
    "layout_attention_bwd": (
        "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor q_regions, Tensor k_regions, "
        "Tensor strength, Tensor out, Tensor stats, str modulation, float scale, Tensor? q_order, "
        "Tensor? k_order=None) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dstrength)"
    ),
    "percentile_mask": "(Tensor x, float level) -> (Tensor masked, Tensor threshold)",
    "sega_guidance": (
        "(Tensor eps_uncond, Tensor eps_text, Tensor eps_edits, Tensor momentum, *, float guidance_scale, "
        "float[] edit_guidance_scale, float[] edit_threshold, float[] weights, float[] partials, bool all_warm, "
        "bool[] reverse, float edit_momentum_scale, float edit_mom_beta, Tensor? user_mask, bool sum_channels) -> "
        "(Tensor eps, Tensor momentum_out, Tensor thresholds)"
    ),
    "ddim_step": "(Tensor x, Tensor eps, Tensor? eps_uncond, float a, float b, float guidance_scale) -> Tensor",
    "leapfrog_step": "(Tensor far, Tensor near, Tensor eps, float c_far, float c_near, float c_eps) -> Tensor",
    "edict_mix": _EDICT,
    "edict_unmix": _EDICT,
    "exact_couple": (
        "(Tensor z, Tensor eps, float step, float to_latent, ScalarType dtype) -> (Tensor z_out, Tensor latent)"
    ),
    "exact_leapfrog": (
        "(Tensor far, Tensor near, Tensor eps, float c_near, float c_eps, float to_latent, ScalarType dtype) -> "
        "(Tensor z_out, Tensor latent)"
    ),
    "exact_mix": _EXACT_EDICT,
    "exact_unmix": _EXACT_EDICT,
}

OWN_SCHEMAS = {  # those that no other backend has
    "tile_lists": (
        "(Tensor q_regions, Tensor k_regions, Tensor? q_order, Tensor? k_order, int block_m, int block_n) -> "
        "(Tensor tiles, Tensor counts, Tensor k_words)"
    ),
}


def _launchers() -> dict[str, Callable]:
    """What runs each op."""
    attention = {
        "layout_attention_fwd": _layout_attention_fwd,
        "layout_attention_bwd": _layout_attention_bwd,
    }
    guidance = {"percentile_mask": sega.percentile_mask, "sega_guidance": sega.sega_guidance}
    steps = {
        name: getattr(reversible, name)
        for name in SCHEMAS.keys() - attention.keys() - guidance.keys()
    }
    return attention | guidance | steps | {"tile_lists": _tile_lists}


LOAD_ERROR = _load()
DEVICE = "cuda"  # the kind of tensors that the ops take

if LOAD_ERROR is None:
    DEVICE = "cpu" if layout_attention.configs.interpreted() else "cuda"
    _library = torch.library.Library("dense_attn_triton", "DEF")
    _all_fakes = ops.OPS | {"tile_lists": ops.tile_lists}
    for _name, _launch in _launchers().items():
        _library.define(_name + (SCHEMAS | OWN_SCHEMAS)[_name])
        _library.impl(_name, _on_its_device(_launch), DEVICE.upper())
        torch.library.register_fake(f"dense_attn_triton::{_name}", _all_fakes[_name], lib=_library)
    tile_lists = torch.ops.dense_attn_triton.tile_lists.default
    layout_attention_fwd = torch.ops.dense_attn_triton.layout_attention_fwd.default
    layout_attention_bwd = torch.ops.dense_attn_triton.layout_attention_bwd.default
    percentile_mask = torch.ops.dense_attn_triton.percentile_mask.default
    sega_guidance = torch.ops.dense_attn_triton.sega_guidance.default
    ddim_step = torch.ops.dense_attn_triton.ddim_step.default
    leapfrog_step = torch.ops.dense_attn_triton.leapfrog_step.default
    edict_mix = torch.ops.dense_attn_triton.edict_mix.default
    edict_unmix = torch.ops.dense_attn_triton.edict_unmix.default
    exact_couple = torch.ops.dense_attn_triton.exact_couple.default
    exact_leapfrog = torch.ops.dense_attn_triton.exact_leapfrog.default
    exact_mix = torch.ops.dense_attn_triton.exact_mix.default
    exact_unmix = torch.ops.dense_attn_triton.exact_unmix.default

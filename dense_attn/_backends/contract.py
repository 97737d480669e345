"""The contract of the raw ops, as data: each op's schema, and the numbers and words that kernels in
other languages share.

It imports nothing of torch: the build reads it too, and the compiled library knows its digest.
"""

from __future__ import annotations

from hashlib import sha256

MODULATIONS = ("range", "max", "bias", "mask")  # layout attention's rules
MAX_HEAD_DIM = 256  # of a kernel
STATS = 4  # numbers of a row that layout attention's backward pass takes from its forward pass

_EDICT = (
    "(Tensor x, Tensor y, Tensor? eps, float a, float b, float mix, bool couple_x) -> "
    "(Tensor x_out, Tensor y_out)"
)
_EXACT_EDICT = (
    "(Tensor x, Tensor y, Tensor? eps, float step, float mix, bool couple_x, float to_latent, "
    "bool latent_x, ScalarType dtype) -> (Tensor x_out, Tensor y_out, Tensor latent)"
)
SCHEMAS = {
    "layout_attention_fwd": (
        "(Tensor q, Tensor k, Tensor v, Tensor q_regions, Tensor k_regions, Tensor? strength, "
        "str modulation, float scale, Tensor? q_order, Tensor? k_order, Tensor? tiles, "
        "Tensor? counts, Tensor? k_words, float every_strength=1., bool with_lse=True, "
        "bool with_stats=True, Tensor? seqlens_k=None) -> (Tensor out, Tensor lse, Tensor stats)"
    ),
    "layout_attention_bwd": (
        "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor q_regions, "
        "Tensor k_regions, Tensor? strength, Tensor out, Tensor stats, str modulation, "
        "float scale, Tensor? q_order, Tensor? k_order, float every_strength=1., "
        "Tensor? seqlens_k=None) -> "
        "(Tensor dq, Tensor dk, Tensor dv, Tensor dstrength)"
    ),
    "tile_lists": (
        "(Tensor q_regions, Tensor k_regions, Tensor? q_order, Tensor? k_order, int block_m, "
        "int block_n, Tensor? seqlens_k=None) -> (Tensor tiles, Tensor counts, Tensor k_words)"
    ),
    "percentile_mask": "(Tensor x, float level) -> (Tensor masked, Tensor threshold)",
    "sega_guidance": (
        "(Tensor eps_uncond, Tensor eps_text, Tensor eps_edits, Tensor momentum, *, "
        "float guidance_scale, float[] edit_guidance_scale, float[] edit_threshold, "
        "float[] weights, float[] partials, bool all_warm, bool[] reverse, "
        "float edit_momentum_scale, float edit_mom_beta, Tensor? user_mask, bool sum_channels) -> "
        "(Tensor eps, Tensor momentum_out, Tensor thresholds)"
    ),
    "ddim_step": (
        "(Tensor x, Tensor eps, Tensor? eps_uncond, float a, float b, float guidance_scale) -> "
        "Tensor"
    ),
    "leapfrog_step": (
        "(Tensor far, Tensor near, Tensor eps, float c_far, float c_near, float c_eps) -> Tensor"
    ),
    "edict_mix": _EDICT,
    "edict_unmix": _EDICT,
    "exact_couple": (
        "(Tensor z, Tensor eps, float step, float to_latent, ScalarType dtype) -> "
        "(Tensor z_out, Tensor latent)"
    ),
    "exact_leapfrog": (
        "(Tensor far, Tensor near, Tensor eps, float c_near, float c_eps, float to_latent, "
        "ScalarType dtype) -> (Tensor z_out, Tensor latent)"
    ),
    "exact_mix": _EXACT_EDICT,
    "exact_unmix": _EXACT_EDICT,
}
DIGEST = sha256(repr((SCHEMAS, MODULATIONS, MAX_HEAD_DIM, STATS)).encode()).hexdigest()[:16]

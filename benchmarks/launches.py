"""A few small launches of every Triton kernel, for checkers of memory and races: `compute-sanitizer ... launches`."""

from __future__ import annotations

import torch

from dense_attn import ReversibleSampler, _triton, layout_attention, percentile_mask, sega_guidance

DEVICE = _triton.DEVICE


def attention(modulation: str, seqlen_k: int, head_dim: int, dtype: torch.dtype) -> None:
    """Forward and backward, in one tile of keys or in two phases."""
    q, k, v = (
        torch.randn(1, 2, n, head_dim, dtype=dtype, device=DEVICE).requires_grad_() for n in (150, seqlen_k, seqlen_k)
    )
    words = [1 << (torch.arange(n, device=DEVICE, dtype=torch.int32) * 3 // n) for n in (150, seqlen_k)]
    orders = {"q_order": words[0].argsort(stable=True).int(), "k_order": words[1].argsort(stable=True).int()}
    out = layout_attention(q, k, v, *words, 0.6, modulation=modulation, backend="triton", **orders)
    out.float().square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def guidance(size: int) -> None:
    """A step of three concepts and a mask, of channels that fit one program or do not."""
    uncond, text, momentum = torch.randn(3, 1, 2, size, device=DEVICE)
    lists = {"edit_guidance_scale": [5.0] * 3, "edit_threshold": [0.9] * 3, "edit_weights": [1.0] * 3}
    lists |= {"warm": [True] * 3, "enabled": [True] * 3, "reverse": [False] * 3}
    numbers = {"guidance_scale": 7.5, "edit_momentum_scale": 0.1, "edit_mom_beta": 0.4}
    edits = torch.randn(3, 1, 2, size, device=DEVICE)
    eps, _ = sega_guidance(uncond, text, edits, momentum, **numbers, **lists, backend="triton")
    masked, _ = percentile_mask(edits.flatten(0, 2), 0.9, dim=-1, backend="triton")
    assert eps.isfinite().all()
    assert masked.isfinite().all()


def chain(exact: bool) -> None:
    """Two steps of EDICT there and back."""
    alphas = torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)
    sampler = ReversibleSampler(alphas, [700, 300], exact=exact, backend="triton")
    noise = torch.randn(1, 4, 9, 7, device=DEVICE)
    found = sampler.invert(_network, *sampler.sample(_network, noise))
    assert all(x.isfinite().all() for x in found)


def _network(x: torch.Tensor, t: int) -> torch.Tensor:
    return torch.tanh(x)


def main() -> None:
    """Every kernel once or twice."""
    for modulation in ("range", "mask"):
        for seqlen_k, head_dim in ((77, 40), (200, 80)):
            attention(modulation, seqlen_k, head_dim, torch.float16)
    attention("max", 200, 128, torch.float32)
    for size in (1000, 40_000):
        guidance(size)
    for exact in (True, False):
        chain(exact)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("every kernel was launched")


if __name__ == "__main__":
    main()

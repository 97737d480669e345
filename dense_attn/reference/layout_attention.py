"""Layout-modulated softmax attention."""

from __future__ import annotations

import torch
from torch import Tensor


def layout_attention(
    q: Tensor,  # [B, H, M, D]
    k: Tensor,  # [B, H / G, N, D]
    v: Tensor,  # [B, H / G, N, D]
    q_regions: Tensor,  # int32 [M] or [B|1, M]
    k_regions: Tensor,  # int32 [N] or [B|1, N]
    strength: Tensor | float = 1.0,  # broadcastable to [B, H, M]
    *,
    modulation: str = "range",
    scale: float | None = None,
    k_mask: Tensor | None = None,  # bool [B|1, N]
) -> tuple[Tensor, Tensor]:
    """PyTorch implementation of `dense_attn.layout_attention`: returns (out, lse)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if k.shape[-2] == 0:
        lse = q.sum(-1) * 0 - torch.inf  # [B, H, M]
        return q * 0, lse
    if k.shape[1] != q.shape[1]:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if k_mask is not None:  # whatever the others hold
        gone = ~k_mask[:, None, :, None]  # [B|1, 1, N, 1]
        k, v = k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0)
    scores = (q @ k.transpose(-1, -2)) * scale  # [B, H, M, N]
    matched = ((q_regions.unsqueeze(-1) & k_regions.unsqueeze(-2)) != 0).unsqueeze(-3)
    modulated = modulate(scores, matched, strength, modulation, k_mask)

    lse = torch.logsumexp(modulated, dim=-1, keepdim=True)  # [B, H, M, 1]
    shift = lse.masked_fill(lse == -torch.inf, 0.0)  # a row without admissible keys has no weights
    return torch.exp(modulated - shift) @ v, lse.squeeze(-1)


def modulate(
    scores: Tensor,
    matched: Tensor,
    strength: Tensor | float,
    modulation: str,
    k_mask: Tensor | None = None,  # bool [B|1, N]
) -> Tensor:
    """Modulated scores s' of scores [B, H, M, N] under matched [B|1, 1, M|M, N]; -inf where k_mask
    is not, whose scores are no extremes.
    """
    if k_mask is not None:
        gone = ~k_mask[:, None, None]  # [B|1, 1, 1, N]
        high, low = (scores.masked_fill(gone, end) for end in (-torch.inf, torch.inf))
        modulated = _modulated(scores, matched, strength, modulation, high, low)
        return modulated.masked_fill(gone, -torch.inf)
    return _modulated(scores, matched, strength, modulation, scores, scores)


def _modulated(
    scores: Tensor,
    matched: Tensor,
    strength: Tensor | float,
    modulation: str,
    high: Tensor,
    low: Tensor,
) -> Tensor:
    """s', where the keys of the extremes are those of high's maximum and of low's minimum."""
    if modulation == "mask":
        return scores.masked_fill(~matched, -torch.inf)
    c = torch.as_tensor(strength, dtype=scores.dtype, device=scores.device)
    c = c.expand(scores.shape[:-1]).unsqueeze(-1)  # [B, H, M, 1]
    if modulation == "bias":
        return scores + c * matched
    row_max = scores.gather(
        -1, high.argmax(-1, keepdim=True)
    )  # a tie's gradient goes to its first key
    if modulation == "max":
        return scores + c * matched * row_max
    row_min = scores.gather(-1, low.argmin(-1, keepdim=True))
    return (1 - c) * scores + c * torch.where(matched, row_max, row_min)

"""Layout-modulated softmax attention."""

from __future__ import annotations

import torch
from torch import Tensor


def layout_attention(
    q: Tensor,  # [B, H, M, D]
    k: Tensor,  # [B, H, N, D]
    v: Tensor,  # [B, H, N, D]
    q_regions: Tensor,  # int32 [M] or [B|1, M]
    k_regions: Tensor,  # int32 [N] or [B|1, N]
    strength: Tensor | float = 1.0,  # broadcastable to [B, H, M]
    *,
    modulation: str = "range",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """PyTorch implementation of `dense_attn.layout_attention`: returns (out, lse)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if k.shape[-2] == 0:
        lse = q.sum(-1) * 0 - torch.inf  # [B, H, M]
        return q * 0, lse
    scores = (q @ k.transpose(-1, -2)) * scale  # [B, H, M, N]
    matched = ((q_regions.unsqueeze(-1) & k_regions.unsqueeze(-2)) != 0).unsqueeze(-3)
    modulated = modulate(scores, matched, strength, modulation)

    lse = torch.logsumexp(modulated, dim=-1, keepdim=True)  # [B, H, M, 1]
    shift = lse.masked_fill(lse == -torch.inf, 0.0)  # a row without admissible keys has no weights
    return torch.exp(modulated - shift) @ v, lse.squeeze(-1)


def modulate(scores: Tensor, matched: Tensor, strength: Tensor | float, modulation: str) -> Tensor:
    """Modulated scores s' of scores [B, H, M, N] under matched [B|1, 1, M|M, N]."""
    if modulation == "mask":
        return scores.masked_fill(~matched, -torch.inf)
    c = torch.as_tensor(strength, dtype=scores.dtype, device=scores.device)
    c = c.expand(scores.shape[:-1]).unsqueeze(-1)  # [B, H, M, 1]
    if modulation == "bias":
        return scores + c * matched
    row_max = scores.gather(
        -1, scores.argmax(-1, keepdim=True)
    )  # a tie's gradient goes to its first key
    if modulation == "max":
        return scores + c * matched * row_max
    row_min = scores.gather(-1, scores.argmin(-1, keepdim=True))
    return (1 - c) * scores + c * torch.where(matched, row_max, row_min)

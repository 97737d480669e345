"""The dtypes that kernels compute in."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels compute in: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32

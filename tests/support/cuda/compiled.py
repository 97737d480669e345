"""The CUDA backend on tensors of the CPU."""

from __future__ import annotations

from .launch import Runtime


def compiled_backend() -> Runtime:
    """Load the ops of the emulated build, which the backend then takes for its own. To be called
    before anything imports dense_attn.
    """
    import torch

    from . import build

    torch.ops.load_library(str(build.library()))
    from dense_attn._backends import cuda

    if cuda.LOAD_ERROR is not None:
        raise RuntimeError(cuda.LOAD_ERROR)
    return Runtime()

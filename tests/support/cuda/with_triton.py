"""A pytest plugin, `-p cuda.with_triton`: both backends of GPUs on CPU tensors, emulated, so that
Triton makes the gradients of CUDA's attention.
"""

import pytest
import torch

from cuda import build

torch.ops.load_library(str(build.library()))  # before Triton's plugin loads all backends
pytest_plugins = ["ptx.plugin", "cuda.plugin"]


@pytest.fixture(autouse=True)
def gradients_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """No head dim is left to the CUDA library's own gradient."""
    from dense_attn._backends import cuda

    monkeypatch.setattr(cuda, "GRADIENT_HEAD_DIM", 0)

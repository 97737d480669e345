"""A pytest plugin, `-p cuda.with_triton`: both backends of GPUs on CPU tensors, emulated, so that
Triton makes the gradients of CUDA's attention.
"""

import torch

from cuda import build

torch.ops.load_library(str(build.library()))  # before Triton's plugin loads all backends
pytest_plugins = ["ptx.plugin", "cuda.plugin"]

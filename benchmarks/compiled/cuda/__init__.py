"""The CUDA library's kernels as nvcc compiles them, counted, and a build that needs no GPU."""

"""The CUDA backend on tensors of the CPU: README.md says how."""

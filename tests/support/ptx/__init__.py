"""An emulator of the PTX that kernels compile to: README.md says how it judges."""

from .launch import emulated
from .module import Fault, Module, TensorMap, Unsupported

__all__ = ["Fault", "Module", "TensorMap", "Unsupported", "emulated"]

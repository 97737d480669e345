"""An emulator of the PTX that kernels compile to: README.md says how it judges."""

from .module import Fault, Module, TensorMap, Unsupported

__all__ = ["Fault", "Module", "TensorMap", "Unsupported", "emulated"]


def __getattr__(name: str) -> object:
    """The emulation of Triton's launches, which imports Triton."""
    if name != "emulated":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .launch import emulated

    return emulated

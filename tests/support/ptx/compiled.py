"""The Triton backend on tensors of the CPU with kernels that Triton compiles."""

from __future__ import annotations

import os
from collections.abc import Callable
from unittest import mock


def compiled_backend() -> None:
    """Load the backend as if Triton interpreted, so that it takes tensors of the CPU, and let
    Triton compile all the same. To be called before anything imports dense_attn.
    """
    import triton  # before the variable: functions of its own are compiled, too

    os.environ["TRITON_INTERPRET"] = "1"
    compile_function = triton.jit

    def jit(fn: Callable | None = None, **options: object) -> Callable:
        if fn is None:
            return lambda later: jit(later, **options)
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = False
            return compile_function(fn, **options)

    with mock.patch.object(triton, "jit", jit):
        from dense_attn._backends import triton as backend
    if backend.LOAD_ERROR is not None:
        raise RuntimeError(backend.LOAD_ERROR)
    triton.knobs.runtime.interpret = False

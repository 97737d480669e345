"""`python tests/support/ptx [TARGET]`: `verify` of the Triton kernels as compiled for a target."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from ptx.compiled import compiled_backend
except OSError as error:  # the package compiles its machine
    print(f"dense_attn verify: {error}", file=sys.stderr)
    sys.exit(2)


def main(target: str = "sm_90") -> int:
    """The exit code of `verify`."""
    compiled_backend()
    from dense_attn import _command

    return _command.run("dense_attn verify", lambda: _verify(target))


def _verify(target: str) -> int:
    from dense_attn.verify import run
    from ptx import emulated

    print(f"Triton kernels as compiled for {target}, emulated")
    with emulated(target):
        return run.main(("triton",))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

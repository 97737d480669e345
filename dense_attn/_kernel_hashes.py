"""Short names of the kernels' sources, to which the results of a run belong."""

from __future__ import annotations

from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

_DIGITS = 16


def kernel_hashes() -> dict[str, str]:
    """The first digits of each kernel file's sha256, by its path; Triton need not be there."""
    folder = Path(find_spec("dense_attn.triton_kernels").origin).parent
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()[:_DIGITS]
        for path in sorted(folder.rglob("*.py"))
    }

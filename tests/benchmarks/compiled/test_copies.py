"""Copies to shared memory in the backward kernels: ahead of their use, and of how many bytes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import forked
import pytest

pytest.importorskip("triton")

import triton

from dense_attn.benchmarks.compiled import ahead_of_time, counts, kernel_calls, model
from dense_attn.triton_kernels.layout_attention.records import NUMBERS

OLDEST = Path(__file__).resolve().parents[3] / ".venv" / "triton-3.6.0"
IS_OLDEST = triton.__version__.startswith("3.6.")
ROWS = 16  # bytes of a copy
CALLS = [("sm_80", 64, False), ("sm_90", 128, False)]
IN_FULL = [("sm_80", 128, False), ("sm_90", 64, False), ("sm_90", 64, True)]
IN_FULL += [("sm_100", head_dim, False) for head_dim in (64, 128)]


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled, not found."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def expected(launch: ahead_of_time.Launch, head_dim: int, tf32: bool) -> Counter[int]:
    """Copies of a thread for the next tile, by their bytes: rows of two tensors, and what stands
    beside them; of numbers that tf32 needs in two orders as many as of others.
    """
    rows, keys, threads = *(launch.constants[x] for x in ("BLOCK_M", "BLOCK_N")), 32 * launch.warps
    by_key = "bwd_kv" in launch.kernel
    numbers = 2 * (rows if by_key else keys) * head_dim // threads
    found = Counter({ROWS: numbers * (4 if tf32 else 2) // ROWS})
    if by_key:
        found[4 * NUMBERS * rows // threads] += 1  # numbers of rows, a thread's at once
    elif not IS_OLDEST:
        found[4] += 1  # the word of a key
    return +found


@pytest.mark.parametrize(
    ("target", "head_dim", "tf32"),
    [*CALLS, *(pytest.param(*call, marks=pytest.mark.full) for call in IN_FULL)],
)
def test_copies_run_ahead(target: str, head_dim: int, tf32: bool) -> None:
    """None is waited for at once, and none of rows is of less than 16 bytes."""
    dtype = "float32" if tf32 else "bfloat16"
    with ahead_of_time.compiled(target) as launches:
        kernel_calls.Attention(target, "bwd", head_dim, dtype=dtype, tf32=tf32)()
    assert len(launches) == 2
    for launch in launches:
        loops = model.function_of(launch).inner_loops
        copies = [[x.opcode.split(".") for x in loop if x.name == "LDGSTS"] for loop in loops]
        waits = [wait for loop in loops for wait in counts.waits(loop)[0]]
        (copying,) = filter(None, copies)
        assert waits
        assert min(waits) > 0
        bits = (next((int(x) for x in ("64", "128") if x in opcode), 32) for opcode in copying)
        found = Counter(x // 8 for x in bits)
        if IS_OLDEST and "bwd_q" in launch.kernel:  # words of keys two by two, some of them again
            assert found.pop(8) <= 8
        assert found == expected(launch, head_dim, tf32), launch.kernel


@pytest.mark.full  # for which it is installed
@pytest.mark.skipif(not OLDEST.exists(), reason="the oldest Triton is not installed")
def test_copies_by_the_oldest_triton() -> None:
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "run_ahead")
    done = forked.run(forked.PYTEST, *options, __file__, PYTHONPATH=str(OLDEST))
    assert f"{len(CALLS) + len(IN_FULL)} passed" in done.stdout, done.stdout[-4000:]

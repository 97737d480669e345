"""Calls that are beyond a GPU's grids, which are refused before anything is done, or beyond its
shared memory, which another kernel takes: with the emulated library, in processes of their own.
"""

from __future__ import annotations

import pytest
from cuda.processes import COMPILED, run

pytestmark = COMPILED
# No tensor has memory of its size. A launch would be refused, as no launcher is set.
REFUSED = """
import ctypes
import torch
from cuda.compiled import compiled_backend

compiled_backend()
ops = torch.ops.dense_attn_cuda


def large(*shape, dtype=torch.float32):
    return torch.zeros((), dtype=dtype, device="cpu").expand(shape)


def dense(numel, dtype=torch.float16, memory=torch.zeros(8)):
    bytes_ = (ctypes.c_uint8 * (numel * dtype.itemsize)).from_address(memory.data_ptr())
    return torch.frombuffer(bytes_, dtype=dtype)


def heads(batch, num_heads, seqlen):
    one = torch.zeros(1, 1, 1, 8, dtype=torch.float16, device="cpu")
    return one.expand(batch, num_heads, seqlen, 8)


def attention(batch, num_heads, seqlen_q, seqlen_k, op=ops.layout_attention_fwd, *more):
    q, k = heads(batch, num_heads, seqlen_q), heads(batch, num_heads, seqlen_k)
    words = [large(seqlen, dtype=torch.int32) for seqlen in (seqlen_q, seqlen_k)]
    how = "range", 1.0, None, None
    if op is ops.attention_gradient:
        return op(q, None, q, k, k, *words, None, q, q, *how)
    return op(q, k, k, *words, None, *how, None, None, None, 1.0, False, False)


def guidance(concepts, *shape):
    eps, edits = large(*shape), large(concepts, *shape)
    names = "edit_guidance_scale", "edit_threshold", "weights", "partials"
    lists = dict.fromkeys(names, [0.5] * concepts) | {"reverse": [False] * concepts}
    numbers = {"guidance_scale": 1.0, "edit_momentum_scale": 0.0, "edit_mom_beta": 0.0}
    options = {"all_warm": True, "user_mask": None, "sum_channels": False}
    return ops.sega_guidance(eps, eps, edits, eps, **numbers, **lists, **options)


x, z = dense((2**31 - 1) * 1024 + 1), dense((2**31 - 1) * 1024 + 1, torch.int64)
for call in (
    lambda: attention(2, 4, 2**27 + 1, 1),
    lambda: attention(1, 2, 0, 2**29 + 1),
    lambda: attention(1, 2, 0, 2**29),
    lambda: attention(2, 4, 2**27 + 1, 1, ops.attention_gradient),
    lambda: ops.percentile_mask(large(2**31, 1), 0.5),
    lambda: ops.percentile_mask(large(85_899_346, 16_500), 0.5),
    lambda: guidance(2, 2**16, 2**16, 1),
    lambda: guidance(2, 2**13, 2**13, 16_500),
    lambda: ops.ddim_step(x, x, None, 1.0, 1.0, 1.0),
    lambda: ops.leapfrog_step(x, x, x, 1.0, 1.0, 1.0),
    lambda: ops.edict_mix(x, x, None, 1.0, 1.0, 0.9, True),
    lambda: ops.exact_couple(z, x, 1.0, 1.0, torch.float16),
    lambda: ops.exact_leapfrog(z, z, x, 1.0, 1.0, 1.0, torch.float16),
    lambda: ops.exact_unmix(z, z, x, 1.0, 0.9, True, 1.0, True, torch.float16),
):
    try:
        print(tuple(call()[0].shape))
    except RuntimeError as error:
        print(str(error).splitlines()[0])
"""
ROWS, ELEMENTS = "at most 1073741824 rows in all heads", "at most 2199023254528 elements"
SENTENCES = [
    f"q must have {ROWS}, got 1073741832",
    f"k must have {ROWS}, got 1073741826",
    "(1, 2, 0, 8)",
    f"q must have {ROWS}, got 1073741832",
    "x must have at most 2147483647 rows of 1 values, got 2147483648",
    "x must have at most 85899345 rows of 16500 values, got 85899346",
    "eps_uncond must have at most 2147483647 channels of 1 values, got 4294967296",
    "eps_uncond must have at most 42949672 channels of 16500 values, got 67108864",
    *(f"{name} must have {ELEMENTS}, got 2199023254529" for name in ("x", "far", "x")),
    *(f"{name} must have {ELEMENTS}, got 2199023254529" for name in ("z", "far", "x")),
]
# A GPU of 99 KB a block, as sm_86, sm_89 and sm_120, and one of 227.
SMALL = """
import torch
from cuda.compiled import compiled_backend
from cuda.launch import emulated

runtime = compiled_backend()
from dense_attn import reference
from dense_attn._backends import cuda

torch.manual_seed(0)
q, k = (torch.randn(1, 1, n, 160, device="cpu").bfloat16() for n in (40, 100))
words = torch.tensor([1, 2, 3, 4], dtype=torch.int32, device="cpu")
words = words.repeat(10), words.repeat(25)
for seqlen, kilobytes in ((100, 227), (100, 99), (80, 99)):
    runtime.set_device_shared(kilobytes << 10)
    k, words = k[:, :, :seqlen], (words[0], words[1][:seqlen])
    exact = reference.layout_attention(*(x.double() for x in (q, k, k)), *words, 0.7)[0]
    how = None, "range", 160**-0.5, None, None, None, None, None, 0.7, False, False
    with emulated(runtime) as runs:
        out = torch.ops.dense_attn_cuda.layout_attention_fwd(q, k, k, *words, *how)[0]
    kernels = ["row" if "row_fwd" in run.kernel else "any" for run in runs]
    print(seqlen, kilobytes, *kernels, ((out - exact).abs().max() < 0.02).item())
"""


def test_what_no_launch_reaches_is_refused() -> None:
    assert run(REFUSED).splitlines() == SENTENCES


@pytest.mark.full
def test_keys_that_do_not_fit_are_taken_by_the_other_kernel() -> None:
    expected = ["100 227 row True", "100 99 any True", "80 99 row True"]
    assert run(SMALL, "160").splitlines() == expected

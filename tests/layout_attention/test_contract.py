"""Refusals: every bad input gets its own clear error before anything is touched; raw calls refuse
too, never crash.
"""

from __future__ import annotations

import re

import pytest
import torch
from cases import backends, why_skip
from torch import Tensor

from dense_attn import backends as table
from dense_attn import layout_attention
from dense_attn._backends import plans

GRAMMAR = re.compile(r"[a-z_]+ must .+, got .+", re.DOTALL)
B, H, M, N, D = 2, 3, 5, 7, 8


def arguments() -> dict[str, object]:
    """A call that is right in every respect."""
    return {
        "q": torch.randn(B, H, M, D),
        "k": torch.randn(B, H, N, D),
        "v": torch.randn(B, H, N, D),
        "q_regions": torch.randint(0, 4, (M,), dtype=torch.int32),
        "k_regions": torch.randint(0, 4, (B, N), dtype=torch.int32),
        "strength": torch.rand(B, 1, M),
    }


def words(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int32)


BAD_CALLS = [  # argument, value, error, message
    ("q", [1.0], TypeError, "q must be a tensor, got list"),
    (
        "q",
        torch.randn(B, H, M, D).to_sparse(),
        TypeError,
        "q must be a strided tensor, got torch.sparse_coo",
    ),
    (
        "q",
        torch.ones(B, H, M, D, dtype=torch.int64),
        TypeError,
        "q must be one of float32, bfloat16, float16, float64",
    ),
    ("q", torch.randn(B, H, M, D).to(torch.complex64), TypeError, "got complex64"),
    (
        "q",
        torch.randn(H, M, D),
        ValueError,
        "q must have 4 dimensions [batch, heads, tokens, head_dim], got (3, 5, 8)",
    ),
    (
        "q",
        torch.randn(B, H, M, 0),
        ValueError,
        "q must have a head dim of at least 1, got (2, 3, 5, 0)",
    ),
    (
        "q",
        torch.randn(B, H, M, D + 1),
        ValueError,
        "k must have shape [2, 3, 7, 9] to go with q and k",
    ),
    (
        "q",
        torch.randn(B, H, D, M).mT,
        ValueError,
        "q must have a contiguous last dimension, got strides (120, 40, 1, 5)",
    ),
    ("v", torch.randn(B, H, D, N).mT, ValueError, "v must have a contiguous last dimension"),
    ("k", None, TypeError, "k must be a tensor, got NoneType"),
    (
        "k",
        torch.randn(B, H, N, D).double(),
        TypeError,
        "k must have q's dtype float32, got float64",
    ),
    (
        "k",
        torch.randn(B, H, N, D, device="meta"),
        ValueError,
        "k must be on q's device cpu, got meta",
    ),
    (
        "k",
        torch.randn(B, H + 1, N, D),
        ValueError,
        "k must have 3 heads as q has, or a number that divides them, got (2, 4, 7, 8)",
    ),
    ("k", torch.randn(B, 2, N, D), ValueError, "or a number that divides them, got (2, 2, 7, 8)"),
    ("k", torch.randn(B, 0, N, D), ValueError, "or a number that divides them, got (2, 0, 7, 8)"),
    (
        "v",
        torch.randn(B, 1, N, D),
        ValueError,
        "v must have shape [2, 3, 7, 8] to go with q and k, got (2, 1, 7, 8)",
    ),
    (
        "k",
        torch.randn(1, H, N, D),
        ValueError,
        "k must have shape [2, 3, 7, 8] to go with q and k, got (1, 3, 7, 8)",
    ),
    (
        "v",
        torch.randn(B, H, N + 1, D),
        ValueError,
        "v must have shape [2, 3, 7, 8] to go with q and k, got (2, 3, 8, 8)",
    ),
    ("v", torch.randn(B, H, N, D).half(), TypeError, "v must have q's dtype float32, got float16"),
    ("q_regions", [1] * M, TypeError, "q_regions must be a tensor, got list"),
    ("q_regions", words(M).long(), TypeError, "q_regions must be int32, got int64"),
    ("q_regions", words(M).bool(), TypeError, "q_regions must be int32, got bool"),
    (
        "q_regions",
        words(M + 1),
        ValueError,
        "q_regions must have shape [5], [1, 5] or [2, 5], got (6,)",
    ),
    ("q_regions", words(B, H, M), ValueError, "got (2, 3, 5)"),
    ("q_regions", words(), ValueError, "got ()"),
    (
        "k_regions",
        words(M),
        ValueError,
        "k_regions must have shape [7], [1, 7] or [2, 7], got (5,)",
    ),
    ("k_regions", words(3, N), ValueError, "got (3, 7)"),
    ("k_regions", words(N).to("meta"), ValueError, "k_regions must be on q's device cpu, got meta"),
    ("strength", "1", TypeError, "strength must be a number or a tensor, got str"),
    ("strength", None, TypeError, "strength must be a number or a tensor, got NoneType"),
    ("strength", float("nan"), ValueError, "strength must be finite in float32, got nan"),
    ("strength", True, TypeError, "strength must be a number or a tensor, got bool"),
    ("strength", torch.rand(M).double(), TypeError, "strength must be float32"),
    ("strength", torch.rand(M).bfloat16(), TypeError, "got bfloat16"),
    (
        "strength",
        torch.rand(M + 1),
        ValueError,
        "strength must broadcast to [B, H, M] = (2, 3, 5), got (6,)",
    ),
    ("strength", torch.rand(1, B, H, M), ValueError, "got (1, 2, 3, 5)"),
    (
        "strength",
        torch.rand(M, device="meta"),
        ValueError,
        "strength must be on q's device cpu, got meta",
    ),
    (
        "modulation",
        "rainbow",
        ValueError,
        "modulation must be one of range, max, bias, mask, got 'rainbow'",
    ),
    ("modulation", None, ValueError, "got None"),
    ("modulation", ["range"], ValueError, "got ['range']"),
    ("scale", "1", TypeError, "scale must be a number or None, got str"),
    ("scale", True, TypeError, "scale must be a number or None, got bool"),
    ("scale", torch.tensor(1.0), TypeError, "scale must be a number or None, got Tensor"),
    ("scale", float("nan"), ValueError, "scale must be finite, got nan"),
    ("strength", 1e39, ValueError, "strength must be finite in float32, got 1e+39"),
    ("scale", 10**400, ValueError, "scale must be finite, got 1000"),
    ("scale", float("inf"), ValueError, "scale must be finite, got inf"),
    ("q_order", torch.arange(M), TypeError, "q_order must be int32, got int64"),
    (
        "q_order",
        words(M + 1),
        ValueError,
        "q_order must have shape [5], [1, 5] or [2, 5], got (6,)",
    ),
    (
        "k_order",
        words(B, M),
        ValueError,
        "k_order must have shape [7], [1, 7] or [2, 7], got (2, 5)",
    ),
    ("k_order", torch.randn(N), TypeError, "k_order must be int32, got float32"),
    ("q_order", True, TypeError, "q_order must be a tensor, False or None, got bool"),
    ("k_order", [0], TypeError, "k_order must be a tensor, False or None, got list"),
    ("k_mask", [True] * N, TypeError, "k_mask must be a tensor, got list"),
    (
        "k_mask",
        torch.ones(N, dtype=torch.int64),
        TypeError,
        "k_mask must be bool, int32 or one of float32, bfloat16, float16, float64, got int64",
    ),
    (
        "k_mask",
        torch.ones(N, dtype=torch.bool, device="meta"),
        ValueError,
        "k_mask must be on q's device cpu, got meta",
    ),
    (
        "k_mask",
        torch.ones(N + 1, dtype=torch.bool),
        ValueError,
        "k_mask must have shape [7], [1 or 2, 7] or that with 1, 1 between, got (8,)",
    ),
    ("k_mask", torch.ones(3, N), ValueError, "got (3, 7)"),
    ("k_mask", torch.zeros(B, 1, M, N), ValueError, "got (2, 1, 5, 7)"),
    ("k_mask", torch.zeros(B, H, 1, N), ValueError, "got (2, 3, 1, 7)"),
    ("k_mask", torch.zeros(()), ValueError, "got ()"),
    ("k_mask", words(N), ValueError, "k_mask must have shape [2] where it counts the keys, got (7"),
    ("k_mask", words(B) * (N + 1), ValueError, "k_mask must count 0 to 7 keys, got 8"),
    ("k_mask", words(B) * -1, ValueError, "k_mask must count 0 to 7 keys, got -1"),
    ("return_lse", "yes", TypeError, "return_lse must be a bool, got str"),
    (
        "backend",
        "opencl",
        ValueError,
        "backend must be one of auto, cuda, triton, cpu, reference, got 'opencl'",
    ),
    ("backend", None, ValueError, "got None"),
]


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    BAD_CALLS,
    ids=[f"{call[0]}-{i}" for i, call in enumerate(BAD_CALLS)],
)
@pytest.mark.parametrize("backend", backends("reference", "cpu"))
@pytest.mark.parametrize("known", [False, True])
def test_a_bad_argument_is_named(
    known: bool, backend: str, argument: str, value: object, error: type[Exception], message: str
) -> None:
    """Also where a call that differs in that argument alone has been let through."""
    good = {**arguments(), "backend": backend}
    plans.forget()
    if known:
        layout_attention(**good)
    before = {name: x.clone() for name, x in good.items() if isinstance(x, Tensor)}
    with pytest.raises(error) as refusal:
        layout_attention(**{**good, argument: value})
    assert type(refusal.value) is error
    assert GRAMMAR.fullmatch(str(refusal.value))
    assert message in str(refusal.value)
    assert all(torch.equal(x, before[name]) for name, x in good.items() if name in before)


def test_what_is_added_must_be_scaled() -> None:
    added = torch.ones(N)
    with pytest.raises(ValueError, match="scale must not be 0 with a k_mask that is added, got 0"):
        layout_attention(**arguments(), scale=0.0, k_mask=added)


def test_the_good_call_is_good() -> None:
    out, lse = layout_attention(**arguments(), return_lse=True)
    assert out.shape == (B, H, M, D)
    assert lse.shape == (B, H, M)


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_a_named_backend_runs_or_raises_with_every_reason(backend: str) -> None:
    reason = table()[backend]["layout_attention"]
    if reason == "available":
        assert layout_attention(**arguments(), backend=backend).shape == (B, H, M, D)
        return
    with pytest.raises(RuntimeError, match=re.escape(reason)) as refusal:
        layout_attention(**arguments(), backend=backend)
    assert GRAMMAR.fullmatch(str(refusal.value))


needs_cpu_kernels = pytest.mark.skipif(why_skip("cpu") is not None, reason=str(why_skip("cpu")))


@needs_cpu_kernels
def test_a_wide_head_is_refused_by_the_kernel_alone() -> None:
    q = torch.randn(1, 1, 2, 257)
    with pytest.raises(RuntimeError, match="head_dim is at most 256, got 257"):
        layout_attention(q, q, q, words(2), words(2), backend="cpu")
    assert layout_attention(q, q, q, words(2), words(2)).shape == q.shape


@pytest.mark.parametrize("backend", backends("reference", "cpu"))
@pytest.mark.parametrize("argument", ["q_order", "k_order"])
def test_an_order_that_is_no_permutation_never_harms(backend: str, argument: str) -> None:
    good = {**arguments(), "backend": backend}
    expected = layout_attention(**good)
    tokens = M if argument == "q_order" else N
    for order in (
        words(tokens) * 0,
        words(tokens) * tokens,
        words(tokens) * -1,
        words(tokens) * 2**30,
    ):
        refusals = []
        try:
            torch.testing.assert_close(layout_attention(**good, **{argument: order}), expected)
        except (ValueError, RuntimeError) as refusal:
            refusals.append(str(refusal))
        assert all(
            f"{argument} must be a permutation of the tokens, got " in text for text in refusals
        )

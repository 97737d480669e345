"""The CPU kernels' own ways to multiply: tails of tiles, keys in chunks, and what lies beside."""

from __future__ import annotations

import itertools
import json
from functools import partial

import forked
import pytest
import torch
from accuracy import assert_accurate, evaluate, exact_and_plain
from cases import Case, make_inputs, why_skip
from torch import Tensor

from dense_attn import layout_attention

pytestmark = [
    pytest.mark.skipif(why_skip("cpu") is not None, reason=str(why_skip("cpu"))),
    pytest.mark.usefixtures("poisoned_memory"),
]
# Packed keys and values of a head, and how a kernel takes them: at once, in chunks that strips of
# rows meet in turn, in chunks that every item packs for itself.
CHUNKS = ((1, 1, 100, 900, 256), (2, 1, 100, 2900, 128), (1, 1, 100, 4500, 256))
# Of two instruction sets the products are rounded apart: errors of one shape are within this much.
LIKE = 1.1
ERRORS = """import json, sys, torch, dense_attn
from dense_attn import reference
torch.manual_seed(0)
errors = {}
for dim in (40, 64, 96, 128):
    q, k, v = torch.randn(3, 1, 4, 500, dim, dtype=torch.float64).bfloat16().unbind(0)
    words = torch.randint(0, 4, (2, 500), dtype=torch.int32)
    out = dense_attn.layout_attention(q, k, v, *words, 0.5, backend="cpu")
    strength = torch.full((1, 4, 500), 0.5, dtype=torch.float64)
    exact, _ = reference.layout_attention(*(x.double() for x in (q, k, v)), *words, strength)
    off = (out.double() - exact).abs()
    errors[dim] = off.max().item(), off.mean().item()
print(json.dumps(errors))"""


def attend(inputs: object, modulation: str) -> tuple[Tensor, Tensor]:
    words = inputs.q_regions, inputs.k_regions, inputs.strength
    options = {"modulation": modulation, "return_lse": True, "backend": "cpu"}
    return layout_attention(inputs.q, inputs.k, inputs.v, *words, **options)


@pytest.mark.parametrize("modulation", ["range", "mask"])
@pytest.mark.parametrize("head_dim", [2, 15, 31, 33, 72, 88, 112, 255])
def test_tails_of_tiles(head_dim: int, modulation: str) -> None:
    check(Case("tails", (1, 1, 52, 77, head_dim), through="out"), torch.bfloat16, modulation)


@pytest.mark.parametrize("size", CHUNKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_keys_in_chunks(size: tuple[int, ...], dtype: torch.dtype) -> None:
    check(Case("chunks", size, words="runs", through="none"), dtype, "range")


def check(case: Case, dtype: torch.dtype, modulation: str) -> None:
    inputs = make_inputs(case, dtype)
    exact, plain = exact_and_plain(inputs, case.through, modulation=modulation)
    attention = partial(layout_attention, modulation=modulation, backend="cpu", return_lse=True)
    results = evaluate(attention, inputs, case.through)
    for name, result in results.items():
        assert_accurate(name, result, exact[name], plain[name], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("modulation", ["range", "mask"])
def test_what_lies_beside_a_tensor_is_not_met(modulation: str, dtype: torch.dtype) -> None:
    """Tails of rows, of keys and of channels lie among NaN, and give the bits of their copies."""
    for rows, keys, head_dim in itertools.product((1, 20, 50), (1, 17, 70), (3, 24, 40)):
        inputs = make_inputs(Case("beside", (1, 2, rows, keys, head_dim)), dtype)
        expected = attend(inputs, modulation)
        for name in ("q", "k", "v"):
            tensor = getattr(inputs, name)
            wide = tensor.new_full((1, 2, tensor.shape[2] + 40, head_dim + 40), torch.nan)
            inside = wide[:, :, 1 : 1 + tensor.shape[2], 5 : 5 + head_dim]
            setattr(inputs, name, inside.copy_(tensor))
        for result, copy_s in zip(attend(inputs, modulation), expected):
            assert torch.equal(result, copy_s)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    inputs = make_inputs(Case("threads", (2, 3, 300, 400, 40), words="runs"), dtype)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(attend(inputs, "range"))
    finally:
        torch.set_num_threads(threads)
    for results in found[1:]:
        assert all(torch.equal(result, first) for result, first in zip(results, found[0]))


@pytest.mark.full
def test_tiles_are_as_accurate_as_dot_products() -> None:
    """Largest and mean errors of bfloat16 results, in float64, by AMX and by AVX-512."""
    if torch.ops.dense_attn.cpu_isa() != "amx_bf16":
        pytest.skip("no AMX on this machine, or another instruction set is asked for")
    tiles, dots = (
        json.loads(forked.run(ERRORS, DENSE_ATTN_ISA=isa).stdout)
        for isa in ("amx_bf16", "avx512_bf16")
    )
    for dim, errors in tiles.items():
        assert all(error < LIKE * other for error, other in zip(errors, dots[dim])), dim

"""Layout attention's backward kernels in CUDA C++: gradients in every order of warps, and what
orders their memory taken out.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from accuracy import assert_accurate, exact_and_plain
from cases import Case, Inputs, make_inputs
from torch import Tensor

from dense_attn import reference

pytest.importorskip("triton")

from ptx import Fault, Module
from ptx.module import ORDERS

ROOT = Path(__file__).resolve().parents[2]
HEAD_DIM, BFLOAT16, RANGE = 40, 3, 0
THREADS, SHARED, BLOCK = 128, 96 << 10, 128  # rows of a block
RECORD = 10  # numbers of a row that one kernel leaves for another
LOG2_E = 1.4426950408889634
# Tiles of one kind and of both, one that the keys end in, and the last rows in the second stage.
CASE = Case("backward", (1, 2, 200, 180, HEAD_DIM), "runs", "full", ordered=True)
TIES = Case("ties", (1, 1, 70, 150, HEAD_DIM), values="ties", scale=0.5)
MATCHED = Case("matched", (1, 1, 70, 150, HEAD_DIM), "all", values="ties", scale=0.5)
# What orders memory, one line of PTX each.
ORDERING = r"\n[^\n]*(bar(\.warp)?\.sync|cp\.async\.(wait|commit)_group)[^\n]*;"
SOURCE = """
#include "cuda/layout_attention/bwd_kv.cuh"
namespace DENSE_ATTN_CLASS {
#define KERNEL(name) template __global__ void layout_attention_bwd_##name##_kernel<__nv_bfloat16, \
    Modulation::kRange>(const __grid_constant__ LayoutAttentionBwdParams);
KERNEL(rows) KERNEL(q) KERNEL(kv)
}
"""


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The kernels of one dtype and modulation, as nvcc compiles them."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    source = tmp_path_factory.mktemp("backward") / "kernels.cu"
    source.write_text(SOURCE)
    flags = ["-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", f"-DDENSE_ATTN_HEAD_DIM={HEAD_DIM}"]
    text = source.with_suffix(".ptx")
    subprocess.run(["nvcc", "-ptx", "-arch=sm_80", *flags, source, "-o", text], check=True)
    return text.read_text()


def _view(x: Tensor | None, dims: int) -> bytes:
    """A TensorView."""
    if x is None:
        return bytes(8 + 16 * dims)
    return struct.pack(f"<{1 + 2 * dims}q", x.data_ptr(), *x.shape, *x.stride())


def _saved(inputs: Inputs, scale: float) -> tuple[Tensor, Tensor]:
    """(out, records of rows) as the forward pass leaves them."""
    words, c = (inputs.q_regions, inputs.k_regions), inputs.strength.double()
    q, k, v = (x.double() for x in (inputs.q, inputs.k, inputs.v))
    out, lse = reference.layout_attention(q, k, v, *words, c, scale=scale)
    raw = q @ k.mT
    high, low = raw.amax(-1), raw.amin(-1)
    factor, c = (1 - c) * scale, c.expand_as(high)
    anchored = torch.where(factor < 0, low, high) * factor
    offsets = [(anchored + c * scale * extreme - lse) * LOG2_E for extreme in (high, low)]
    return out.to(inputs.q.dtype), torch.stack([high, low, *offsets], -1).float()


def _launch(module: Module, inputs: Inputs, scale: float, order: str) -> dict[str, Tensor]:
    """Gradients by the three kernels, one after the other."""
    q, k, v = inputs.q, inputs.k, inputs.v
    batch, num_heads, seqlen_q, head_dim = q.shape
    rows, seqlen_k = q.shape[:3], k.shape[2]
    words = inputs.q_regions.expand(batch, -1), inputs.k_regions.expand(batch, -1)
    q_order = inputs.orders["q_order"].expand(batch, -1) if inputs.orders else None
    strength = inputs.strength.expand(rows)
    out, stats = _saved(inputs, scale)
    grads = {f"d{name}": torch.empty_like(x) for name, x in zip("qkv", (q, k, v))}
    grads["dstrength"] = torch.empty(rows, dtype=torch.float32)
    scratch = torch.empty(rows.numel() * RECORD, dtype=torch.float32)
    views = [(q, 4), (k, 4), (v, 4), *((x, 2) for x in words), (q_order, 2), (None, 2), (None, 1)]
    saved = [(out, 4), (None, 3), (stats, 4), (inputs.grad_out, 4), (inputs.grad_lse, 3)]
    results = [(x, x.dim()) for x in grads.values()]
    params = [
        struct.pack("<iid6q", BFLOAT16, RANGE, scale, *rows, seqlen_k, head_dim, 1),
        *(_view(*x) for x in (*views, (strength, 3))),
        struct.pack("<d", 0.0),
        *(_view(*x) for x in (*saved, *results)),
        struct.pack("<qQ", 1, scratch.data_ptr()),
    ]
    memory = [x for x, _ in (*views, (strength, 3), *saved, *results) if x is not None]
    sizes = {"rows": (seqlen_q, THREADS // 8), "q": (seqlen_q, BLOCK), "kv": (seqlen_k, BLOCK)}
    for name, (seqlen, block) in sizes.items():
        (kernel,) = re.findall(rf"\.entry (\S*_bwd_{name}_kernel\w*)\(", "\n".join(module._lines))
        grid = (batch * num_heads * -(-seqlen // block),)
        given = (kernel, [b"".join(params)], grid, (THREADS,), SHARED, order)
        module.launch(*given, memory=[*memory, scratch])
    return grads


def _launch_in_every_order(ptx: str, inputs: Inputs, scale: float) -> list[dict[str, Tensor]]:
    return [_launch(Module(ptx), inputs, scale, order) for order in ORDERS]


@pytest.mark.parametrize("case", [CASE, TIES, MATCHED], ids=lambda case: case.name)
def test_gradients(ptx: str, case: Case) -> None:
    inputs = make_inputs(case, torch.bfloat16)
    scale = HEAD_DIM**-0.5 if case.scale is None else case.scale
    results = _launch_in_every_order(ptx, inputs, scale)
    exact, plain = exact_and_plain(inputs, modulation="range", scale=scale)
    for name, result in results[0].items():
        for other in results[1:]:
            assert torch.equal(result, other[name]), f"{name} depends on the order of warps"
        result = result.sum_to_size(exact[name].shape)
        assert_accurate(name, result, exact[name], plain[name], torch.bfloat16)


def test_gradients_of_other_words_are_rejected(ptx: str) -> None:
    inputs = make_inputs(TIES, torch.bfloat16)
    exact, plain = exact_and_plain(inputs, modulation="range", scale=TIES.scale)
    inputs.k_regions = inputs.k_regions.roll(1)
    for name, result in _launch(Module(ptx), inputs, TIES.scale, "forward").items():
        result = result.sum_to_size(exact[name].shape)
        with pytest.raises(AssertionError, match=f"{name} is off"):
            assert_accurate(name, result, exact[name], plain[name], torch.bfloat16)


@pytest.mark.full
def test_what_orders_memory_is_needed(ptx: str) -> None:
    inputs = make_inputs(CASE, torch.bfloat16)
    lines = list(re.finditer(ORDERING, ptx))
    assert len(lines) > 20
    for line in lines:
        mutant = ptx[: line.start()] + ptx[line.end() :]
        with pytest.raises(Fault):
            _launch_in_every_order(mutant, inputs, HEAD_DIM**-0.5)

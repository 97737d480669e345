"""Extra memory does not grow with M*N: the peak resident size of a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cases import backends

from dense_attn import layout_attention
from dense_attn._memory import peak_extra_bytes

PROGRAM = """
import re, sys, torch
from pathlib import Path
from dense_attn import layout_attention
backend, modulation, gradients = sys.argv[1], *sys.argv[5:]
seqlen_q, seqlen_k, head_dim = map(int, sys.argv[2:5])
torch.set_num_threads(2)
q, k, v = (torch.randn(1, 1, n, head_dim) for n in (seqlen_q, seqlen_k, seqlen_k))
words = [torch.arange(n, dtype=torch.int32) * 5 // n + 1 for n in (seqlen_q, seqlen_k)]
grad = torch.randn_like(q)
def megabytes(field):
    status = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\\s+(\\d+) kB", status)[1]) / 1024
def call(q, k, v, words, grad):
    q, k, v = (x.detach().requires_grad_(gradients == "yes") for x in (q, k, v))
    out = layout_attention(q, k, v, *words, 0.5, modulation=modulation, backend=backend)
    if gradients == "yes":
        out.backward(grad)
few = [x[:, :, :9] for x in (q, k, v)]
call(*few, [x[:9] for x in words], grad[:, :, :9])  # loads what it loads
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = megabytes("VmRSS")
call(q, k, v, words, grad)
print(megabytes("VmHWM") - before)
"""
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")


def extra_megabytes(*arguments: object) -> float:
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(run.stdout)


@pytest.mark.costly
@needs_proc
@pytest.mark.parametrize("backend", backends("cpu"))
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "modulation", "gradients"),
    [
        (2048, 65_536, "range", "no"),
        (2048, 65_536, "mask", "no"),
        (2048, 65_536, "range", "yes"),
        (8192, 8192, "range", "no"),
        (8192, 8192, "range", "yes"),
    ],
)
def test_memory_does_not_hold_the_scores(
    backend: str, seqlen_q: int, seqlen_k: int, modulation: str, gradients: str
) -> None:
    head_dim = 8
    scores = seqlen_q * seqlen_k * 4 / 2**20  # 512 or 256 MB
    tensors = (
        (seqlen_q + 3 * seqlen_k) * head_dim * 4 / 2**20
    )  # out, and keys and values in the kernel's own order
    allowed = 16 + tensors * (3 if gradients == "yes" else 1)
    assert allowed < scores / 8
    assert extra_megabytes(backend, seqlen_q, seqlen_k, head_dim, modulation, gradients) <= allowed


@needs_proc
@pytest.mark.parametrize("backend", backends("cpu"))
def test_views_are_taken_as_they_are(backend: str) -> None:
    """[B, M, H, K], as projections make and xformers takes it, seen as [B, H, M, K]."""
    q, k, v = (torch.randn(1, seqlen, 4, 32).transpose(1, 2) for seqlen in (1024, 65_536, 65_536))
    words = [torch.arange(x.shape[2], dtype=torch.int32) * 5 // x.shape[2] + 1 for x in (q, k)]
    layout_attention(
        *(x[:, :, :9] for x in (q, k, v)), *(x[:9] for x in words), 0.5, backend=backend
    )
    viewed, out = peak_extra_bytes(lambda: layout_attention(q, k, v, *words, 0.5, backend=backend))
    copied, same = peak_extra_bytes(
        lambda: layout_attention(q, k.contiguous(), v.contiguous(), *words, 0.5, backend=backend)
    )
    assert torch.equal(out, same)
    one = k.numel() * k.element_size()
    assert viewed < one / 2  # a copy of keys or values alone would take one
    assert copied > 1.5 * one  # the negative control; a little of it may be memory freed before


@needs_proc
def test_the_measurement_sees_scores_that_are_held() -> None:
    """The negative control: the reference holds M*N."""
    assert extra_megabytes("reference", 4096, 4096, 8, "range", "no") > 2 * 4096 * 4096 * 4 / 2**20


@needs_proc
def test_the_peak_of_a_call_is_seen() -> None:
    for _ in range(2):  # the first call also loads code
        freed, _ = peak_extra_bytes(
            lambda: torch.ones(64 * 2**20).sum()
        )  # 256 MiB, gone when the call returns
    nothing, _ = peak_extra_bytes(lambda: None)
    assert nothing < 2**20
    assert freed == pytest.approx(2**28, rel=0.05)

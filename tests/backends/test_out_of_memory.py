"""Too little memory is said in one sentence with shapes, dtype and bytes by every backend."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from cases import DEVICES, backends
from sega_cases import NUMBERS
from torch import Tensor

from dense_attn import (
    ReversibleSampler,
    SemanticGuidance,
    ddim_step,
    layout_attention,
    percentile_mask,
    sega_guidance,
)
from dense_attn._backends import table

GUIDANCE = {
    "edit_guidance_scale": 5.0,
    "edit_threshold": 0.9,
    "edit_weights": 1.0,
    "warm": True,
    "enabled": True,
}
GUIDANCE |= {"reverse": False, **NUMBERS}


def huge(backend: str, *shape: int) -> Tensor:
    """A tensor of one row that stands for all."""
    return torch.zeros(shape[-1], device=DEVICES[backend]).expand(shape)


def attention(backend: str, heads: int = 2**10, keys: int = 8) -> Tensor:
    q, k = huge(backend, 2**20, heads, 2**10, 64), huge(backend, 2**20, heads, keys, 64)
    words = [torch.zeros(x.shape[2], dtype=torch.int32, device=q.device) for x in (q, k)]
    return layout_attention(q, k, k, *words, backend=backend)


def guidance(backend: str) -> object:
    x = huge(backend, 2**12, 2**12, 2**12, 2**9)
    return sega_guidance(x, x, x[None], None, backend=backend, **GUIDANCE)


def step(backend: str) -> Tensor:
    x = huge(backend, 2**22, 2**22)
    return ddim_step(x, x, 0.5, 0.6, backend=backend)


def mask(backend: str) -> object:
    return percentile_mask(huge(backend, 2**22, 2**22), 0.5, dim=-1, backend=backend)


SHAPES = {
    attention: "q of shape (1048576, 1024, 1024, 64) and k of shape (1048576, 1024, 8, 64)",
    guidance: "eps_uncond of shape (4096, 4096, 4096, 512) and "
    "eps_edits of shape (1, 4096, 4096, 4096, 512)",
    mask: "x of shape (4194304, 4194304)",
    step: "x of shape (4194304, 4194304)",
}
CALLS = [
    (attention, "layout_attention", 2**48),
    (mask, "percentile_mask", 2**46),
    (guidance, "sega_guidance", 2**47),
    (step, "ddim_step", 2**46),
]


@pytest.mark.parametrize("backend", backends("triton", "cpu", "reference"))
@pytest.mark.parametrize(("call", "op", "size"), CALLS, ids=[op for _, op, _ in CALLS])
def test_too_little_memory_is_one_sentence(
    call: Callable, op: str, size: int, backend: str
) -> None:
    if (op, backend) == ("layout_attention", "reference"):
        size = 2**45  # its scores of 8 keys, which come before the result
    with pytest.raises(torch.OutOfMemoryError) as refused:
        call(backend)
    device = torch.empty(0, device=DEVICES[backend]).device
    text = f"{op} must fit into memory, got {SHAPES[call]} in float32 on {device}"
    assert str(refused.value).startswith(f"{text}, which takes at least {size} bytes: ")
    assert len(str(refused.value).splitlines()) == 1
    words = (
        "out of memory"
        if DEVICES[backend] == "cuda"
        else "DefaultCPUAllocator: can't allocate memory"
    )
    assert words in str(refused.value)  # programs that try again with less look for them
    assert "API call failed" not in str(refused.value)


@pytest.mark.parametrize("backend", backends("triton", "cpu", "reference"))
def test_more_bytes_than_an_integer_holds(backend: str) -> None:
    with pytest.raises(
        torch.OutOfMemoryError, match=f"layout_attention must fit .* least {2**64} bytes"
    ):
        attention(backend, heads=2**26, keys=64)


@pytest.mark.parametrize("backend", backends("triton", "cpu", "reference"))
def test_a_list_of_estimates(backend: str) -> None:
    x = huge(backend, 2**12, 2**12, 2**12, 2**9)
    shape = r"2 eps_edits, each of shape \(4096, 4096, 4096, 512\) in float32"
    with pytest.raises(
        torch.OutOfMemoryError,
        match=f"sega_guidance must fit into memory, got {shape} .* {2**48} bytes",
    ):
        SemanticGuidance(backend=backend)(0, x, x, [x, x])


def sampler(backend: str, method: str, exact: bool) -> ReversibleSampler:
    bars = torch.linspace(0.999, 0.01, 20, dtype=torch.float64)
    return ReversibleSampler(bars, [15, 10, 5], method=method, exact=exact, backend=backend)


CHAINS = [
    ("ddim", False),
    ("edict", False),
    ("edict", True),
    ("bdia", False),
    ("bdia", True),
    ("belm", False),
]
CHAIN = (
    r"ReversibleSampler must fit into memory, got x of shape \({}\) in float32 on {}, "
    ".* least {} bytes: "
)


@pytest.mark.parametrize("backend", backends("triton", "cpu", "reference"))
@pytest.mark.parametrize(("method", "exact"), CHAINS)
def test_a_chain_says_so(method: str, exact: bool, backend: str) -> None:
    least = {True: 2**48, False: 2**46 if method == "ddim" else 2**47}[
        exact
    ]  # integers, one latent, or two
    text = CHAIN.format("4194304, 4194304", torch.empty(0, device=DEVICES[backend]).device, least)
    with pytest.raises(torch.OutOfMemoryError, match=text):
        sampler(backend, method, exact).sample(lambda x, t: x, huge(backend, 2**22, 2**22))


@pytest.mark.parametrize("part", ["its steps", "its way back"])
@pytest.mark.parametrize(("method", "exact"), CHAINS[1:])
def test_so_does_each_part_of_a_chain(
    method: str, exact: bool, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmuch more")

    chain, x = (
        sampler("reference", method, exact),
        torch.ones(1, 2, requires_grad=part == "its way back"),
    )
    found = chain.sample(lambda x, t: 0.1 * x, x) if x.requires_grad else None
    names = ("ddim_step", "leapfrog_step", "exact_couple", "exact_leapfrog")
    for name in (*names, "edict_mix", "edict_unmix", "exact_mix", "exact_unmix"):
        monkeypatch.setattr(table.NAMESPACES["reference"], name, fails)
    with pytest.raises(
        torch.OutOfMemoryError,
        match=f"^{CHAIN.format('1, 2', 'cpu', 32 if exact else 16)}CUDA out of",
    ):
        chain.sample(lambda x, t: 0.1 * x, x) if found is None else sum(found).sum().backward()


@pytest.mark.parametrize(("method", "exact"), CHAINS)
def test_too_little_memory_of_the_callers_network_is_its_own(method: str, exact: bool) -> None:
    def network(x: Tensor, t: int) -> Tensor:
        raise torch.OutOfMemoryError("the network's")

    with pytest.raises(torch.OutOfMemoryError, match=r"^the network's$"):
        sampler("reference", method, exact).sample(network, torch.ones(1, 2))


def test_the_raw_op_says_what_it_wanted() -> None:
    """Compiled code calls it so."""
    x = huge("cpu", 2**22, 2**22)
    if table.missing("cpu", "percentile_mask") is not None:
        pytest.skip(table.missing("cpu", "percentile_mask"))
    with pytest.raises(
        RuntimeError,
        match=r"allocate 70368744177664 bytes for a tensor \[4194304, 4194304\] of Float",
    ):
        torch.ops.dense_attn.percentile_mask(x, 0.5)


def failing(error: Exception) -> SimpleNamespace:
    """The reference's kernels, of which the backward pass has no memory."""

    def layout_attention_fwd(q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros_like(q), q.new_zeros(q.shape[:3]), q.new_zeros((*q.shape[:3], 4))

    def layout_attention_bwd(*_: object) -> None:
        raise error

    return SimpleNamespace(
        AUTOGRAD=False,
        tiled=lambda q, k: False,
        layout_attention_fwd=layout_attention_fwd,
        layout_attention_bwd=layout_attention_bwd,
    )


def backward(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table.NAMESPACES, "cpu", failing(error))
    q, words = torch.zeros(1, 2, 3, 4, requires_grad=True), torch.zeros(3, dtype=torch.int32)
    layout_attention(q, q, q, words, words, backend="cpu").sum().backward()


def test_the_backward_pass_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmuch more")
    with pytest.raises(torch.OutOfMemoryError) as refused:
        backward(error, monkeypatch)
    assert str(refused.value) == (
        "layout_attention's backward pass must fit into memory, got q of shape (1, 2, 3, 4) and "
        "k of shape (1, 2, 3, 4) in float32 on cpu, which takes at least 288 bytes: "
        "CUDA out of memory. Tried to allocate 20 GiB."
    )


def test_other_errors_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"^something else$") as refused:
        backward(RuntimeError("something else"), monkeypatch)
    assert not isinstance(refused.value, torch.OutOfMemoryError)

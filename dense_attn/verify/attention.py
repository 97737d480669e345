"""`python -m dense_attn verify`: every available backend against the reference, by one rule of
accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn._backends import table
from dense_attn.layout_attention.op import MODULATIONS, layout_attention

DTYPES = _checks.DTYPES
RESULTS = ("out", "lse", "dq", "dk", "dv", "dstrength")


def judge(got: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """The one rule of accuracy: a kernel is right when error <= allowed, the two numbers returned.

    error = max|got - exact|, allowed = 2*max|plain - exact| + eps(dtype)*max|exact|, where exact is
    the reference in float64 and plain the reference in the dtype under test. The reference in
    float64 is no more exact than plain is there, so for float64 its own error counts once more: 3
    for 2. Where exact is infinite or NaN, got must be the same, or the error is infinite; where
    plain alone overflows it allows nothing.
    """
    got, exact, plain = got.double(), exact.double(), plain.double()
    finite = exact.isfinite()
    if not torch.equal(got[~finite].nan_to_num(nan=-1.0), exact[~finite].nan_to_num(nan=-1.0)):
        return float("inf"), 0.0
    error = _largest(got[finite] - exact[finite])
    plain_error = (plain - exact)[finite & plain.isfinite()]
    times = 3 if dtype == torch.float64 else 2
    return error, times * _largest(plain_error) + torch.finfo(dtype).eps * _largest(exact[finite])


def _largest(x: Tensor) -> float:
    return 0.0 if x.numel() == 0 else x.abs().max().nan_to_num(nan=float("inf")).item()


@dataclass(frozen=True)
class Case:
    """One call of layout_attention with the gradients that flow back into it, in float64."""

    name: str
    q: Tensor  # [B, H, M, D]
    k: Tensor  # [B, H, N, D]
    v: Tensor  # [B, H, N, D]
    q_regions: Tensor  # int32 [M] or [B|1, M]
    k_regions: Tensor  # int32 [N] or [B|1, N]
    strength: Tensor  # [B, H, M]
    grad_out: Tensor  # [B, H, M, D]
    grad_lse: Tensor  # [B, H, M]

    def cast(self, dtype: torch.dtype) -> Case:
        """The same case with tensors in a dtype, strength and grad_lse in its accumulation
        dtype.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        narrow = {name: getattr(self, name).to(dtype) for name in ("q", "k", "v", "grad_out")}
        return replace(
            self, **narrow, strength=self.strength.to(wide), grad_lse=self.grad_lse.to(wide)
        )

    def reordered(self, keys: Tensor, dims: Tensor) -> Case:
        """The same case with keys and head dim in another order: equal in exact numbers, rounded
        differently.
        """
        k, words = self.k[:, :, keys][..., dims], self.k_regions[..., keys]
        return replace(self, q=self.q[..., dims], k=k, v=self.v[:, :, keys], k_regions=words)

    def run(self, modulation: str, backend: str) -> dict[str, Tensor]:
        """out, lse and the gradients of (out*grad_out).sum() + (lse*grad_lse).sum(), rows of lse =
        -inf left out.
        """
        device = table.device_of(backend)
        leaves = [
            x.detach().to(device).requires_grad_() for x in (self.q, self.k, self.v, self.strength)
        ]
        q, k, v, strength = leaves
        words = self.q_regions.to(device), self.k_regions.to(device)
        out, lse = layout_attention(
            q, k, v, *words, strength, modulation=modulation, return_lse=True, backend=backend
        )  # fmt: skip
        grad_out, grad_lse = (
            self.grad_out.to(device),
            self.grad_lse.to(device).masked_fill(lse == -torch.inf, 0.0),
        )
        grads = torch.autograd.grad(
            (out, lse), leaves, (grad_out, grad_lse), materialize_grads=True
        )
        return {name: x.detach().cpu() for name, x in zip(RESULTS, (out, lse, *grads))}


def exact_and_plain(case: Case, modulation: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `judge` compares a backend with, for a case in the dtype under test."""
    exact = case.cast(torch.float64).run(modulation, "reference")
    if case.q.dtype != torch.float64:
        return exact, case.run(modulation, "reference")
    # nothing is wider than float64: what other orders of its sums make of it, at their worst
    plain = exact
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        keys = torch.randperm(case.k.shape[2], generator=generator, device="cpu")
        dims = torch.randperm(case.k.shape[3], generator=generator, device="cpu")
        other = case.reordered(keys, dims).run(modulation, "reference")
        other["dq"], other["dv"] = (
            other["dq"][..., dims.argsort()],
            other["dv"][:, :, keys.argsort()],
        )
        other["dk"] = other["dk"][:, :, keys.argsort()][..., dims.argsort()]
        plain = {name: further(plain[name], other[name], exact[name]) for name in RESULTS}
    return exact, plain


def further(a: Tensor, b: Tensor, exact: Tensor) -> Tensor:
    """Of two tensors, element by element, what lies further from the exact one."""
    return torch.where((b - exact).abs() > (a - exact).abs(), b, a)


def cases() -> Iterator[Case]:
    """A few calls that between them reach cross- and self-attention, long rows, odd sizes and every
    kind of row.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    def words(num_words: int, num_tokens: int, choices: tuple[int, ...]) -> Tensor:
        picks = torch.randint(
            len(choices), (num_words, num_tokens), generator=generator, device="cpu"
        )
        return torch.tensor(choices, dtype=torch.int32, device="cpu")[picks]

    def case(
        name: str, shape: tuple[int, ...], q_words: tuple[int, ...], k_words: tuple[int, ...]
    ) -> Case:
        batch, heads, seqlen_q, seqlen_k, head_dim = shape
        strengths = torch.tensor((1.0, 0.3, 0.0, 1.8, -0.5), dtype=torch.float64, device="cpu")
        rows = torch.randint(5, (batch, heads, seqlen_q), generator=generator, device="cpu")
        rows[:, :, 0] = 0  # the row of the negative control has strength 1
        q_regions = words(batch, seqlen_q, q_words)
        q_regions[:, 0] = q_words[0]
        return Case(
            name,
            randn(batch, heads, seqlen_q, head_dim),
            randn(batch, heads, seqlen_k, head_dim),
            randn(batch, seqlen_k, heads, head_dim).transpose(
                1, 2
            ),  # strided, as diffusers and xformers have it
            q_regions,
            words(1, seqlen_k, k_words),
            strengths[rows],
            randn(batch, heads, seqlen_q, head_dim),
            randn(batch, heads, seqlen_q),
        )

    yield case("cross-attention", (2, 2, 96, 77, 40), (1, 2, 4, 0), (1, 2, 4, 0, 0))
    yield case("self-attention", (2, 2, 144, 144, 80), (1, 2, 3), (1, 2, 3))
    yield case("32 regions", (1, 2, 65, 130, 160), (-(2**31), 2**30, 0), (-(2**31), 1))
    yield case("odd sizes", (1, 3, 33, 19, 7), (1, 2), (1, 2, 0))
    seqlen_k = (
        2000 if table.device_of("triton") == "cpu" else 20000
    )  # the interpreter takes minutes for more
    yield case("long rows", (1, 1, 40, seqlen_k, 16), (1, 2, 0), (1, 2, 0))


@dataclass(frozen=True)
class Verdict:
    """The worst error/allowed of one backend, dtype and modulation over all cases; right when at
    most 1.
    """

    backend: str
    dtype: str
    modulation: str
    ratios: dict[str, float]  # one per result
    control: float  # the same of `out` with one region bit flipped; must be above 1
    worst: str  # which result of which case is furthest off, and by how much

    @property
    def passed(self) -> bool:
        """Whether the backend is right, and its control wrong."""
        return max(self.ratios.values()) <= 1 < self.control


def why_not(backend: str, op: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """Why a backend cannot be checked here on tensors of its own device."""
    device, reason = table.device_of(backend), table.unavailable(backend, op)
    return (
        [reason]
        if reason
        else table.why_not(backend, op, torch.empty(1, 1, 1, 1, dtype=dtype, device=device))
    )


def usable(op: str, dtype: torch.dtype) -> list[str]:
    """The backends that run an op in a dtype on this machine."""
    return [name for name in table.ORDER if not why_not(name, op, dtype)]


def verify() -> Iterator[Verdict]:
    """One verdict for each available backend, dtype and modulation."""
    for dtype in DTYPES:
        available = usable("layout_attention", dtype)
        narrow = [case.cast(dtype) for case in cases()]
        for modulation in MODULATIONS:
            expected = [exact_and_plain(case, modulation) for case in narrow]
            for backend in available:
                yield _verdict(backend, narrow, expected, modulation)


def _verdict(
    backend: str, narrow: list[Case], expected: list[tuple[dict[str, Tensor], ...]], modulation: str
) -> Verdict:
    dtype = narrow[0].q.dtype
    ratios, worst = dict.fromkeys(RESULTS, 0.0), ""
    for case, (exact, plain) in zip(narrow, expected):
        for name, got in case.run(modulation, backend).items():
            error, allowed = judge(got, exact[name], plain[name], dtype)
            ratio = ratio_of(error, allowed)
            if ratio >= max(ratios.values()):
                worst = f"{name} of {case.name}: error {error:.2g}, allowed {allowed:.2g}"
            ratios[name] = max(ratios[name], ratio)
    control = _control(narrow[0], *expected[0], modulation, backend)
    return Verdict(backend, _checks.name(dtype), modulation, ratios, control, worst)


def _control(
    case: Case, exact: dict[str, Tensor], plain: dict[str, Tensor], modulation: str, backend: str
) -> float:
    """error/allowed of an output computed with one region bit of the first query flipped."""
    flipped = case.q_regions.clone()
    flipped[:, 0] ^= 1
    got = replace(case, q_regions=flipped).run(modulation, backend)["out"]
    return ratio_of(*judge(got, exact["out"], plain["out"], case.q.dtype))


def ratio_of(error: float, allowed: float) -> float:
    """error / allowed, right when at most 1."""
    return error / allowed if allowed > 0 else (0.0 if error == 0 else float("inf"))


def main() -> int:
    """Print the table; the number of rows that failed."""
    print(
        "error / allowed, worst of all cases; allowed = 2*max|plain - exact| + eps*max|exact|; right when <= 1"
    )
    print("flipped: the same for an output with one region bit flipped; the check works when > 1\n")
    print(
        f"{'backend':<10} {'dtype':<9} {'modulation':<10} "
        + " ".join(f"{n:>9}" for n in (*RESULTS, "flipped"))
    )
    failed = 0
    for verdict in verify():
        numbers = " ".join(f"{ratio:9.2g}" for ratio in (*verdict.ratios.values(), verdict.control))
        print(
            f"{verdict.backend:<10} {verdict.dtype:<9} {verdict.modulation:<10} {numbers}", end=""
        )
        print("" if verdict.passed else f"  FAILED ({verdict.worst})", flush=True)
        failed += not verdict.passed
    return failed

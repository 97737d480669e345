"""`verify` for layout attention: results and gradients by the rule of accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn._backends import table
from dense_attn.layout_attention.op import MODULATIONS, layout_attention

from .accuracy import DTYPES, Verdict, further, judge, randn, ratio, usable, why_not

RESULTS = ("out", "lse", "dq", "dk", "dv", "dstrength")


@dataclass(frozen=True)
class AttentionCall:
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

    def cast(self, dtype: torch.dtype) -> AttentionCall:
        """The call in a dtype, strength and grad_lse in its accumulation dtype."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        narrow = {name: getattr(self, name).to(dtype) for name in ("q", "k", "v", "grad_out")}
        return replace(
            self, **narrow, strength=self.strength.to(wide), grad_lse=self.grad_lse.to(wide)
        )

    def reordered(self, keys: Tensor, dims: Tensor) -> AttentionCall:
        """The call with keys and head dim in another order: equal, but rounded differently."""
        k, words = self.k[:, :, keys][..., dims], self.k_regions[..., keys]
        return replace(self, q=self.q[..., dims], k=k, v=self.v[:, :, keys], k_regions=words)

    def run(self, modulation: str, backend: str) -> dict[str, Tensor]:
        """out, lse and their gradients, backwards from grad_out and grad_lse.

        Rows of lse = -inf are left out of the sum `(out*grad_out).sum() + (lse*grad_lse).sum()`.
        """
        device = table.device_of(backend)
        inputs = (self.q, self.k, self.v, self.strength)
        leaves = [x.detach().to(device).requires_grad_() for x in inputs]
        *qkv, strength = leaves
        words = self.q_regions.to(device), self.k_regions.to(device)
        options = {"modulation": modulation, "return_lse": True, "backend": backend}
        out, lse = layout_attention(*qkv, *words, strength, **options)
        grad_lse = self.grad_lse.to(device).masked_fill(lse == -torch.inf, 0.0)
        upstream = self.grad_out.to(device), grad_lse
        grads = torch.autograd.grad((out, lse), leaves, upstream, materialize_grads=True)
        return {name: x.detach().cpu() for name, x in zip(RESULTS, (out, lse, *grads))}


def exact_and_plain(
    given: AttentionCall, modulation: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The results that `judge` compares a backend's with, for a call in the dtype under test."""
    exact = given.cast(torch.float64).run(modulation, "reference")
    if given.q.dtype != torch.float64:
        return exact, given.run(modulation, "reference")
    # nothing is wider than float64: what other orders of its sums make of it, at their worst
    plain = exact
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        keys = torch.randperm(given.k.shape[2], generator=generator, device="cpu")
        dims = torch.randperm(given.k.shape[3], generator=generator, device="cpu")
        other = given.reordered(keys, dims).run(modulation, "reference")
        own_keys, own_dims = keys.argsort(), dims.argsort()
        other["dq"], other["dv"] = other["dq"][..., own_dims], other["dv"][:, :, own_keys]
        other["dk"] = other["dk"][:, :, own_keys][..., own_dims]
        plain = {name: further(plain[name], other[name], exact[name]) for name in RESULTS}
    return exact, plain


def calls() -> Iterator[AttentionCall]:
    """A few that reach cross- and self-attention, long rows, odd sizes and every kind of row."""
    make = _Maker(torch.Generator().manual_seed(0))
    long = 2000 if table.device_of("triton") == "cpu" else 20000  # the interpreter takes minutes
    yield make("cross-attention", (2, 2, 96, 77, 40), (1, 2, 4, 0), (1, 2, 4, 0, 0))
    yield make("self-attention", (2, 2, 144, 144, 80), (1, 2, 3), (1, 2, 3))
    yield make("32 regions", (1, 2, 65, 130, 160), (-(2**31), 2**30, 0), (-(2**31), 1))
    yield make("odd sizes", (1, 3, 33, 19, 7), (1, 2), (1, 2, 0))
    yield make("long rows", (1, 1, 40, long, 16), (1, 2, 0), (1, 2, 0))


@dataclass
class _Maker:
    """Calls of random numbers."""

    generator: torch.Generator

    def __call__(
        self, name: str, shape: tuple[int, ...], q_words: tuple[int, ...], k_words: tuple[int, ...]
    ) -> AttentionCall:
        batch, heads, seqlen_q, seqlen_k, head_dim = shape
        strengths = torch.tensor((1.0, 0.3, 0.0, 1.8, -0.5), dtype=torch.float64, device="cpu")
        rows = torch.randint(5, (batch, heads, seqlen_q), generator=self.generator, device="cpu")
        rows[:, :, 0] = 0  # the row of the negative control has strength 1
        q_regions = self._words(batch, seqlen_q, q_words)
        q_regions[:, 0] = q_words[0]
        return AttentionCall(
            name,
            q=self._randn(batch, heads, seqlen_q, head_dim),
            k=self._randn(batch, heads, seqlen_k, head_dim),
            # strided, as diffusers and xformers have it
            v=self._randn(batch, seqlen_k, heads, head_dim).transpose(1, 2),
            q_regions=q_regions,
            k_regions=self._words(1, seqlen_k, k_words),
            strength=strengths[rows],
            grad_out=self._randn(batch, heads, seqlen_q, head_dim),
            grad_lse=self._randn(batch, heads, seqlen_q),
        )

    def _randn(self, *shape: int) -> Tensor:
        return randn(self.generator, *shape)

    def _words(self, rows: int, num_tokens: int, choices: tuple[int, ...]) -> Tensor:
        shape = (rows, num_tokens)
        picks = torch.randint(len(choices), shape, generator=self.generator, device="cpu")
        return torch.tensor(choices, dtype=torch.int32, device="cpu")[picks]


def refused(backend: str, given: AttentionCall) -> str:
    """The reasons why a backend cannot take a call, "" if it can."""
    return "; ".join(why_not(backend, "layout_attention", given.q.dtype, given.q.shape[3]))


def verify(backends: Sequence[str]) -> Iterator[Verdict]:
    """One verdict for each of these backends that is available, dtype and modulation, on the calls
    that it can take.
    """
    for dtype in DTYPES:
        available = usable("layout_attention", dtype, backends)
        narrow = [given.cast(dtype) for given in calls()]
        for modulation in MODULATIONS:
            expected = [exact_and_plain(given, modulation) for given in narrow]
            for backend in available:
                yield _verdict(backend, narrow, expected, modulation)


def _verdict(
    backend: str,
    narrow: list[AttentionCall],
    expected: list[tuple[dict[str, Tensor], ...]],
    modulation: str,
) -> Verdict:
    """The worst of all calls, for each result."""
    dtype = narrow[0].q.dtype
    ratios, worst = dict.fromkeys(RESULTS, 0.0), ""
    for given, (exact, plain) in zip(narrow, expected):
        if refused(backend, given):
            continue
        for name, got in given.run(modulation, backend).items():
            results = got, exact[name], plain[name], dtype
            found = ratio(*results)
            if found >= max(ratios.values()):
                error, allowed = judge(*results)
                worst = f"{name} of {given.name}: error {error:.2g}, allowed {allowed:.2g}"
            ratios[name] = max(ratios[name], found)
    control = _control(narrow[0], *expected[0], modulation, backend)
    return Verdict(backend, _checks.name(dtype), modulation, ratios, control, worst=worst)


def _control(
    given: AttentionCall,
    exact: dict[str, Tensor],
    plain: dict[str, Tensor],
    modulation: str,
    backend: str,
) -> float:
    """error / allowed of an output computed with one region bit of the first query flipped."""
    flipped = given.q_regions.clone()
    flipped[:, 0] ^= 1
    got = replace(given, q_regions=flipped).run(modulation, backend)["out"]
    return ratio(got, exact["out"], plain["out"], given.q.dtype)

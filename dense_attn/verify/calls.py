"""The calls of layout attention that `verify` makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dense_attn._backends import cuda, table
from dense_attn._backends.contract import MODULATIONS
from dense_attn.layout_attention.op import layout_attention

from .accuracy import randn

RESULTS = ("out", "lse", "dq", "dk", "dv", "dstrength")
HALF = (torch.float16, torch.bfloat16)
# Keys of calls for the kernels of a class of head dims: both of CUDA's tiles of a whole row, and
# the loop over any number of keys.
KEYS = (77, 100, 130)
# More rows of tiles than a GPU has processors, which take Triton's whole tiles, where fewer take
# halves.
HEADS = 200
_WORDS = (1, 2, 3, 0)


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
    # The modulations by the backend, for some kernels of half floats alone; None for every backend,
    # dtype and modulation.
    only: dict[str, tuple[str, ...]] | None = None
    k_mask: Tensor | None = None  # bool [B, N]
    every: float | None = None  # the strength as a number, of a call without gradients and lse

    def concerns(self, backend: str, modulation: str) -> bool:
        """Whether the call, in its dtype, is for a backend's kernels."""
        if self.only is None:
            return True
        return self.q.dtype in HALF and modulation in self.only.get(backend, ())

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
        there = None if self.k_mask is None else self.k_mask[:, keys]
        rest = {"v": self.v[:, :, keys], "k_regions": words, "k_mask": there}
        return replace(self, q=self.q[..., dims], k=k, **rest)

    def run(self, modulation: str, backend: str) -> dict[str, Tensor]:
        """out, lse and their gradients, backwards from grad_out and grad_lse.

        Rows of lse = -inf are left out of the sum `(out*grad_out).sum() + (lse*grad_lse).sum()`.
        """
        device = table.device_of(backend)
        inputs = (self.q, self.k, self.v, self.strength)
        leaves = [x.detach().to(device).requires_grad_() for x in inputs]
        *qkv, strength = leaves
        words = self.q_regions.to(device), self.k_regions.to(device)
        there = None if self.k_mask is None else self.k_mask.to(device)
        options = {"modulation": modulation, "k_mask": there, "backend": backend}
        if self.every is not None:
            with torch.no_grad():
                return {"out": layout_attention(*qkv, *words, self.every, **options).cpu()}
        out, lse = layout_attention(*qkv, *words, strength, return_lse=True, **options)
        if not self._has_gradients(leaves[0], modulation, backend):
            return {"out": out.detach().cpu(), "lse": lse.detach().cpu()}
        grad_lse = self.grad_lse.to(device).masked_fill(lse == -torch.inf, 0.0)
        upstream = self.grad_out.to(device), grad_lse
        grads = torch.autograd.grad((out, lse), leaves, upstream, materialize_grads=True)
        return {name: x.detach().cpu() for name, x in zip(RESULTS, (out, lse, *grads))}

    def _has_gradients(self, q: Tensor, modulation: str, backend: str) -> bool:
        """Whether gradients are looked at: not those of CUDA's calls that Triton would first have
        to compile kernels for, beyond its own.
        """
        if self.only is None or backend != "cuda" or modulation in self.only.get("triton", ()):
            return True
        return cuda.gradient_of_attention(q) != "triton"


def calls() -> Iterator[AttentionCall]:
    """A few that reach cross- and self-attention, long rows, odd sizes and every kind of row."""
    make = _Maker(torch.Generator().manual_seed(0))
    long = 2000 if table.device_of("triton") == "cpu" else 20000  # the interpreter takes minutes
    yield make("cross-attention", (2, 2, 96, 77, 40), (1, 2, 4, 0), (1, 2, 4, 0, 0))
    yield make("self-attention", (2, 2, 144, 144, 80), (1, 2, 3), (1, 2, 3))
    yield make("32 regions", (1, 2, 65, 130, 160), (-(2**31), 2**30, 0), (-(2**31), 1))
    yield make("odd sizes", (1, 3, 33, 19, 7), (1, 2), (1, 2, 0))
    yield make("long rows", (1, 1, 40, long, 16), (1, 2, 0), (1, 2, 0))


def kernel_calls(backends: Sequence[str]) -> Iterator[AttentionCall]:
    """Calls that reach each of CUDA's kernels of layout attention, forward and backward, and each
    of Triton's tiles in half floats; none where no backend among these runs on a GPU.

    Triton compiles a kernel as it is called, for seconds, so that it has one modulation a class of
    head dims.
    """
    if not any(_runs_on_a_gpu(backend) for backend in backends):
        return
    make = _Maker(torch.Generator().manual_seed(1))
    for index, head_dim in enumerate(cuda.HEAD_DIMS):
        modulation = (MODULATIONS[index % len(MODULATIONS)],)
        both = {"cuda": MODULATIONS, "triton": modulation}
        for keys in KEYS:
            shape = (1, 2, 33, keys, head_dim)
            yield make(f"{head_dim} columns, {keys} keys", shape, _WORDS, _WORDS, both)
        shape, only = (1, HEADS, 33, KEYS[-1], head_dim), {"triton": modulation}
        yield make(f"{head_dim} columns, many heads", shape, _WORDS, _WORDS, only)
    for index, keys in enumerate((12, 30, 50, 90)):  # Triton's other tiles of a whole row
        only = {"triton": (MODULATIONS[index],)}
        yield make(f"{keys} keys", (1, 2, 33, keys, 64), _WORDS, _WORDS, only)
    only = {"triton": (MODULATIONS[0],)}
    for head_dim in (64, 128):  # packed keys, which calls of few rows do not have
        shape = (1, max(1, HEADS // 2), 65, 1100, head_dim)
        yield make(f"packed keys of {head_dim} columns", shape, _WORDS, _WORDS, only)
    for keys in (KEYS[0], 300):
        yield from _some_keys(make, keys)


def _some_keys(make: _Maker, keys: int) -> Iterator[AttentionCall]:
    """A call of samples with all keys, none and half of them, two heads of queries to one of keys;
    and one as inference makes it.
    """
    only = {"cuda": MODULATIONS, "triton": (MODULATIONS[0],)}
    given = make(f"some of {keys} keys", (3, 4, 33, keys, 40), _WORDS, _WORDS, only)
    counts = torch.tensor([[keys], [0], [keys // 2]], dtype=torch.int32, device="cpu")
    there = torch.arange(keys, dtype=torch.int32, device="cpu") < counts
    given = replace(given, k=given.k[:, :2], v=given.v[:, :2], k_mask=there)
    yield given
    yield replace(given, name=f"{given.name}, without gradients", every=1.0)


def _runs_on_a_gpu(backend: str) -> bool:
    there = table.unavailable(backend, "layout_attention") is None
    return there and table.device_of(backend) == "cuda"


@dataclass
class _Maker:
    """Calls of random numbers."""

    generator: torch.Generator

    def __call__(
        self,
        name: str,
        shape: tuple[int, ...],
        q_words: tuple[int, ...],
        k_words: tuple[int, ...],
        only: dict[str, tuple[str, ...]] | None = None,
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
            only=only,
        )

    def _randn(self, *shape: int) -> Tensor:
        return randn(self.generator, *shape)

    def _words(self, rows: int, num_tokens: int, choices: tuple[int, ...]) -> Tensor:
        shape = (rows, num_tokens)
        picks = torch.randint(len(choices), shape, generator=self.generator, device="cpu")
        return torch.tensor(choices, dtype=torch.int32, device="cpu")[picks]

"""Random calls, most of them wrong: each either runs or raises a clear error, and changes no argument.

python tests/fuzz.py --calls 10000 [--seed 0]
"""

from __future__ import annotations

import argparse
import random
from collections import Counter

import raw
import torch
from torch import Tensor

import dense_attn
from dense_attn import layout_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ODD_DTYPES = (torch.int32, torch.int64, torch.bool, torch.complex64, torch.uint8)
ODD_NUMBERS = (torch.nan, torch.inf, -torch.inf, 1e38, -1e38, 1e-42, 0.0)
HEAD_DIMS = (1, 2, 3, 8, 15, 16, 31, 40, 64, 80, 129, 160, 255, 256)
REFUSALS = (ValueError, TypeError, RuntimeError)


class Fuzzer:
    """One seeded stream of calls."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.outcomes = Counter()

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def length(self) -> int:
        return self.rng.choice((0, 1, 2, 7, 8, 9, 16, 17, 33, self.rng.randint(0, 130)))

    def floats(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Random numbers, sometimes huge or not numbers, under random strides with a contiguous last axis."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)
        if x.numel() and self.chance(0.15):
            x.view(-1)[self.rng.randrange(x.numel())] = self.rng.choice(ODD_NUMBERS)
        kind = self.rng.randrange(8)
        if kind == 0 and len(shape) == 4:
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if kind == 1 and x.numel():
            axis = self.rng.randrange(len(shape))
            return x.narrow(axis, 0, 1).expand(shape)
        if kind == 2:
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(shape)
        if kind == 3 and len(shape) == 4:
            return x.repeat_interleave(2, 2)[:, :, ::2]
        return x

    def words(self, batch: int, tokens: int) -> Tensor:
        shape = self.rng.choice(((tokens,), (1, tokens), (batch, tokens)))
        high = self.rng.choice((1, 2, 8, 2**31 - 1))
        return torch.randint(-high, high, shape, generator=self.generator, dtype=torch.int32)

    def order(self, tokens: int) -> Tensor | None:
        return torch.randperm(tokens, generator=self.generator).int() if self.chance(0.3) else None

    def arguments(self) -> raw.Arguments:
        """Arguments that are right, whatever their numbers."""
        dtype = self.rng.choice(DTYPES)
        batch, num_heads = self.rng.choice(((1, 1), (2, 1), (1, 3), (2, 2), (0, 2), (2, 0)))
        seqlen_q, seqlen_k, head_dim = self.length(), self.length(), self.rng.choice(HEAD_DIMS)
        q, k, v = (self.floats((batch, num_heads, n, head_dim), dtype) for n in (seqlen_q, seqlen_k, seqlen_k))
        return {
            "q": q,
            "k": k,
            "v": v,
            "q_regions": self.words(batch, seqlen_q),
            "k_regions": self.words(batch, seqlen_k),
            "strength": self.floats((batch, num_heads, seqlen_q), torch.promote_types(dtype, torch.float32)),
            "modulation": self.rng.choice(("range", "max", "bias", "mask")),
            "scale": self.rng.choice((0.1, -1.0, 0.0, 1e4)),
            "q_order": self.order(seqlen_q),
        }

    def spoil(self, x: object) -> object:
        """Another value in the place of a good one."""
        if not isinstance(x, Tensor):
            return self.rng.choice((None, "rang", torch.nan, torch.inf, 3, True, torch.zeros(2)))
        spoilers = (
            lambda: x[None],
            lambda: x[0] if x.dim() and len(x) else x.flatten(),
            lambda: x.flatten(),
            lambda: x.to(self.rng.choice(DTYPES + ODD_DTYPES)),
            lambda: x.mT.contiguous().mT if x.dim() > 1 else x.flip(0),
            lambda: (
                x.narrow(axis, 0, size // 2) if (axis := self.axis(x)) is not None and (size := x.shape[axis]) else x
            ),
            lambda: torch.cat([x, x], axis) if (axis := self.axis(x)) is not None else x,
            lambda: x.new_zeros(()),
            lambda: x.new_zeros(0),
            lambda: x.to("meta"),
            lambda: x.to_sparse() if x.dim() else None,
            lambda: torch.full_like(x, self.rng.choice((-1, 0, 7, 2**30))),
            lambda: None,
            lambda: x.tolist(),
        )
        return self.rng.choice(spoilers)()

    def axis(self, x: Tensor) -> int | None:
        return self.rng.randrange(x.dim()) if x.dim() else None

    def public_call(self, arguments: raw.Arguments) -> None:
        arguments = {**arguments, "k_order": self.order(arguments["k"].shape[2])}
        if self.chance(0.6):
            name = self.rng.choice(list(arguments))
            arguments[name] = self.spoil(arguments[name])
        leaves = [x for x in arguments.values() if isinstance(x, Tensor) and x.is_floating_point() and self.chance(0.5)]
        leaves = [x.requires_grad_() for x in leaves if x.layout == torch.strided]
        out, lse = layout_attention(**arguments, return_lse=True)
        if leaves and out.requires_grad:
            torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)), allow_unused=True)

    def raw_call(self, arguments: raw.Arguments) -> None:
        direction = self.rng.choice(("fwd", "bwd"))
        if direction == "bwd":
            shape, rows = arguments["q"].shape, arguments["q"].shape[:3]
            grad_lse = self.floats(rows, arguments["strength"].dtype) if self.chance(0.5) else None
            grad_out = self.floats(shape, arguments["q"].dtype)
            arguments = raw.with_saved(arguments, grad_out=grad_out, grad_lse=grad_lse)
        for _ in range(self.rng.choice((0, 1, 1, 1, 2))):
            name = self.rng.choice(raw.argument_names(direction))
            arguments[name] = self.spoil(arguments[name])
        raw.call(direction, arguments)

    def step(self) -> None:
        """One call, with its arguments compared before and after."""
        arguments = self.arguments()
        tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
        before = [x.detach().clone() for x in tensors]
        call = self.rng.choice((self.public_call, self.raw_call))
        outcome = "ran"
        try:
            call(arguments)
        except REFUSALS as refusal:  # any other error ends the run
            outcome = "refused" if str(refusal).strip() else "refused without a word"
        self.outcomes[f"{call.__name__} {outcome}"] += 1
        for x, y in zip(tensors, before):
            assert torch.equal(x.detach().nan_to_num(), y.nan_to_num()), "an argument was modified"


def fuzz(calls: int, seed: int) -> Counter:
    """Make the calls and count how they ended."""
    fuzzer = Fuzzer(seed)
    for _ in range(calls):
        fuzzer.step()
    return fuzzer.outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"fuzzing {dense_attn.__file__} with seed {options.seed}")
    for outcome, count in sorted(fuzz(options.calls, options.seed).items()):
        print(f"{count:6} {outcome}")

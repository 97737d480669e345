"""Random calls, most of them wrong: each runs or raises a clear error, and changes no argument.

python tests/support/fuzz.py --calls 10000 [--seed 0]
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Callable
from functools import partial

import raw
import torch
from torch import Tensor

import dense_attn
from dense_attn import layout_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ODD_DTYPES = (torch.int32, torch.int64, torch.bool, torch.complex64, torch.uint8)
ODD_NUMBERS = (torch.nan, torch.inf, -torch.inf, 1e38, -1e38, 1e-42, 0.0)
HEAD_DIMS = (1, 2, 3, 8, 15, 16, 31, 40, 64, 80, 129, 160, 255, 256)
FAMILIES = tuple(sorted(raw.registered() - {raw.FWD, raw.BWD}))
LISTS = ("tiles", "counts", "k_words")  # which the CPU has no use for
RAW_ALONE = {"every_strength": 1.0, "with_lse": True, "with_stats": True, "seqlens_k": None}
PUBLIC = ("percentile_mask", "sega_guidance", "ddim_step")
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
        """Random numbers, some huge or none at all, under random strides with a contiguous end."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)
        if x.numel() and self.chance(0.15):
            x.view(-1)[self.rng.randrange(x.numel())] = self.rng.choice(ODD_NUMBERS)
        kind = self.rng.randrange(8)
        if kind == 0 and len(shape) == 4:
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if kind == 1 and x.numel() and shape:
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

    def counts(self, batch: int, most: int) -> Tensor | None:
        if self.chance(0.6):
            return None
        return torch.randint(0, most + 1, (batch,), generator=self.generator, dtype=torch.int32)

    def mask(self, batch: int, seqlen_k: int) -> Tensor | None:
        """Which keys are there, in any of its forms."""
        shape = self.rng.choice(((seqlen_k,), (batch, seqlen_k), (batch, 1, 1, seqlen_k)))
        kind = self.rng.randrange(6)
        if kind > 2:
            return self.counts(batch, seqlen_k)
        numbers = torch.rand(shape, generator=self.generator)
        if kind == 0:
            return numbers < self.rng.choice((0.0, 0.5, 1.0))
        return numbers if kind == 1 else (numbers < 0.5).to(self.rng.choice(DTYPES)) * -1e4

    def arguments(self) -> raw.Arguments:
        """Arguments that are right, whatever their numbers."""
        dtype = self.rng.choice(DTYPES)
        batch, num_heads = self.rng.choice(((1, 1), (2, 1), (1, 3), (2, 2), (0, 2), (2, 0)))
        seqlen_q, seqlen_k, head_dim = self.length(), self.length(), self.rng.choice(HEAD_DIMS)
        group = self.rng.choice((1, 1, 2, 3))
        q = self.floats((batch, num_heads * group, seqlen_q, head_dim), dtype)
        k, v = (self.floats((batch, num_heads, seqlen_k, head_dim), dtype) for _ in range(2))
        return {
            "q": q,
            "k": k,
            "v": v,
            "q_regions": self.words(batch, seqlen_q),
            "k_regions": self.words(batch, seqlen_k),
            "strength": self.floats(q.shape[:3], torch.promote_types(dtype, torch.float32)),
            "modulation": self.rng.choice(("range", "max", "bias", "mask")),
            "scale": self.rng.choice((0.1, -1.0, 0.0, 1e4)),
            "q_order": self.order(seqlen_q),
            "k_order": self.order(seqlen_k),
            **dict.fromkeys(LISTS),
            **RAW_ALONE,
            "seqlens_k": self.counts(batch, seqlen_k),
        }

    def _percentile_arguments(self) -> raw.Arguments:
        x = self.floats(
            (self.rng.choice((0, 1, 2, 5)), self.length() + self.rng.choice((0, 0, 5000))),
            self.rng.choice(DTYPES),
        )
        return {"x": x, "level": self.rng.choice((0.0, 0.5, 0.9, 1.0, self.rng.random()))}

    def _sega_arguments(self) -> raw.Arguments:
        dtype, concepts = self.rng.choice(DTYPES), self.rng.randrange(4)
        wide = torch.promote_types(dtype, torch.float32)
        shape = self.rng.choice(
            (
                (1, 4, 8, 8),
                (2, 3, 5, 7),
                (1, 2, 3, 4, 5),
                (2, 3),
                (0, 4, 8, 8),
                (1, 1, self.length()),
            )
        )

        def some(choices: tuple) -> list:
            return [self.rng.choice(choices) for _ in range(concepts)]

        uncond, text, momentum = (
            self.floats(shape, dtype),
            self.floats(shape, dtype),
            self.floats(shape, wide),
        )
        user_mask = self.floats((concepts, *shape), wide) if self.chance(0.3) else None
        return {
            "eps_uncond": uncond,
            "eps_text": text,
            "eps_edits": self.floats((concepts, *shape), dtype),
            "momentum": momentum,
            "guidance_scale": self.rng.choice((0.0, 7.5, -1.0)),
            "edit_guidance_scale": some((5.0, 0.0, -2.0)),
            "edit_threshold": some((0.0, 0.9, 0.5, 1.0)),
            "weights": some((1.0, 0.0, -1.0, 0.3)),
            "partials": some((0.0, 0.5, 1.0)),
            "all_warm": self.chance(0.5),
            "reverse": some((True, False)),
            "edit_momentum_scale": 0.1,
            "edit_mom_beta": 0.4,
            "user_mask": user_mask,
            "sum_channels": self.chance(0.3),
        }

    def _step_arguments(self) -> raw.Arguments:
        """Arguments of all step kernels, of which each takes its part."""
        shape = self.rng.choice(
            ((1, 4, 8, 8), (2, 3, 5, 7), (self.length(),), (0, 4), (3, self.length()), ())
        )
        latents = {
            name: self.floats(shape, dtype)
            for dtype in [self.rng.choice(DTYPES)]
            for name in ("x", "y", "far", "near")
        }
        eps_dtype = self.rng.choice(DTYPES)
        eps, eps_uncond = self.floats(shape, eps_dtype), self.floats(shape, eps_dtype)
        optional = {"eps_uncond": eps_uncond if self.chance(0.5) else None}
        names = ("a", "b", "guidance_scale", "c_far", "c_near", "c_eps", "step", "to_latent")
        numbers = {name: self.rng.choice((0.0, 1.0, -0.3, 1e9, 0.98)) for name in names}
        switches = {name: self.chance(0.5) for name in ("couple_x", "latent_x")}
        return {
            **latents,
            **optional,
            **numbers,
            **switches,
            "eps": eps,
            "mix": 0.93,
            "dtype": self.rng.choice(DTYPES),
        }

    def family_arguments(self, op: str) -> raw.Arguments:
        """Arguments of a raw op other than layout attention, right whatever their numbers."""
        if op == "percentile_mask":
            return self._percentile_arguments()
        if op == "sega_guidance":
            return self._sega_arguments()
        arguments = self._step_arguments()
        if op.startswith("exact"):
            high = self.rng.choice((2, 2**40, 2**50, 2**63 - 1))
            for name in ("x", "y", "far", "near"):
                arguments[name] = torch.randint(
                    -high, high, arguments[name].shape, generator=self.generator
                )
            arguments["z"] = arguments["x"]
        return arguments

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
                x.narrow(axis, 0, size // 2)
                if (axis := self.axis(x)) is not None and (size := x.shape[axis])
                else x
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
        private = (*LISTS, *RAW_ALONE)
        arguments = {name: x for name, x in arguments.items() if name not in private}
        arguments["k_mask"] = self.mask(arguments["k"].shape[0], arguments["k"].shape[2])
        if self.chance(0.6):
            name = self.rng.choice(list(arguments))
            arguments[name] = self.spoil(arguments[name])
        self.differentiated(partial(layout_attention, return_lse=True), arguments)

    def raw_call(self, arguments: raw.Arguments) -> None:
        op = self.rng.choice((raw.FWD, raw.BWD))
        if op == raw.BWD:
            shape, rows = arguments["q"].shape, arguments["q"].shape[:3]
            grad_lse = self.floats(rows, arguments["strength"].dtype) if self.chance(0.5) else None
            grad_out = self.floats(shape, arguments["q"].dtype)
            arguments = raw.with_saved(arguments, grad_out=grad_out, grad_lse=grad_lse)
        for _ in range(self.rng.choice((0, 1, 1, 1, 2))):
            name = self.rng.choice(raw.argument_names(op))
            arguments[name] = self.spoil(arguments[name])
        raw.call(op, arguments)

    def family_raw_call(self, op: str, arguments: raw.Arguments) -> None:
        for _ in range(self.rng.choice((0, 1, 1, 1, 2))):
            name = self.rng.choice(raw.argument_names(op))
            arguments[name] = self.spoil(arguments[name])
        raw.call(op, arguments)

    def family_public_call(self, op: str, arguments: raw.Arguments) -> None:
        names = raw.argument_names(op)
        call, arguments = getattr(dense_attn, op), {name: arguments[name] for name in names}
        if op == "ddim_step":
            del arguments["a"], arguments["b"]
            arguments |= {
                f"alpha_bar_{when}": self.rng.choice((0.1, 0.5, 1.0, 0.0)) for when in ("t", "prev")
            }
        if op == "percentile_mask":
            arguments["dim"] = self.rng.choice((-1, 0, (0, 1), (-1, -2), 5, (1, 1), ()))
        if self.chance(0.5):
            name = self.rng.choice(list(arguments))
            arguments[name] = self.spoil(arguments[name])
        self.differentiated(call, arguments)

    def differentiated(self, call: Callable, arguments: raw.Arguments) -> None:
        """The call, and the gradients of some of its arguments."""
        leaves = [
            x
            for x in arguments.values()
            if isinstance(x, Tensor) and x.is_floating_point() and self.chance(0.5)
        ]
        leaves = [x.requires_grad_() for x in leaves if x.layout == torch.strided]
        results = call(**arguments)
        results = [results] if isinstance(results, Tensor) else results
        results = [x for x in results if x.requires_grad]
        if leaves and results:
            ones = [torch.ones_like(x) for x in results]
            torch.autograd.grad(results, leaves, ones, allow_unused=True)

    def pick(self) -> tuple[str, raw.Arguments, Callable[[raw.Arguments], None]]:
        """A kind of call, arguments that are right for it, and the call that spoils some."""
        kind = self.rng.choice(("attention public", "attention raw", "family raw", "family public"))
        if kind.startswith("attention"):
            return (
                kind,
                self.arguments(),
                self.public_call if kind.endswith("public") else self.raw_call,
            )
        op = self.rng.choice(FAMILIES if kind.endswith("raw") else PUBLIC)
        call = self.family_raw_call if kind.endswith("raw") else self.family_public_call
        return kind, self.family_arguments(op), partial(call, op)

    def step(self) -> None:
        """One call, with its arguments compared before and after."""
        kind, arguments, call = self.pick()
        tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
        before = [x.detach().clone() for x in tensors]
        outcome = "ran"
        try:
            call(arguments)
        except REFUSALS as refusal:  # any other error ends the run
            outcome = "refused" if str(refusal).strip() else "refused without a word"
        self.outcomes[f"{kind} {outcome}"] += 1
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

"""Are the kernels right at real sizes: `python -m dense_attn.benchmarks.gpu.real_sizes`.

Each case is judged by the library's rule of accuracy on sampled rows against the reference in
float64, and run three times on poisoned memory, whose bits must be the same. A wrong case, or one
that the time did not suffice for, is exit code 1.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dense_attn import layout_attention, percentile_mask, reference
from dense_attn.verify.accuracy import differing, judge

from ..harness import machine
from ..harness.measure import OURS, Entry, Setting, worst
from ..layout_attention.workloads import Inputs, Workload, make_inputs
from ..reversible import round_trip
from ..sega import guidance
from . import program

MODULE = "dense_attn.benchmarks.gpu.real_sizes"
RESULTS = ("out", "lse", "dq", "dk", "dv", "dstrength")
DTYPES = ("bfloat16", "float16", "float32")
_RUNS = 3
_ROWS = 256  # of those whose extremes are no near tie, where the gradient would jump
_TIE = 1e-4
Found = dict[str, tuple[float, float]]  # (error, allowed) of each result


@dataclass(frozen=True)
class Case:
    """An attention layer of an image's tokens, with themselves or with a prompt."""

    head_dim: int
    dtype: str
    ordered: bool = False
    kind: str = "self"
    side: int = 64
    heads: int = 8

    def __str__(self) -> str:
        order = "sorted" if self.ordered else "raster"
        return f"{self.kind}-d{self.head_dim}-{self.dtype}-{order}"

    def inputs(self) -> Inputs:
        """Random tensors and a real layout, its first sample unmodulated."""
        grid = (self.side, self.side)
        workload = Workload(str(self), self.kind, self.heads, grid, self.head_dim)
        return make_inputs(workload, getattr(torch, self.dtype), seed=self.head_dim)


def attention_cases(dry: bool = False) -> list[Case]:
    """The cases of layout attention; what matters most comes first."""
    dims, dtypes, size = (40, 64, 128), DTYPES, {}
    orders = (True,) if dry else (True, False)
    if dry:  # the interpreter has no bfloat16
        dims, dtypes, size = (40,), DTYPES[1:2], {"side": 12, "heads": 1}
    cases = [
        Case(head_dim, dtype, ordered, **size)
        for dtype in dtypes
        for head_dim in dims
        for ordered in orders
    ]
    return cases + [Case(d, dtype, kind="cross", **size) for dtype in dtypes for d in dims]


def main(run: program.Run) -> int:
    """A line for each case, as it ends; 1 if one was wrong or not reached."""
    wrong, late, start = [], [], time.monotonic()
    with program.Compilations() as compilations:
        for index, (name, check) in enumerate(checks(run.dry)):
            if index < run.first:
                continue
            if not run.time_left:
                late.append(name)
                continue
            row = outcome(check)
            program.say(case=name, **row)
            wrong += [name] * (not row["right"])
            if not program.is_usable():
                program.continued(MODULE, run, index + 1)
                break
    cache = {"compiled": compilations.made, "from_cache": compilations.found}
    seconds = round(time.monotonic() - start, 1)
    program.say(wrong=wrong, not_reached=late, seconds=seconds, **cache)
    return 1 if wrong or late else 0


def checks(dry: bool) -> Iterator[tuple[str, Callable[[], dict[str, object]]]]:
    """Every case by its name."""
    for case in attention_cases(dry):
        yield str(case), partial(check_attention, case)
    for concepts, *shape in [(2, 1, 2, 4, 4)] if dry else [(3, 1, 4, 64, 64), (3, 1, 16, 128, 128)]:
        name = "x".join(map(str, (concepts, *shape)))
        yield f"sega-{name}", partial(check_guidance, (concepts, *shape))
    for rows, values in [(2, 500)] if dry else [(4, 4096), (1, 2**20)]:
        yield f"percentile-{rows}x{values}", partial(check_percentile, rows, values)
    for name in ("bdia",) if dry else ("edict", "bdia"):
        yield f"exact-chain-{name}", partial(check_chain, f"round-trip-{name}-{10 if dry else 50}")


def outcome(check: Callable[[], dict[str, object]]) -> dict[str, object]:
    """A check's row with its seconds; an error is a row too."""
    start = time.monotonic()
    try:
        row = check()
        machine.current().synchronize()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        traceback.print_exc()
        row = {"right": False, "error": f"{type(error).__name__}: {lines[0]}"}
    return row | {"seconds": round(time.monotonic() - start, 2)}


def check_attention(case: Case, backend: str = "triton") -> dict[str, object]:
    """Sampled rows against float64, and whole results of several runs against one another."""
    inputs = case.inputs()
    heads = sorted({0, inputs.q.shape[0] * inputs.q.shape[1] - 1})
    rows = clear_rows(inputs, heads)
    kept = torch.zeros(inputs.q.shape[2], dtype=torch.bool, device=inputs.q.device)
    kept[rows] = True
    sampled = replace(inputs, grad_out=inputs.grad_out * kept[:, None])
    got = {
        name: _heads(x, heads)
        for name, x in results(sampled, backend, case.ordered, gradient_of_lse=kept).items()
    }
    for name in ("out", "lse", "dq", "dstrength"):
        got[name] = got[name][:, :, rows]
    exact, plain = expected(inputs, heads, rows)
    dtype = inputs.q.dtype
    found = {name: judge(got[name], exact[name], plain[name], dtype) for name in RESULTS}
    return verdict(found, lambda: tuple(results(inputs, backend, case.ordered).values()))


def verdict(found: Found, again: Callable[[], tuple[Tensor, ...]]) -> dict[str, object]:
    """The row of a case: error over allowed of each result, and whether its bits stay the same."""
    with poisoned_memory():
        first, *others = (tuple(x.clone() for x in again()) for _ in range(_RUNS))
    changed = sum(differing(a, b) for other in others for a, b in zip(first, other))
    written = all(bool(x.isfinite().all()) for x in first)
    ratios = {name: error / max(allowed, 1e-300) for name, (error, allowed) in found.items()}
    shown = {name: float(f"{min(ratio, 1e30):.3g}") for name, ratio in ratios.items()}
    right = all(error <= allowed for error, allowed in found.values()) and written and not changed
    return {"right": right, "ratios": shown, "changed_elements": changed, "all_finite": written}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN, so that an element that is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def results(
    inputs: Inputs, backend: str, ordered: bool = False, gradient_of_lse: Tensor | None = None
) -> dict[str, Tensor]:
    """out, lse and all gradients; `gradient_of_lse` is broadcast over its rows."""
    wide = inputs.q.dtype if inputs.q.dtype == torch.float64 else torch.float32
    strength = inputs.strength.to(wide).expand(inputs.q.shape[:3]).contiguous()
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, strength)]
    words = inputs.q_regions, inputs.k_regions
    orders: dict[str, Tensor | bool] = {"q_order": False, "k_order": False}
    if ordered:
        orders = {
            f"{which}_order": tokens.argsort(stable=True).to(torch.int32)
            for which, tokens in zip("qk", words)
        }
    *qkv, strength = leaves
    out, lse = layout_attention(*qkv, *words, strength, return_lse=True, backend=backend, **orders)
    rows = torch.ones_like(lse) if gradient_of_lse is None else gradient_of_lse.to(wide)
    upstream = inputs.grad_out, rows.expand_as(lse).contiguous()
    grads = torch.autograd.grad((out, lse), leaves, upstream)
    return dict(zip(RESULTS, (out.detach(), lse.detach(), *grads)))


def expected(
    inputs: Inputs, heads: list[int], rows: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The reference's results of some heads and rows, in float64 and in the dtype under test."""
    strength = inputs.strength.expand(inputs.q.shape[:3])[..., None]
    picked = [_heads(x, heads) for x in (inputs.q, inputs.k, inputs.v, inputs.grad_out, strength)]
    q, k, v, grad_out, strength = picked
    q, grad_out, strength = (x[:, :, rows] for x in (q, grad_out, strength[..., 0]))

    def computed(dtype: torch.dtype) -> dict[str, Tensor]:
        tensors = (x.to(dtype) for x in (q, k, v, grad_out))
        part = Inputs(*tensors, inputs.q_regions[rows], inputs.k_regions, strength)
        return results(part, "reference")

    return computed(torch.float64), computed(inputs.q.dtype)


def clear_rows(inputs: Inputs, heads: list[int]) -> Tensor:
    """Rows, evenly apart, whose largest and smallest scores are no near ties in these heads."""
    q, k = (_heads(x, heads).double() for x in (inputs.q, inputs.k))
    rows = torch.linspace(0, q.shape[2] - 1, min(_ROWS, q.shape[2]), device=q.device).long()
    scores = q[:, :, rows] @ k.mT * q.shape[3] ** -0.5  # [heads, 1, rows, N]
    gaps = [x.topk(2).values.diff().abs().amin((0, 1, 3)) for x in (scores, -scores)]
    return rows[torch.minimum(*gaps) > _TIE]


def _heads(x: Tensor, heads: list[int]) -> Tensor:
    return x.flatten(0, 1)[heads].unsqueeze(1)  # [len(heads), 1, tokens, ...]


def check_guidance(shape: tuple[int, ...]) -> dict[str, object]:
    """A step of semantic guidance, beyond whose rule one wrongly kept entry is far."""
    step = guidance.make_step(shape)
    allowed = worst(guidance.ours(step), *guidance.expected(step), torch.float32)
    return verdict({"step": allowed}, lambda: tuple(guidance.ours(step)))


def check_percentile(rows: int, values: int) -> dict[str, object]:
    """Thresholds and what they keep, to the bit."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, values, generator=generator, dtype=torch.float32, device="cpu")
    threshold = reference.quantile(x.abs(), 0.9)
    masked = torch.where(x.abs() >= threshold[:, None], x, 0)
    there = x.to(machine.current().device)

    def again() -> tuple[Tensor, ...]:
        return percentile_mask(there, 0.9, dim=-1, backend="triton")

    got = (part.cpu() for part in again())
    wrong = sum(differing(a, b) for a, b in zip(got, (masked, threshold)))
    return verdict({"bits": (float(wrong), 0.0)}, again)


def check_chain(workload: str) -> dict[str, object]:
    """A chain on the integer grid comes back to its own bits."""
    row = round_trip.measure(Entry(Setting(workload, "loop", "exact"), OURS))
    wrong = "reason" in row
    return {"right": not wrong} | {name: row.get(name) for name in ("differing_bits", "reason")}


if __name__ == "__main__":
    sys.exit(program.start(MODULE, main))

"""The one accuracy rule as an assertion, for outputs, lse and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from cases import Inputs
from torch import Tensor

from dense_attn import reference
from dense_attn.verify.accuracy import further, judge

Results = dict[str, Tensor]  # out, lse, dq, dk, dv, dstrength by name


def evaluate(
    attention: Callable, inputs: Inputs, through: str = "both", dtype: torch.dtype | None = None
) -> Results:
    """Outputs of `attention(q, k, v, q_regions, k_regions, strength) -> (out, lse)` and the
    gradients through them.
    """
    leaves = [x.detach() for x in (inputs.q, inputs.k, inputs.v, inputs.strength)]
    leaves = [x.requires_grad_() if dtype is None else x.to(dtype).requires_grad_() for x in leaves]
    q, k, v, strength = leaves
    out, lse = attention(q, k, v, inputs.q_regions, inputs.k_regions, strength)
    results = {"out": out.detach(), "lse": lse.detach()}
    if through == "none":
        return results
    flows = {"out": (out, inputs.grad_out), "lse": (lse, inputs.grad_lse)}
    flows = [flows[name] for name in (("out", "lse") if through == "both" else (through,))]
    outputs, grads = zip(*((output, grad.to(output.dtype)) for output, grad in flows))
    grads = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    for name, leaf, grad in zip(("dq", "dk", "dv", "dstrength"), leaves, grads):
        results[name] = torch.zeros_like(leaf) if grad is None else grad
    return results


def exact_and_plain(
    inputs: Inputs, through: str = "both", **options: object
) -> tuple[Results, Results]:
    """The two measures of the rule: the reference in float64, and in the inputs' own dtype."""
    formula = partial(_formula, k_mask=inputs.k_mask, **options)
    exact = evaluate(formula, inputs, through, torch.float64)
    plain = evaluate(formula, inputs, through)
    # Any order of the sums is as plain: the one furthest off counts, so that luck does not. float64
    # has nothing else.
    for seed in range(3):
        for name, other in evaluate(_reordered(inputs, seed, options), inputs, through).items():
            plain[name] = further(plain[name], other, exact[name])
    return exact, plain


def _formula(
    q: Tensor, k: Tensor, v: Tensor, *words: Tensor, k_mask: Tensor | None, **options: object
) -> tuple[Tensor, Tensor]:
    """The reference on every head's own keys, those of each sample that are there."""
    k, v = (x.repeat_interleave(q.shape[1] // max(x.shape[1], 1), 1) for x in (k, v))
    q_regions, k_regions, strength = words
    if k_mask is None:
        return reference.layout_attention(q, k, v, q_regions, k_regions, strength, **options)
    if k_mask.dtype == torch.int32:
        k_mask = torch.arange(k.shape[2]) < k_mask[:, None]
    samples, strength = [], strength.expand(q.shape[:3])
    q_regions, k_regions = (x.expand(len(q), x.shape[-1]) for x in (q_regions, k_regions))
    for i, there in enumerate(k_mask.expand(len(q), -1)):
        one = (x[i : i + 1] for x in (q, k[:, :, there], v[:, :, there]))
        rest = q_regions[i], k_regions[i, there], strength[i : i + 1]
        samples.append(reference.layout_attention(*one, *rest, **options))
    return tuple(torch.cat(results) for results in zip(*samples))


def _reordered(inputs: Inputs, seed: int, options: dict[str, object]) -> Callable:
    """The reference with keys and head dim in another order: equal in exact numbers."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randperm(inputs.k.shape[2], generator=generator)
    keys = keys.sort().values if inputs.tied else keys
    dims = torch.randperm(inputs.k.shape[3], generator=generator)

    def attention(
        q: Tensor, k: Tensor, v: Tensor, q_regions: Tensor, k_regions: Tensor, c: Tensor
    ) -> tuple:
        tensors = (
            q[..., dims],
            k[:, :, keys][..., dims],
            v[:, :, keys],
            q_regions,
            k_regions[..., keys],
        )
        mask = inputs.k_mask
        if mask is not None and mask.dtype == torch.int32:
            mask = torch.arange(len(keys)) < mask[:, None]
        mask = None if mask is None else mask[..., keys]
        return _formula(*tensors, c, k_mask=mask, **options)

    return attention


def assert_accurate(
    name: str, result: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype
) -> None:
    """Fail, with the place, unless a result has exact's shape and obeys the rule."""
    assert result.shape == exact.shape, (
        f"{name} has shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
    )
    error, allowed = judge(result, exact, plain, dtype)
    if error <= allowed:
        return
    misses = torch.where(exact.isfinite(), (result.double() - exact).abs(), _unlike(result, exact))
    at = tuple(
        int(i) for i in torch.unravel_index(misses.nan_to_num(nan=torch.inf).argmax(), misses.shape)
    )
    values = f"{result[at].item():.6g} for {exact[at].item():.6g} at {list(at)}"
    raise AssertionError(f"{name} is off by {error:.3g}, allowed {allowed:.3g}: {values}")


def _unlike(result: Tensor, exact: Tensor) -> Tensor:
    """Infinite where a result is not the very infinity or NaN that exact is, else 0."""
    same = (result.isnan() & exact.isnan()) | (result == exact)
    return torch.where(same, 0.0, torch.inf).double()


def same_bits(result: Tensor, expected: Tensor) -> None:
    """Require equal bits, any NaN for a NaN."""
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)

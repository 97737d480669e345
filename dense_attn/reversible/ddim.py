"""One step of DDIM and its inverse: the public ops, their checks, their autograd and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from dense_attn import _checks, _memory, reference
from dense_attn._backends import dispatch, table
from dense_attn.reversible import moments, schedule
from dense_attn.reversible.strides import dense_strides, laid_out


def ddim_step(
    x: Tensor,
    eps: Tensor,
    alpha_bar_t: float | Tensor,
    alpha_bar_prev: float | Tensor,
    *,
    eps_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """One step of DDIM (eta 0) from t to prev, classifier-free guidance folded in.

    `x_prev = a*x + b*(eps_uncond + guidance_scale*(eps - eps_uncond))`, where
    `a = sqrt(alpha_bar_prev/alpha_bar_t)` and
    `b = sqrt(1 - alpha_bar_prev) - a*sqrt(1 - alpha_bar_t)`.

    Args:
        x: the latent at t, any shape; float32, bfloat16, float16 or float64.
        eps: what the network predicts (with guidance: on the prompt), x's shape, any of these
            dtypes; copied where its strides are not x's.
        alpha_bar_t, alpha_bar_prev: numbers or 0-d tensors in (0, 1], `alphas_cumprod` at t and
            prev, for which a and b are finite in float32 (x of float64: in float64).
        eps_uncond: the prediction without prompt, eps' dtype; None means no guidance.
        guidance_scale: used with eps_uncond alone; finite as a and b.
        backend: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`; a named one runs or
            raises.

    Returns:
        The latent at prev, in x's dtype and memory order. Differentiable in x, eps and eps_uncond.

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names.
        RuntimeError: the named backend cannot run this call, with every reason.

    Source: Song et al., Denoising Diffusion Implicit Models, ICLR 2021.

    Example:
        >>> import torch, dense_attn
        >>> x, eps = torch.randn(2, 1, 4, 64, 64)
        >>> x_prev = dense_attn.ddim_step(x, eps, 0.5, 0.6)
        >>> torch.allclose(dense_attn.ddim_step_inverse(x_prev, eps, 0.5, 0.6), x, atol=1e-5)
        True
    """
    a, b = _coefficients(x, alpha_bar_t, alpha_bar_prev)
    return _step(x, eps, eps_uncond, a, b, guidance_scale, backend)


def ddim_step_inverse(
    x: Tensor,
    eps: Tensor,
    alpha_bar_t: float | Tensor,
    alpha_bar_prev: float | Tensor,
    *,
    eps_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """The inverse of `ddim_step` with the same eps: from the latent at prev to the latent at t.

    `x_t = (x - b*(eps_uncond + guidance_scale*(eps - eps_uncond))) / a`, a and b as in `ddim_step`.

    Args:
        x: the latent at prev.
        eps, alpha_bar_t, alpha_bar_prev, eps_uncond, guidance_scale, backend: as in `ddim_step`.

    Returns:
        The latent at t, in x's dtype and memory order. Differentiable in x, eps and eps_uncond.

    Raises:
        ValueError, TypeError, RuntimeError: as `ddim_step`.

    Source: Song et al., Denoising Diffusion Implicit Models, ICLR 2021.

    Example:
        >>> import torch, dense_attn
        >>> x_prev, eps = torch.randn(2, 1, 4, 64, 64)
        >>> dense_attn.ddim_step_inverse(x_prev, eps, 0.5, 0.6).shape
        torch.Size([1, 4, 64, 64])
    """
    a, b = _coefficients(x, alpha_bar_t, alpha_bar_prev, inverse=True)
    return _step(x, eps, eps_uncond, a, b, guidance_scale, backend)


def _coefficients(
    x: Tensor, alpha_bar_t: float | Tensor, alpha_bar_prev: float | Tensor, *, inverse: bool = False
) -> tuple[float, float]:
    """(a, b) of the step or of its inverse, finite in the dtype that kernels compute in."""
    now = schedule.alpha_bar("alpha_bar_t", alpha_bar_t)
    prev = schedule.alpha_bar("alpha_bar_prev", alpha_bar_prev)
    a, b = moments.ddim(now, prev)
    argument, divisor = "alpha_bar_t", now
    if inverse:
        a, b, argument, divisor = 1 / a, -b / a, "alpha_bar_prev", prev
    wide = reference.accumulation_dtype(_checks.floats("x", x).dtype)
    most = _checks.LARGEST[wide]
    if not (abs(a) <= most and abs(b) <= most):
        rule = f"be large enough for coefficients that are finite in {_checks.name(wide)}"
        _checks.refuse(argument, rule, divisor)
    return a, b


def _step(
    x: Tensor,
    eps: Tensor,
    eps_uncond: Tensor | None,
    a: float,
    b: float,
    guidance_scale: float,
    backend: str,
) -> Tensor:
    """`a*x + b*(eps_uncond + guidance_scale*(eps - eps_uncond))`, checked and dispatched."""
    _checks.shaped_like("eps", _checks.floats("eps", eps), x, "x")
    if eps_uncond is not None:
        _checks.like("eps_uncond", eps_uncond, eps, "eps")
    wide = reference.accumulation_dtype(x.dtype)
    guidance_scale = _checks.number("guidance_scale", guidance_scale, wide)
    name = table.resolve(backend, "ddim_step", x)
    try:
        return apply(x, eps, eps_uncond, a, b, guidance_scale, name)
    except RuntimeError as error:
        _memory.explain(error, "ddim_step", x.numel() * x.element_size(), x=x)
        raise


def apply(
    x: Tensor,
    eps: Tensor,
    eps_uncond: Tensor | None,
    a: float,
    b: float,
    guidance_scale: float,
    backend: str,
) -> Tensor:
    """The step on tensors that go together and a backend that can; differentiable."""
    return dispatch.run(_DdimStep, x, eps, eps_uncond, a, b, guidance_scale, backend)


class _DdimStep(torch.autograd.Function):
    """Linear in its tensors: gradients are torch's own operators, and have gradients themselves."""

    num_tensors = 3

    @staticmethod
    def forward(x, eps, eps_uncond, a, b, guidance_scale, backend):  # noqa: ANN001, ANN205
        strides = dense_strides(x)
        x, eps = laid_out(x, strides), laid_out(eps, strides)
        eps_uncond = None if eps_uncond is None else laid_out(eps_uncond, strides)
        return table.NAMESPACES[backend].ddim_step(x, eps, eps_uncond, a, b, guidance_scale)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
        x, eps, eps_uncond, a, b, scale, _ = inputs
        scale = 1.0 if eps_uncond is None else scale
        ctx.factors, ctx.dtypes = (a, b * scale, b * (1 - scale)), (x.dtype, eps.dtype, eps.dtype)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        wide = grad.to(reference.accumulation_dtype(grad.dtype))
        grads = [(wide * factor).to(dtype) for factor, dtype in zip(ctx.factors, ctx.dtypes)]
        grads = (grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad))
        return *grads, *[None] * 4

    @staticmethod
    def vmap(info, in_dims, *args):  # noqa: ANN001, ANN002, ANN205
        rule = "ddim_step must be called outside of vmap"
        raise NotImplementedError(f"{rule}, got a vmapped input: use the batch")
